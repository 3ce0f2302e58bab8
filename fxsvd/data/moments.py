"""First and second moments of streamed rows, exact to float64 whatever the order and the offset."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fxsvd.data import ranks
from fxsvd.data.rows import Rows, add_outer


@dataclass(eq=False)
class Moment:
    """Mean and second moment of rows x, and of pairs (x, y), one block per group.

    Batches are centred by their own mean before they are multiplied, in their own precision (at
    least float32), and merged in float64 (T. Chan, G. Golub, R. LeVeque, *Updating Formulae and a
    Pairwise Algorithm for Computing Sample Variances*, 1979): a large offset costs no digits.

    While a row has more entries than there are rows, the rows themselves are kept (the dual form).
    Memory is 4·count·x (float32 rows) or 8·x² bytes per group, whichever form it is. ``times``
    works in both; ``covariance`` and ``second`` leave the dual form, and are 8·x² bytes more;
    ``root`` is there in the dual form alone.

    Attributes:
        count: rows seen.
        mean: ``[groups, x]``, or None before the first row. The moment owns what it is given.
        scatter: Σ (x − mean)(x − mean)ᵀ, ``[groups, x, x]``; None in the dual form.
        mean_y: ``[groups, y]``, or None without pairs.
        cross: Σ (y − mean_y)(x − mean)ᵀ, ``[groups, y, x]``.
        scatter_y: Σ (y − mean_y)², ``[groups, y]``.
        batches: batches multiplied out (none in the dual form).
        squares: Σ over these batches of ‖covariance of the batch‖², for ``accuracy``.
        rows: all rows, in the dual form.

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
    rows: tuple[Rows, ...] = ()

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """See more rows.

        Args:
            x: ``[rows, groups, x]``.
            y: ``[rows, groups, y]``, of the same rows.

        Raises:
            ValueError: some rows come with a y and others without.
        """
        if len(x) == 0:
            return
        rows = Rows.of(x)
        pairs = None if y is None else rows.paired(Rows.of(y))
        step, weight = self._step(rows.mean, len(x))
        self._merge_pairs(pairs, len(x), weight * step)
        if self.scatter is None and self.count + len(x) < x.shape[-1]:
            self.rows += (rows,)
        else:
            self._multiply(rows, step, weight)
        self._advance(rows.mean, len(x))

    def merge(self, other: Moment) -> None:
        """See the rows of another moment, which stays as it is.

        Raises:
            ValueError: one of them has pairs and the other has not.
        """
        if other.count == 0 or other.mean is None:
            return
        step, weight = self._step(other.mean, other.count)
        self._merge_pairs(other._pairs(), other.count, weight * step)
        kept = self.scatter is None and other.scatter is None
        if kept and self.count + other.count < other.mean.shape[-1]:
            self.rows += other.rows
        else:
            self._merge_scatter(other, step, weight)
        self._advance(other.mean, other.count)

    @property
    def covariance(self) -> Tensor:
        """E[(x − E x)(x − E x)ᵀ], ``[groups, x, x]``."""
        assert self.mean is not None  # something was added
        return self._multiplied(self.mean) / self.count

    @property
    def second(self) -> Tensor:
        """E[x xᵀ], ``[groups, x, x]``."""
        assert self.mean is not None  # something was added
        return add_outer(self.covariance, self.mean, self.mean)

    def times(self, w: Tensor) -> Tensor:
        """W C with the covariance C, which is not made where the rows are still kept.

        Args:
            w: float64 ``[groups, out, x]``.

        >>> moment = Moment()
        >>> moment.add(torch.tensor([[[1.0, 0, 0]], [[3.0, 0, 0]]]))
        >>> moment.times(torch.ones(1, 1, 3, dtype=torch.float64)).tolist()
        [[[1.0, 0.0, 0.0]]]
        """
        assert self.mean is not None  # something was added
        if self.scatter is not None:
            return w @ self.scatter / self.count
        out = torch.zeros_like(w)
        for x in self._kept():
            out += w @ x.transpose(1, 2) @ x
        return out / self.count

    @property
    def root(self) -> Tensor | None:
        """Z with ZᵀZ the covariance, ``[groups, count, x]``, while the rows are kept; else None."""
        if self.scatter is not None or not self.rows:
            return None
        return torch.cat(list(self._kept()), dim=1) / math.sqrt(self.count)

    @property
    def finite(self) -> bool:
        """Whether every number so far is finite, and none too large to be squared."""
        known = self.mean is None or bool(self.mean.isfinite().all())
        return known and math.isfinite(self.squares)

    @property
    def accuracy(self) -> float:
        """The relative standard error of the covariance, from how much its batches differ.

        Infinite in the dual form, and after a single batch.
        """
        if self.batches < 2 or self.scatter is None:
            return math.inf
        total = float(torch.linalg.vector_norm(self.scatter)) ** 2 / self.count**2
        spread = max(self.squares / self.batches - total, 0.0) / (self.batches - 1)
        return math.sqrt(spread / max(total, 1e-300))

    def reduced(self) -> Moment:
        """The moment over the rows of all ranks (of ``torch.distributed``, where it runs).

        Sums of float64 are exchanged, about the common mean; every rank holds two moments then.
        """
        if ranks.alone():
            return self
        if self.mean is not None:
            self._multiplied(self.mean)
        sizes = [0 if t is None else t.shape[-1] for t in (self.mean, self.mean_y)]
        groups = 0 if self.mean is None else len(self.mean)
        table = ranks.gathered([self.count, self.batches, self.squares, groups, *sizes])
        count, batches, squares = table[:, :3].sum(0).tolist()
        if count == 0:
            return self
        own = self if self.count else _nothing(*table[:, 3:].amax(0).long().tolist())
        assert own.mean is not None  # both branches
        assert own.scatter is not None  # multiplied
        mean = ranks.summed(own.mean * own.count) / count
        dx = own.mean - mean
        scatter = ranks.summed(add_outer(own.scatter.clone(), own.count * dx, dx))
        out = Moment(int(count), mean, scatter, batches=int(batches), squares=squares)
        if (pairs := own._pairs()) is not None:
            mean_y, cross, scatter_y = pairs
            out.mean_y = ranks.summed(mean_y * own.count) / count
            dy = mean_y - out.mean_y
            out.cross = ranks.summed(add_outer(cross.clone(), own.count * dy, dx))
            out.scatter_y = ranks.summed(scatter_y + own.count * dy.square())
        return out

    def _step(self, mean: Tensor, count: int) -> tuple[Tensor, float]:
        """From the mean to that of further rows, and the weight of its square."""
        step = torch.zeros_like(mean) if self.mean is None else mean - self.mean
        return step, self.count * count / (self.count + count)

    def _advance(self, mean: Tensor, count: int) -> None:
        step, self.count = self._step(mean, count)[0], self.count + count
        self.mean = mean.clone() if self.mean is None else self.mean + step * (count / self.count)

    def _pairs(self) -> tuple[Tensor, Tensor, Tensor] | None:
        if self.mean_y is None or self.cross is None or self.scatter_y is None:
            return None
        return self.mean_y, self.cross, self.scatter_y

    def _merge_pairs(
        self, new: tuple[Tensor, Tensor, Tensor] | None, count: int, step_x: Tensor
    ) -> None:
        """With the step of the mean of x, times its weight."""
        own = self._pairs()
        if self.count and (own is None) != (new is None):
            raise ValueError("either all rows of a moment are pairs (x, y), or none")
        if own is None and new is not None:
            self.mean_y, self.cross, self.scatter_y = (t.clone() for t in new)
        if own is None or new is None:
            return
        step, share = new[0] - own[0], count / (self.count + count)
        add_outer(own[1].add_(new[1]), step, step_x)
        own[2].add_(new[2]).addcmul_(step, step, value=self.count * share)
        self.mean_y = own[0] + step * share

    def _merge_scatter(self, other: Moment, step: Tensor, weight: float) -> None:
        assert other.mean is not None  # it has rows
        into = self._multiplied(other.mean)
        for rows in other.rows:
            self._multiply(rows, rows.mean - other.mean, len(rows))
        if other.scatter is not None:
            into += other.scatter
            self.batches += other.batches
            self.squares += other.squares
        add_outer(into, weight * step, step)

    def _kept(self) -> Iterator[Tensor]:
        """The rows of the dual form about the mean of all, ``[groups, rows, x]``."""
        assert self.mean is not None  # something was added
        for rows in self.rows:
            yield rows.centred.double() + (rows.mean - rows.rest - self.mean).unsqueeze(1)

    def _multiplied(self, like: Tensor) -> Tensor:
        """The scatter, after leaving the dual form."""
        if self.scatter is None:
            self.scatter = like.new_zeros(*like.shape, like.shape[-1])
            kept, self.rows = self.rows, ()
            for rows in kept:
                assert self.mean is not None  # of these rows
                self._multiply(rows, rows.mean - self.mean, len(rows))
        return self.scatter

    def _multiply(self, rows: Rows, step: Tensor, weight: float) -> None:
        self.squares += rows.add_scatter(self._multiplied(rows.mean), step, weight)
        self.batches += 1


def _nothing(groups: int, x: int, y: int) -> Moment:
    """The moment of no rows, in the shapes that it would have."""

    def zeros(*size: int) -> Tensor:
        return torch.zeros(groups, *size, dtype=torch.float64)

    out = Moment(0, zeros(x), zeros(x, x))
    if y:
        out.mean_y, out.cross, out.scatter_y = zeros(y), zeros(y, x), zeros(y)
    return out
