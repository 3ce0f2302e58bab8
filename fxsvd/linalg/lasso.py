"""The group lasso of linear neural reconstruction: min over M of ½E‖y − M x‖² + λ Σ_g ‖M_g‖_F.

Solved by FISTA (A. Beck and M. Teboulle, *A Fast Iterative Shrinkage-Thresholding Algorithm*, 2009)
on second moments, so that a step costs O(m d²) whatever the number of samples. Momentum restarts
where it would raise the objective (B. O'Donoghue and E. Candès, *Adaptive Restart*, 2015).
Entries of x that no group names are not penalised.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fxsvd.linalg.reconstruction import Reconstruction, least_squares

RATIO = 0.8  # between neighbours on the path of penalties
PATH = 60  # penalties down to RATIO**60 = 1.5e-6 of the largest
BISECTIONS = 30


class Lasso(NamedTuple):
    """A solution, whose ``m`` (m×d) has whole groups of columns exactly zero.

    ``residual`` is its ``kkt_residual`` at the ``penalty``, above the tolerance only where
    ``iterations`` are as many as were allowed.
    """

    m: Tensor
    penalty: float
    residual: float
    iterations: int


class _Point(NamedTuple):
    m: Tensor
    gradient: Tensor


def norms(problem: Reconstruction, m: Tensor) -> Tensor:
    """Frobenius norm of every group's columns, G numbers.

    >>> two = Reconstruction(torch.eye(3), torch.eye(3), 3.0, torch.tensor([[0, 2], [1, -1]]))
    >>> norms(two, torch.tensor([[3.0, 1.0, 4.0]]))
    tensor([5., 1.], dtype=torch.float64)
    """
    return _norms(problem, m)[:-1]


def _norms(problem: Reconstruction, m: Tensor) -> Tensor:
    """The same, and one more number for all entries without a group."""
    return _per_group(problem, m.double().square()).sqrt_()


def _per_group(problem: Reconstruction, m: Tensor) -> Tensor:
    total = m.new_zeros(len(problem.groups) + 1)
    return total.index_add_(0, problem.owner, m.sum(dim=0))


def largest_penalty(problem: Reconstruction) -> float:
    """The least λ whose solution keeps no group: λ_max = max_g ‖R_yx,g‖_F.

    Entries without a group are fitted first, and R_yx is what they leave to explain.

    >>> both = torch.tensor([[0], [1]])
    >>> largest_penalty(Reconstruction(torch.eye(2), torch.tensor([[2.0, -3.0]]), 13.0, both))
    3.0
    """
    return float(norms(problem, problem.gradient(_without_groups(problem))).max())


def _without_groups(problem: Reconstruction) -> Tensor:
    """The solution at λ_max: zero but for the entries that no group names."""
    free = problem.owner == len(problem.groups)
    m = torch.zeros_like(problem.ryx)
    if bool(free.any()):
        m[:, free] = least_squares(problem.second, problem.ryx, free, ridge=0.0)
    return m


def kkt_residual(problem: Reconstruction, m: Tensor, penalty: float) -> float:
    """The largest violation of the optimality conditions, relative to the size of R_yx.

    With G = M R − R_yx these are ‖G_g‖ ≤ λ where M_g = 0, else G_g = −λ M_g/‖M_g‖.

    >>> one = Reconstruction(torch.eye(1), torch.tensor([[3.0]]), 9.0, torch.tensor([[0]]))
    >>> kkt_residual(one, torch.tensor([[2.0]]), 1.0)
    0.0
    """
    _require_penalty(penalty)
    return _residual(problem, _Point(m.double(), problem.gradient(m)), penalty)


def _residual(problem: Reconstruction, at: _Point, penalty: float) -> float:
    size = _norms(problem, at.m)
    pull = torch.where(size > 0, penalty / size, 0.0)
    allowed = penalty * (size == 0).to(size)  # not torch.where: of two numbers it makes a float32
    pull[-1] = allowed[-1] = 0.0
    violation = _norms(problem, at.gradient + at.m * pull[problem.owner]) - allowed
    worst = violation.max().clamp(min=0)
    return float(worst / _norms(problem, problem.ryx).max()) if worst > 0 else 0.0


def group_lasso(
    problem: Reconstruction,
    penalty: float,
    *,
    start: Tensor | None = None,
    tolerance: float = 1e-6,
    most: int = 2000,
) -> Lasso:
    """Minimise ½E‖y − M x‖² + λ Σ_g ‖M_g‖_F.

    From ``start`` (M₀, m×d; zero if not given), until ``kkt_residual`` is at most ``tolerance`` or
    ``most`` steps were taken. The objective never rises; without a restart it is within
    2L‖M₀ − M*‖²/k² of the optimum after k steps, with L the largest eigenvalue of R.

    Raises:
        ValueError: the penalty is negative, or ``start`` has another shape than M.

    >>> one = Reconstruction(torch.eye(1), torch.tensor([[3.0]]), 9.0, torch.tensor([[0]]))
    >>> group_lasso(one, 1.0).m
    tensor([[2.]], dtype=torch.float64)
    """
    _require_penalty(penalty)
    m = torch.zeros_like(problem.ryx) if start is None else start.detach().to(problem.ryx)
    if m.shape != problem.ryx.shape:
        raise ValueError(f"start is {tuple(m.shape)}, M is {tuple(problem.ryx.shape)}")
    now = before = _Point(m, problem.gradient(m))
    k = 1
    for iteration in range(max(most, 0) + 1):
        residual = _residual(problem, now, penalty)
        if residual <= tolerance or iteration >= most or problem.curvature == 0:
            break
        found = _step(problem, penalty, now, before, (k - 1) / (k + 2))
        if k > 1 and _rise(problem, penalty, now, found) > 0:
            k, before = 1, now  # the next step has no momentum, and such steps always descend
        else:
            k, before, now = k + 1, now, found
    return Lasso(now.m, penalty, residual, iteration)


def _require_penalty(penalty: float) -> None:
    if not 0 <= penalty < math.inf:
        raise ValueError(f"penalty {penalty} has to be finite, and 0 or more")


def _step(
    problem: Reconstruction, penalty: float, now: _Point, before: _Point, momentum: float
) -> _Point:
    ahead = now.m + momentum * (now.m - before.m)
    slope = now.gradient + momentum * (now.gradient - before.gradient)  # affine in M, so no matmul
    m = ahead - slope / problem.curvature
    size = _norms(problem, m)
    shrink = torch.where(size > 0, 1 - penalty / problem.curvature / size, 0.0).clamp_(min=0)
    shrink[-1] = 1.0
    m = m * shrink[problem.owner]
    active = (shrink > 0)[problem.owner]  # cost follows the width reached
    many = int(active.sum()) > 0.7 * len(active)
    return _Point(m, problem.gradient(m, None if many else active))


def _rise(problem: Reconstruction, penalty: float, now: _Point, found: _Point) -> float:
    """How much the objective rises, by identities in which nothing large cancels."""
    change = found.m - now.m
    smooth = 0.5 * float(((now.gradient + found.gradient) * change).sum())
    both = norms(problem, now.m) + norms(problem, found.m)
    growth = _per_group(problem, change * (now.m + found.m))[:-1]
    return smooth + penalty * float(torch.where(both > 0, growth / both, 0.0).sum())


def support_of_width(
    problem: Reconstruction, width: int, *, tolerance: float = 1e-3, most: int = 200
) -> Tensor:
    """The ``width`` groups that the lasso keeps.

    Penalties fall from λ_max by a constant factor, each solution starting from the last, until
    enough groups are kept; bisection then looks for exactly as many. Where groups enter together
    the largest norms decide, and groups that never enter follow by the size of their gradient.

    Args:
        problem: the moments and the groups.
        width: how many groups, from 0 to G.
        tolerance: ``kkt_residual`` of each solution.
        most: steps at most for each.

    Returns:
        G bools.

    Raises:
        ValueError: the width is out of bounds.

    >>> both = torch.tensor([[0], [1]])
    >>> problem = Reconstruction(torch.eye(2), torch.tensor([[2.0, -3.0]]), 13.0, both)
    >>> support_of_width(problem, 1)
    tensor([False,  True])
    """
    count = len(problem.groups)
    if not 0 <= width <= count:
        raise ValueError(f"width {width} of {count} channels: ask for 0 … {count}")
    if width in (0, count):
        return torch.full((count,), width > 0, device=problem.ryx.device)
    m = _path(problem, width, tolerance, most)
    size, entering = norms(problem, m), norms(problem, problem.gradient(m))
    relevance = torch.where(size > 0, 2 + size / size.max(), entering / entering.max())
    kept = torch.zeros_like(size, dtype=torch.bool)
    kept[relevance.argsort(descending=True, stable=True)[:width]] = True
    return kept


def _path(problem: Reconstruction, width: int, tolerance: float, most: int) -> Tensor:
    """The solution with ``width`` groups, or the sparsest found with more, or the fullest."""
    upper = lower = largest_penalty(problem)
    m = _without_groups(problem)
    for _ in range(PATH):
        lower = upper * RATIO
        m = group_lasso(problem, lower, start=m, tolerance=tolerance, most=most).m
        if _width(problem, m) >= width:
            break
        upper = lower
    for _ in range(BISECTIONS):
        if _width(problem, m) <= width:
            break
        middle = math.sqrt(upper * lower)
        trial = group_lasso(problem, middle, start=m, tolerance=tolerance, most=most).m
        if _width(problem, trial) < width:
            upper = middle
        else:
            lower, m = middle, trial
    return m


def _width(problem: Reconstruction, m: Tensor) -> int:
    return int((norms(problem, m) > 0).sum())
