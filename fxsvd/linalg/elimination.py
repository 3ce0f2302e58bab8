"""Which channels to keep, one at a time by exact cost, where several layers read the same ones.

Both directions are one sweep over a matrix B and an m×d matrix M. Taking group g out,

    cost_g = Tr(M_g B_gg⁻¹ M_gᵀ),    B ← B − B_:g B_gg⁻¹ B_g:,    M ← M − M_g B_gg⁻¹ B_g:,

*removes* g from the least-squares fit when B = R⁻¹ and M = R_yx R⁻¹, and the cost is what the error
rises by; it *adds* g to the fit when B = R and M = R_yx, and the cost is what the error falls by.
R carries its relative ridge throughout (see ``reconstruction``), so "the error" is that of the
ridge regression, Tr(E[y yᵀ] − R_yx,S (R_SS + ε·diag R_SS)⁻¹ R_yx,Sᵀ), to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fxsvd.linalg.reconstruction import RIDGE, Reconstruction
from fxsvd.linalg.second_moments import Root, SecondMoment, standardize
from fxsvd.linalg.systems import Swept, system

COMPACT = 1 / 8  # the share of channels gone at which their rows and columns are left out


class Elimination(NamedTuple):
    """The channels in the order of their removal.

    Attributes:
        order: G channels; those that stay come last, the most costly at the very end.
        costs: the error after each removal, summed over the problems, each relative to its energy
            and times its weight.
    """

    order: Tensor
    costs: Tensor


@dataclass(eq=False)
class Sweep:
    """One problem: B (Gs×Gs) and M (m×Gs), group after group, of s entries each.

    Costs are multiplied by ``share``, weight over energy; ``fitted`` is Tr(M R_yxᵀ) at the start.
    """

    b: Swept
    m: Tensor
    size: int
    share: float
    fitted: float = 0.0

    @classmethod
    def removing(cls, problem: Reconstruction, share: float, ridge: float) -> Sweep:
        """From the fit on all channels."""
        r, ryx = _arranged(problem)
        solver = system(r, ridge)
        del r  # as large as all that comes
        grouped, size = problem.groups.numel(), problem.groups.shape[1]
        m = solver.solved(ryx)
        b = solver.inverse(grouped)  # taking out groups never reads the rows of entries that stay
        return cls(b, m[:, :grouped].contiguous(), size, share, float((m * ryx).sum()))

    @classmethod
    def adding(cls, problem: Reconstruction, share: float, ridge: float) -> Sweep:
        """From the fit on what no channel owns."""
        r, ryx = _arranged(problem)
        b, m = system(r, ridge).beside(ryx, problem.groups.numel())
        return cls(b, m, problem.groups.shape[1], share)

    def __len__(self) -> int:
        return self.m.shape[1] // self.size

    def costs(self) -> Tensor:
        """The cost of the group at every place, in one batch."""
        blocks = self.b.blocks(self.size)
        if self.size == 1:  # one pass over M, in place of a batch of tiny solutions
            return self.m.square().sum(dim=0) / blocks.flatten() * self.share
        columns = self.m.view(-1, len(self), self.size).permute(1, 2, 0)
        lower = torch.linalg.cholesky(blocks)
        half = torch.linalg.solve_triangular(lower, columns, upper=False)
        return torch.sum(half.square(), dim=(1, 2)) * self.share

    def take(self, place: int) -> Tensor:
        """Take out the group at a place, which then holds one that costs nothing; what it cost."""
        where = slice(place * self.size, (place + 1) * self.size)
        rows = self.b.rows(where)
        lower = torch.linalg.cholesky(rows[:, where])
        half = torch.linalg.solve_triangular(lower, rows, upper=False)
        part = torch.linalg.solve_triangular(lower, self.m[:, where].T, upper=False)
        self.b.take(where, half)
        self.m.addmm_(part.T, half, alpha=-1)
        self.m[:, where] = 0
        cost: Tensor = part.square().sum() * self.share
        return cost

    def keep(self, places: Tensor) -> None:
        """Forget all places but these."""
        within = torch.arange(self.size, device=places.device)
        entries = (places[:, None] * self.size + within).flatten()
        self.b = self.b.keep(entries)
        self.m = self.m.index_select(1, entries)


def _arranged(problem: Reconstruction) -> tuple[SecondMoment, Tensor]:
    """Standardized R, and R_yx: group after group, then the rest; pads are inputs without data."""
    free = (problem.owner == len(problem.groups)).nonzero()[:, 0]
    order = torch.cat([problem.groups.flatten(), free])
    if torch.equal(order, torch.arange(len(problem.second), device=order.device)):
        matrix, scale = standardize(problem.second)  # the usual order: no copy
        return matrix, problem.ryx * scale
    matrix, scale = standardize(_ordered(problem.second, order))
    return matrix, problem.ryx[:, order] * scale


def _ordered(r: SecondMoment, order: Tensor) -> SecondMoment:
    real = order >= 0
    if isinstance(r, Root):
        return Root(r.z[:, order] * real)
    return r[order][:, order] * (real[:, None] & real)


def backward_elimination(
    problems: Sequence[Reconstruction],
    *,
    weights: Sequence[float] | None = None,
    ridge: float = RIDGE,
    stop: int = 1,
) -> Elimination:
    """Remove, again and again, the channel without which the error rises least.

    What a removed channel explained moves to those that stay: its cost is exact, not its norm.

    Args:
        problems: the layers that read the channels; group g is the same channel in each, and a
            group of padding alone costs nothing there.
        weights: of the problems' relative errors; 1 each if not given.
        ridge: relative ridge on each R, raised where R is singular.
        stop: how many channels to keep.

    Raises:
        ValueError: no problem, different numbers of channels, or an argument out of bounds.

    >>> each, r = torch.arange(3)[:, None], torch.eye(3)
    >>> problem = Reconstruction.of_weight(torch.tensor([[2.0, 0.0, 1.0]]), r, each)
    >>> found = backward_elimination([problem], ridge=0.0)
    >>> found.order, found.costs
    (tensor([1, 2, 0]), tensor([0.0000, 0.2000], dtype=torch.float64))
    """
    shares = _shares(problems, weights)
    count = len(problems[0].groups)
    if not 0 <= stop <= count:
        raise ValueError(f"stop {stop}: of {count} channels keep 0 … {count}")
    pairs = list(zip(problems, shares, strict=True))
    sweeps = [Sweep.removing(p, share, ridge) for p, share in pairs]
    left = sum(s.share * (p.energy - s.fitted) for p, s in zip(problems, sweeps, strict=True))
    order, costs = _sweep(sweeps, count - stop, sign=1)
    return Elimination(order, left + costs.cumsum(0))


def forward_selection(
    problems: Sequence[Reconstruction],
    width: int,
    *,
    weights: Sequence[float] | None = None,
    ridge: float = RIDGE,
) -> Tensor:
    """Add, again and again, the channel with which the error falls most.

    Args:
        problems: the layers that read the channels, as in ``backward_elimination``.
        width: how many channels to choose.
        weights: of the problems' relative errors; 1 each if not given.
        ridge: relative ridge on each R, raised where R is singular.

    Returns:
        ``width`` channels in the order of their choice.

    Raises:
        ValueError: no problem, different numbers of channels, or an argument out of bounds.

    >>> each, r = torch.arange(3)[:, None], torch.eye(3)
    >>> problem = Reconstruction.of_weight(torch.tensor([[2.0, 0.0, 1.0]]), r, each)
    >>> forward_selection([problem], 2)
    tensor([0, 2])
    """
    shares = _shares(problems, weights)
    count = len(problems[0].groups)
    if not 0 <= width <= count:
        raise ValueError(f"width {width} of {count} channels: ask for 0 … {count}")
    pairs = zip(problems, shares, strict=True)
    order, _ = _sweep([Sweep.adding(p, share, ridge) for p, share in pairs], width, sign=-1)
    return order[:width]


def _shares(problems: Sequence[Reconstruction], weights: Sequence[float] | None) -> list[float]:
    """Weight over energy of each problem; a target without energy costs nothing."""
    if len({len(p.groups) for p in problems}) != 1:
        raise ValueError("give problems, one at least, that all have the same number of channels")
    given = [1.0] * len(problems) if weights is None else list(weights)
    if len(given) != len(problems) or not all(0 <= weight < float("inf") for weight in given):
        raise ValueError(f"weights: want {len(problems)} finite numbers from 0, but got {given}")
    return [w / p.energy if p.energy else 0.0 for w, p in zip(given, problems, strict=True)]


def _sweep(sweeps: list[Sweep], steps: int, sign: int) -> tuple[Tensor, Tensor]:
    """Take out ``steps`` groups, always that of least ``sign``·cost; the rest follow by it."""
    alive = torch.arange(len(sweeps[0]), device=sweeps[0].m.device)
    gone = torch.zeros_like(alive, dtype=torch.bool)
    order: list[int] = []
    costs: list[float] = []
    for _ in range(steps):
        total = _total(sweeps, gone, sign)
        place = int(total.argmin())
        order.append(int(alive[place]))
        costs.append(float(total[place]))
        gone[place] = True
        for sweep in sweeps:
            sweep.take(place)
        kept = (~gone).nonzero()[:, 0]
        if 0 < len(kept) <= len(gone) * (1 - COMPACT):
            alive, gone = alive[kept], gone[kept]
            for sweep in sweeps:
                sweep.keep(kept)
    ranks = _total(sweeps, gone, sign).argsort(stable=True)[: len(gone) - int(gone.sum())]
    taken = torch.tensor(order, dtype=torch.int64, device=alive.device)
    return torch.cat([taken, alive[ranks]]), ranks.new_tensor(costs, dtype=torch.float64)


def _total(sweeps: list[Sweep], gone: Tensor, sign: int) -> Tensor:
    total = sign * torch.stack([sweep.costs() for sweep in sweeps]).sum(dim=0)
    return total.masked_fill(gone, torch.inf)
