"""A batch of rows about its own mean, ready to be multiplied."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 2048
"""Columns of a product that are made at a time, at most, beside the sum that they are added to."""
SPLIT = 256
"""From so many columns on they are made in four parts, to make use of the symmetry."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows x of one batch, without their mean (but for its rounding).

    Attributes:
        centred: ``[groups, rows, x]``, in the batch's precision, at least float32.
        mean: of x, float64 ``[groups, x]``.
        rest: of ``centred``: what rounding left of the mean, float64 ``[groups, x]``.
    """

    centred: Tensor
    mean: Tensor
    rest: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Rows:
        """The rows ``[rows, groups, x]`` of a batch, copied.

        >>> Rows.of(torch.tensor([[[1.0]], [[3.0]]])).centred.flatten().tolist()
        [-1.0, 1.0]
        """
        x = x if x.dtype == torch.float64 else x.float()
        shift = x.mean(0)
        centred = (x - shift).transpose(0, 1)
        rest = centred.mean(1).double()
        return cls(centred, shift.double() + rest, rest)

    def __len__(self) -> int:
        return self.centred.shape[1]

    def add_scatter(self, into: Tensor, step: Tensor, weight: float) -> float:
        """Add Σ (x − mean)(x − mean)ᵀ + weight · step stepᵀ to ``[groups, x, x]``.

        Returns:
            ‖covariance of the batch‖², in the batch's precision.

        >>> total = torch.zeros(1, 1, 1, dtype=torch.float64)
        >>> rows = Rows.of(torch.tensor([[[1.0]], [[3.0]]]))
        >>> rows.add_scatter(total, torch.tensor([[10.0]]).double(), 0.5), total.item()
        (1.0, 52.0)
        """
        size, columns = 0.0, into.shape[-1]
        width = columns if columns < SPLIT else min(BLOCK, -(-columns // 4))
        for start in range(0, columns, width):
            here, behind = slice(start, start + width), slice(start + width, columns)
            part = self.centred[:, :, here].transpose(1, 2) @ self.centred[:, :, start:]
            into[:, here, start:] += part
            into[:, behind, here] += part[:, :, width:].transpose(1, 2)  # symmetric: half the work
            off = float(torch.linalg.vector_norm(part[:, :, width:]))
            size += float(torch.linalg.vector_norm(part[:, :, :width])) ** 2 + 2 * off**2
        left = torch.stack([-len(self) * self.rest, weight * step], -1)
        into.baddbmm_(left, torch.stack([self.rest, step], 1))
        return size / len(self) ** 2

    def paired(self, y: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """With the y of the same rows: E y, Σ (y − E y)(x − E x)ᵀ and Σ (y − E y)², per group.

        >>> rows = Rows.of(torch.tensor([[[1.0]], [[3.0]]]))
        >>> [t.item() for t in rows.paired(Rows.of(torch.tensor([[[5.0]], [[9.0]]])))]
        [7.0, 4.0, 8.0]
        """
        cross = (y.centred.transpose(1, 2) @ self.centred).double()
        add_outer(cross, -len(self) * y.rest, self.rest)
        energy = y.centred.double().square().sum(1) - len(self) * y.rest.square()
        return y.mean, cross, energy


def add_outer(into: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``into`` itself, plus a bᵀ per group.

    >>> add_outer(torch.zeros(1, 1, 2), torch.tensor([[2.0]]), torch.tensor([[1.0, 3.0]])).tolist()
    [[[2.0, 6.0]]]
    """
    return into.baddbmm_(a.unsqueeze(-1), b.unsqueeze(1))
