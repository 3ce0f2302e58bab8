"""Singular values of what writes a space: how many directions its channels really have."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fxsvd.analysis import Site
from fxsvd.dependency import Dependencies, Space
from fxsvd.rotating.edges import counted


def spectrum(deps: Dependencies, space: Space) -> Tensor:
    """The singular values of all writers of a space side by side, largest first.

    Args:
        deps: what ``fxsvd.analyze`` found.
        space: one of its spaces.

    Returns:
        At most as many as there are channels, float64.

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
    rows = torch.cat([side for side in sides if side is not None], dim=1)
    gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
    values: Tensor = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0)
    return values


def _rows(deps: Dependencies, space: Space, site: Site, value: Tensor) -> Tensor | None:
    """A writer's weight ``[channels, rest]`` in the order of the space; None for a bias."""
    if value.dim() < 2 or site.atoms.ndim > 1:
        return None
    channels = deps.channels.of[site.atoms]
    order = np.argsort(channels, kind="stable")
    low, times = counted(channels[order], space.channels)
    first = order[low.clip(max=len(order) - 1)]
    matrix = value.double().movedim(site.dim, 0).flatten(1)[torch.from_numpy(first)]
    missing = torch.from_numpy(times == 0)
    return matrix.masked_fill(missing.unsqueeze(1).to(matrix.device), 0)
