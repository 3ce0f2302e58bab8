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
        """As ``DenseInverse.take``."""
        across = half[:, where].T @ half * -self.ridge  # −ε B_g:
        values, vectors = torch.linalg.eigh(-across[:, where])  # of Q²
        across[:, where].diagonal().add_(1)  # V_gᵀV
        q = values.sqrt()  # of values from ε / (size + ε) on
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


@dataclass(frozen=True, eq=False)
class DenseSystem:
    """R + εI = LLᵀ."""

    lower: Tensor

    def solved(self, ryx: Tensor) -> Tensor:
        """R_yx (R + εI)⁻¹, m×d."""
        solution: Tensor = torch.cholesky_solve(ryx.T, self.lower).T
        return solution

    def inverse(self, count: int) -> DenseInverse:
        """The part of the first entries, so many of them."""
        return DenseInverse(torch.cholesky_inverse(self.lower)[:count, :count].contiguous())


@dataclass(frozen=True, eq=False)
class RootSystem:
    """R + εI = ZᵀZ + εI, with its inverse B."""

    z: Tensor
    b: RootInverse

    def solved(self, ryx: Tensor) -> Tensor:
        """R_yx B, m×d; refined once, for I − VᵀV cancels in what the rows determine well."""
        m = self.b.applied(ryx)
        return m + self.b.applied(ryx - (m @ self.z.T) @ self.z - self.b.ridge * m)

    def inverse(self, count: int) -> RootInverse:
        """The part of the first entries, so many of them."""
        return RootInverse(self.b.v[:, :count].contiguous(), self.b.ridge)


def system(r: SecondMoment, ridge: float) -> DenseSystem | RootSystem:
    """R + εI of a standardized R, with ε raised as ``factored`` does.

    >>> ryx = torch.tensor([[4.0, 3.0]], dtype=torch.float64)
    >>> system(torch.eye(2).double(), 3.0).solved(ryx)
    tensor([[1.0000, 0.7500]], dtype=torch.float64)
    >>> system(Root(torch.tensor([[1.0, 0.0]])), 3.0).solved(ryx)
    tensor([[1., 1.]], dtype=torch.float64)
    """
    if isinstance(r, Root):
        lower, taken = factored(r.z @ r.z.T, ridge)
        v = torch.linalg.solve_triangular(lower, r.z, upper=False)
        return RootSystem(r.z, RootInverse(v, taken))
    return DenseSystem(factored(r, ridge)[0])
