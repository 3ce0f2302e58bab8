"""Errors of least squares on fewer and fewer channels, those that are left out being given."""

from __future__ import annotations

import torch
from torch import Tensor

from fxsvd.linalg.elimination import COMPACT, Sweep
from fxsvd.linalg.reconstruction import RIDGE, Reconstruction
from fxsvd.linalg.second_moments import Root, cholesky, standardize


def errors_without(problem: Reconstruction, *, ridge: float = RIDGE) -> Tensor:
    """Relative errors of the best fits without the first channel, the first two, and so on.

    >>> each = torch.arange(3)[:, None]
    >>> problem = Reconstruction.of_weight(torch.tensor([[0.0, 1.0, 2.0]]), torch.eye(3), each)
    >>> errors_without(problem, ridge=0.0)
    tensor([0.0000, 0.2000, 1.0000], dtype=torch.float64)
    """
    if problem.energy == 0:
        return torch.zeros(len(problem.groups), dtype=torch.float64)
    if isinstance(problem.second, Root):
        explained = _swept(problem, ridge)
    else:
        explained = _factored(problem, problem.second, ridge)
    return (1 - explained / problem.energy).clamp(min=0)


def _factored(problem: Reconstruction, r: Tensor, ridge: float) -> Tensor:
    """What the fits explain of E‖y‖².

    With the channels in reverse, leading blocks of one Cholesky factor L are the factors of all
    fits, which explain Σ ‖(L⁻¹ R_xy)_i‖² over the entries i that are left.
    """
    free = (problem.owner == len(problem.groups)).nonzero()[:, 0]
    turned = problem.groups.flip(0)
    order = torch.cat([free, turned[turned >= 0]])
    matrix, scale = standardize(r[order][:, order])
    half = torch.linalg.solve_triangular(
        cholesky(matrix, ridge), (problem.ryx[:, order] * scale).T, upper=False
    )
    explained = torch.cat([half.new_zeros(1), half.square().sum(dim=1).cumsum(0)])
    used = len(free) + (turned >= 0).sum(dim=1).cumsum(0)
    left = torch.cat([used.new_tensor([len(free)]), used[:-1]]).flip(0)
    return explained[left]


def _swept(problem: Reconstruction, ridge: float) -> Tensor:
    """The same, by taking out one channel after the other."""
    sweep = Sweep.removing(problem, 1.0, ridge)
    costs, first = [], 0
    for _ in range(len(problem.groups)):
        costs.append(sweep.take(first))
        first += 1
        if first > len(sweep) * COMPACT and first < len(sweep):
            sweep.keep(torch.arange(first, len(sweep), device=problem.ryx.device))
            first = 0
    return sweep.fitted - torch.stack(costs).cumsum(0)
