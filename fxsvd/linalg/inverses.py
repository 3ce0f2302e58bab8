"""Inverses of second moments from which groups of inputs are taken out one after the other.

Taking out group g leaves B − B_:g B_gg⁻¹ B_g: of an inverse B: that of the second moment of the
others. Where there are fewer rows than entries, R = ZᵀZ with Z n×d, the inverse is not made:

    B = (R + εI)⁻¹ = (I − VᵀV) / ε,    V = L⁻¹Z,    LLᵀ = ZZᵀ + εI    (M. Woodbury, 1950)

holds n×d numbers instead of d×d and costs n²d instead of d³. Without g, where Q² = I − V_gᵀV_g,

    V ← (I + V_g Q⁻² V_gᵀ)^½ V = V + V_g (Q + Q²)⁻¹ V_gᵀV.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from fxsvd.linalg.second_moments import Root, SecondMoment, factored


@dataclass(eq=False)
class DenseInverse:
    """A matrix B, D×D, from which groups are taken out one after the other."""

    b: Tensor

    def rows(self, where: slice) -> Tensor:
        """Some rows of B."""
        return self.b[where]

    def blocks(self, size: int) -> Tensor:
        """The blocks on the diagonal, ``[D / size, size, size]``."""
        count = len(self.b) // size
        return self.b.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)

    def take(self, where: slice, half: Tensor) -> None:
        """B − halfᵀ half, in which the group then is unrelated to all others.

        Args:
            where: the entries of the group.
            half: S⁻¹ B_g:, with S Sᵀ = B_gg.
        """
        self.b.addmm_(half.T, half, alpha=-1)
        self.b[where] = self.b[:, where] = 0
        self.b.diagonal()[where] = 1

    def keep(self, entries: Tensor) -> DenseInverse:
        """B for these entries alone."""
        return DenseInverse(self.b.index_select(0, entries).index_select(1, entries))


@dataclass(eq=False)
class RootInverse:
    """The same of B = (I − VᵀV) / ε, with V n×D and n < D."""

    v: Tensor
    ridge: float

    @classmethod
    def of(cls, root: Root, ridge: float) -> RootInverse:
        """Of R = ZᵀZ, with ε raised as ``factored`` does."""
        lower, taken = factored(root.z @ root.z.T, ridge)
        return cls(torch.linalg.solve_triangular(lower, root.z, upper=False), taken)

    def applied(self, m: Tensor) -> Tensor:
        """M B of an m×D matrix."""
        return (m - (m @ self.v.T) @ self.v) / self.ridge

    def rows(self, where: slice) -> Tensor:
        """Some rows of B."""
        out = self.v[:, where].T @ self.v / -self.ridge
        out[:, where].diagonal().add_(1 / self.ridge)
        return out

    def blocks(self, size: int) -> Tensor:
        """The blocks on the diagonal, ``[D / size, size, size]``."""
        v = self.v.view(len(self.v), -1, size).permute(1, 2, 0)
        unit = torch.eye(size, dtype=v.dtype, device=v.device)
        return torch.baddbmm(unit / self.ridge, v, v.transpose(1, 2), alpha=-1 / self.ridge)

    def take(self, where: slice, half: Tensor) -> None:
        """B − halfᵀ half, in which the group then is unrelated to all others.

        Args:
            where: the entries of the group.
            half: S⁻¹ B_g:, with S Sᵀ = B_gg.
        """
        across = half[:, where].T @ half * -self.ridge  # V_gᵀV = I_g: − ε B_g:, but for I_g:
        values, vectors = torch.linalg.eigh(-across[:, where])  # of Q²
        across[:, where].diagonal().add_(1)
        q = values.clamp(min=torch.finfo(values.dtype).tiny).sqrt()
        self.v += self.v[:, where] @ (vectors / (q + q.square())) @ (vectors.T @ across)
        self.v[:, where] = 0

    def keep(self, entries: Tensor) -> RootInverse | DenseInverse:
        """B for these entries alone, multiplied out where that is less."""
        v = self.v.index_select(1, entries)
        if len(v) < v.shape[1]:
            return RootInverse(v, self.ridge)
        dense = v.T @ v / -self.ridge
        dense.diagonal().add_(1 / self.ridge)
        return DenseInverse(dense)


Inverse: TypeAlias = DenseInverse | RootInverse


def solve(r: SecondMoment, ryx: Tensor, ridge: float) -> Tensor:
    """R_yx (R + εI)⁻¹ of a standardized R, m×d, with ε raised as ``factored`` does.

    >>> solve(torch.eye(2), torch.tensor([[4.0, 2.0]]), 1.0)
    tensor([[2., 1.]])
    >>> solve(Root(torch.tensor([[1.0, 0.0]])), torch.tensor([[4.0, 2.0]]).double(), 1.0)
    tensor([[2., 2.]], dtype=torch.float64)
    """
    if isinstance(r, Root):
        return _refined(r, RootInverse.of(r, ridge), ryx)
    lower, _ = factored(r, ridge)
    solution: Tensor = torch.cholesky_solve(ryx.T, lower).T
    return solution


def inverse(r: SecondMoment, ryx: Tensor, ridge: float, count: int) -> tuple[Inverse, Tensor]:
    """The first entries' part of (R + εI)⁻¹, of a standardized R, and R_yx (R + εI)⁻¹ whole.

    >>> b, m = inverse(torch.eye(2), torch.tensor([[4.0, 2.0]]), 1.0, 1)
    >>> b.rows(slice(0, 1)), m
    (tensor([[0.5000]]), tensor([[2., 1.]]))
    """
    if isinstance(r, Root):
        found = RootInverse.of(r, ridge)
        first = RootInverse(found.v[:, :count].contiguous(), found.ridge)
        return first, _refined(r, found, ryx)
    lower, _ = factored(r, ridge)
    del r  # as large as all that comes
    m = torch.cholesky_solve(ryx.T, lower).T
    return DenseInverse(torch.cholesky_inverse(lower)[:count, :count].contiguous()), m


def _refined(r: Root, b: RootInverse, ryx: Tensor) -> Tensor:
    """R_yx B, refined once: I − VᵀV cancels in what the rows determine well."""
    m = b.applied(ryx)
    return m + b.applied(ryx - (m @ r.z.T) @ r.z - b.ridge * m)
