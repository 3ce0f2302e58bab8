"""R + εI of a second moment: solved, inverted, and groups of inputs taken out one after the other.

Taking group g out of a matrix B leaves B − B_:g B_gg⁻¹ B_g:. Of an inverse that is the inverse for
the second moment of the others; of R + εI itself, what others have beside g. Where there are fewer
rows than entries, R = ZᵀZ with Z n×d, neither is made: both are B = c (I ± VᵀV),

    R + εI = ε (I + VᵀV),          V = Z / √ε,
    (R + εI)⁻¹ = (I − VᵀV) / ε,    V = L⁻¹Z,    LLᵀ = ZZᵀ + εI    (M. Woodbury, 1950),

which holds n×d numbers instead of d×d and costs n²d instead of d³. Without g, of Q² = I ± V_gᵀV_g,

    V ← (I ∓ V_g Q⁻² V_gᵀ)^½ V = V ∓ V_g (Q + Q²)⁻¹ V_gᵀV.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from fxsvd.linalg.second_moments import Root, SecondMoment, factored


@dataclass(eq=False)
class Dense:
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

    def keep(self, entries: Tensor) -> Dense:
        """B for these entries alone."""
        return Dense(self.b.index_select(0, entries).index_select(1, entries))


@dataclass(eq=False)
class Rooted:
    """The same of B = c (I + s VᵀV), with V n×D and n < D, and s 1 or -1."""

    v: Tensor
    c: float
    s: int

    def applied(self, m: Tensor) -> Tensor:
        """M B of an m×D matrix."""
        return (m + self.s * ((m @ self.v.T) @ self.v)) * self.c

    def rows(self, where: slice) -> Tensor:
        """Some rows of B."""
        out = self.v[:, where].T @ self.v * (self.s * self.c)
        out[:, where].diagonal().add_(self.c)
        return out

    def blocks(self, size: int) -> Tensor:
        """The blocks on the diagonal, ``[D / size, size, size]``."""
        v = self.v.view(len(self.v), -1, size).permute(1, 2, 0)
        unit = torch.eye(size, dtype=v.dtype, device=v.device)
        return torch.baddbmm(unit * self.c, v, v.transpose(1, 2), alpha=self.s * self.c)

    def take(self, where: slice, half: Tensor) -> None:
        """As ``Dense.take``."""
        across = half[:, where].T @ half / self.c  # B_g: / c
        values, vectors = torch.linalg.eigh(across[:, where])  # of Q²
        across[:, where].diagonal().sub_(1)  # ±V_gᵀV
        q = values.sqrt()  # of values from ε / (size + ε) on
        self.v -= self.v[:, where] @ (vectors / (q + q.square())) @ (vectors.T @ across)
        self.v[:, where] = 0

    def keep(self, entries: Tensor) -> Rooted | Dense:
        """B for these entries alone, multiplied out where that is less."""
        kept = Rooted(self.v.index_select(1, entries), self.c, self.s)
        return kept if len(kept.v) < len(entries) else Dense(kept.rows(slice(None)))


Swept: TypeAlias = Dense | Rooted


@dataclass(frozen=True, eq=False)
class DenseSystem:
    """R + εI = LLᵀ."""

    lower: Tensor

    def solved(self, ryx: Tensor) -> Tensor:
        """R_yx (R + εI)⁻¹, m×d."""
        solution: Tensor = torch.cholesky_solve(ryx.T, self.lower).T
        return solution

    def inverse(self, count: int) -> Dense:
        """The part of the first entries, so many of them."""
        return Dense(torch.cholesky_inverse(self.lower)[:count, :count].contiguous())

    def beside(self, ryx: Tensor, count: int) -> tuple[Dense, Tensor]:
        """R + εI and R_yx for the first entries, once the others have been taken out."""
        r = self.lower @ self.lower.T
        known, cross = r[count:, count:], r[count:, :count]
        solved = torch.linalg.solve(known, torch.cat([cross, ryx[:, count:].T], dim=1))
        b = r[:count, :count] - cross.T @ solved[:, :count]
        return Dense(b), ryx[:, :count] - solved[:, count:].T @ cross


@dataclass(frozen=True, eq=False)
class RootSystem:
    """R + εI = ZᵀZ + εI, with the factor L of ZZᵀ + εI."""

    z: Tensor
    lower: Tensor
    ridge: float

    def solved(self, ryx: Tensor) -> Tensor:
        """R_yx (R + εI)⁻¹, m×d; refined once: I − VᵀV cancels in what the rows determine well."""
        b = Rooted(self._v, 1 / self.ridge, -1)
        m = b.applied(ryx)
        return m + b.applied(ryx - (m @ self.z.T) @ self.z - self.ridge * m)

    @cached_property
    def _v(self) -> Tensor:
        v: Tensor = torch.linalg.solve_triangular(self.lower, self.z, upper=False)
        return v

    def inverse(self, count: int) -> Rooted:
        """The part of the first entries, so many of them."""
        v = self._v[:, :count].clone(memory_format=torch.contiguous_format)  # which taking changes
        return Rooted(v, 1 / self.ridge, -1)

    def beside(self, ryx: Tensor, count: int) -> tuple[Rooted, Tensor]:
        """R + εI and R_yx for the first entries, once the others have been taken out."""
        z, others = self.z[:, :count], self.z[:, count:]
        values, vectors = torch.linalg.eigh(others @ others.T)
        values, turned = values.clamp(min=0) + self.ridge, vectors.T @ z
        known = (ryx[:, count:] @ others.T) @ (vectors / values)
        v = turned / values.sqrt()[:, None]
        return Rooted(v, self.ridge, 1), ryx[:, :count] - known @ turned


def system(r: SecondMoment, ridge: float) -> DenseSystem | RootSystem:
    """R + εI of a standardized R, with ε raised as ``factored`` does.

    >>> ryx = torch.tensor([[4.0, 3.0]], dtype=torch.float64)
    >>> system(torch.eye(2).double(), 3.0).solved(ryx)
    tensor([[1.0000, 0.7500]], dtype=torch.float64)
    >>> system(Root(torch.tensor([[1.0, 0.0]])), 3.0).solved(ryx)
    tensor([[1., 1.]], dtype=torch.float64)
    """
    if isinstance(r, Root):
        return RootSystem(r.z, *factored(r.z @ r.z.T, ridge))
    return DenseSystem(factored(r, ridge)[0])
