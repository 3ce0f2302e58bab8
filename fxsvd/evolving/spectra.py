"""Singular values of what writes a space: how many directions its channels really have."""

from __future__ import annotations

import torch
from torch import Tensor

from fxsvd.analysis import Site
from fxsvd.dependency import Dependencies
from fxsvd.relations import runs
from fxsvd.spaces import Space


def spectrum(deps: Dependencies, space: Space) -> Tensor:
    """The singular values of all writers of a space side by side, largest first.

    Args:
        deps: what ``fxsvd.analyze`` found.
        space: one of its spaces.

    Returns:
        At most as many as there are channels, float64. None at all where no matrix of one group
        writes the space; NaN where its numbers are not finite.

    >>> from torch import nn
    >>> from fxsvd.capture import capture
    >>> from fxsvd.dependency import analyze
    >>> net = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 1))
    >>> _ = nn.init.eye_(net[0].weight)
    >>> deps = analyze(capture(net, torch.zeros(2, 4)))
    >>> spectrum(deps, deps.spaces[0])
    tensor([1., 1.], dtype=torch.float64)
    """
    known = {p.names[0]: p.value.detach() for p in deps.analysis.parameters.values()}
    sides = [_rows(deps, space, site, known[site.tensor]) for site in space.producers]
    found = [side for side in sides if side is not None]
    if not found:
        return torch.zeros(0, dtype=torch.float64)
    rows = torch.cat(found, dim=1)
    if not bool(rows.isfinite().all()):
        return rows.new_full((min(rows.shape),), torch.nan)
    gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
    values: Tensor = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0)
    return values


def smallest_share(values: Tensor, width: int) -> float:
    """σ_min / Σσ: what the weakest of a space's directions says, in [0, 1 / width].

    Args:
        values: singular values, largest first.
        width: how many directions there could be; those that are missing have none.

    >>> smallest_share(torch.tensor([3.0, 1.0]), 2), smallest_share(torch.tensor([3.0, 1.0]), 3)
    (0.25, 0.0)
    """
    whole = float(values.sum())
    if len(values) < width or whole == 0:
        return 0.0
    return float(values[-1]) / whole


def effective_rank(values: Tensor) -> float:
    """exp(−Σ p log p) with p = σ / Σσ: as many equal directions would say as much.

    O. Roy, M. Vetterli, *The effective rank*, 2007.

    >>> effective_rank(torch.tensor([2.0, 2.0, 0.0])), effective_rank(torch.zeros(2))
    (2.0, 0.0)
    """
    whole = float(values.sum())
    if whole == 0:
        return 0.0
    return float(torch.special.entr(values.double() / whole).sum().exp())


def _rows(deps: Dependencies, space: Space, site: Site, value: Tensor) -> Tensor | None:
    """A writer's weight ``[channels, rest]`` in the order of the space; None for a bias."""
    if value.dim() < 2 or site.atoms.ndim > 1:
        return None
    channels = deps.channels.of[site.atoms]
    order, low, times = runs(channels, space.channels)
    first = order[low.clip(max=len(order) - 1)]
    matrix = value.double().movedim(site.dim, 0).flatten(1)[torch.from_numpy(first)]
    missing = torch.from_numpy(times == 0)
    return matrix.masked_fill(missing.unsqueeze(1).to(matrix.device), 0)
