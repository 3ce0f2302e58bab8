"""First and second moments of streamed rows, exact to float64 whatever the order and the offset."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(eq=False)
class Moment:
    """Mean and second moment of rows x, and of pairs (x, y), one block per group.

    Batches are centred by their own mean before they are multiplied, in their own precision, and
    merged in float64 (T. Chan, G. Golub, R. LeVeque, *Updating Formulae and a Pairwise Algorithm
    for Computing Sample Variances*, 1979): a large offset costs no digits.

    Attributes:
        count: rows seen.
        mean: ``[groups, x]``.
        scatter: Σ (x − mean)(x − mean)ᵀ, ``[groups, x, x]``.
        mean_y: ``[groups, y]``, or None without pairs.
        cross: Σ (y − mean_y)(x − mean)ᵀ, ``[groups, y, x]``.
        scatter_y: Σ (y − mean_y)², ``[groups, y]``.
        batches: batches seen.
        squares: Σ over batches of ‖covariance of the batch‖², for ``accuracy``.

    >>> moment = Moment()
    >>> moment.add(torch.tensor([[[1.0]], [[3.0]]]))
    >>> moment.mean.item(), moment.covariance.item()
    (2.0, 1.0)
    """

    count: int = 0
    mean: Tensor | None = None
    scatter: Tensor | None = None
    mean_y: Tensor | None = None
    cross: Tensor | None = None
    scatter_y: Tensor | None = None
    batches: int = 0
    squares: float = 0.0

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """See more rows.

        Args:
            x: ``[rows, groups, x]``.
            y: ``[rows, groups, y]``, of the same rows.
        """
        part = Moment(len(x), *_centred(x))
        assert part.scatter is not None  # just made
        if y is not None:
            part.mean_y, part.cross, part.scatter_y = _paired(x, y)
        part.batches = 1
        part.squares = float((part.scatter / max(part.count, 1)).square().sum())
        self.merge(part)

    def merge(self, other: Moment) -> None:
        """See the rows of another moment."""
        if other.count == 0 or other.mean is None:
            return
        if self.count == 0 or self.mean is None:
            self.__dict__.update(vars(other))
            return
        total = self.count + other.count
        weight, share = self.count * other.count / total, other.count / total
        dx = other.mean - self.mean
        self.scatter = self.scatter + other.scatter + weight * _outer(dx, dx)  # type: ignore[operator]
        if self.mean_y is not None and other.mean_y is not None:
            dy = other.mean_y - self.mean_y
            self.cross = self.cross + other.cross + weight * _outer(dy, dx)  # type: ignore[operator]
            self.scatter_y = self.scatter_y + other.scatter_y + weight * dy.square()  # type: ignore[operator]
            self.mean_y = self.mean_y + share * dy
        self.mean = self.mean + share * dx
        self.count, self.batches = total, self.batches + other.batches
        self.squares += other.squares

    @property
    def covariance(self) -> Tensor:
        """E[(x − E x)(x − E x)ᵀ], ``[groups, x, x]``."""
        assert self.scatter is not None  # something was added
        return self.scatter / self.count

    @property
    def second(self) -> Tensor:
        """E[x xᵀ], ``[groups, x, x]``."""
        assert self.mean is not None  # something was added
        return self.covariance + _outer(self.mean, self.mean)

    @property
    def accuracy(self) -> float:
        """The relative standard error of the covariance, from how much its batches differ."""
        if self.batches < 2:
            return float("inf")
        total = float(self.covariance.square().sum())
        spread = max(self.squares / self.batches - total, 0.0) / (self.batches - 1)
        return math.sqrt(spread / max(total, 1e-300))

    def reduced(self) -> Moment:
        """The moment over the rows of all ranks (of ``torch.distributed``, where it runs)."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return self
        parts: list[Moment | None] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, self)
        out = Moment()
        for part in parts:
            assert part is not None  # every rank gave one
            out.merge(part)
        return out


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.double().mean(0)
    parts = (x - mean.to(x.dtype)).transpose(0, 1)
    return mean, (parts.transpose(1, 2) @ parts).double()


def _paired(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean_x, mean_y = x.double().mean(0).to(x.dtype), y.double().mean(0).to(y.dtype)
    dx, dy = (x - mean_x).transpose(0, 1), (y - mean_y).transpose(0, 1)
    return y.double().mean(0), (dy.transpose(1, 2) @ dx).double(), dy.double().square().sum(1)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("gi,gj->gij", a, b)
