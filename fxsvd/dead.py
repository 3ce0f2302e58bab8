"""Channels that can go without changing a single output: nobody reads them, or they carry zeros."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from fxsvd.analysis import flatten
from fxsvd.dependency import Dependencies
from fxsvd.rules.reduction import SURVIVORS

Mask = npt.NDArray[np.bool_]
STATISTICS = frozenset(SURVIVORS) | {
    *(torch.nn.functional.layer_norm, torch.nn.functional.group_norm, torch.nn.functional.rms_norm),
    *(torch.layer_norm, torch.group_norm, torch.rms_norm),
}
STATISTIC_LAYERS = (torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.RMSNorm)


def dead_channels(deps: Dependencies) -> Mask:
    """Which channels are exactly removable.

    A channel is dead where all weights that read it are zero, or where all that write it (and every
    shift on its way) are zero and zero stays zero up to its readers. Channels that enter the
    statistics of a norm or a mean are never dead: their absence would be noticed.
    """
    unread, unwritten = (
        _silent(deps, "consumer"),
        _silent(deps, "producer") & _silent(deps, "shift"),
    )
    dead: Mask = (unread | (unwritten & ~_moved(deps))) & ~_counted(deps)
    return dead


def _silent(deps: Dependencies, role: str) -> Mask:
    """Channels that have entries of this role, all of them zero."""
    largest = np.zeros(deps.channels.count)
    seen = np.zeros(deps.channels.count, dtype=bool)
    by_name = {p.names[0]: p for p in deps.analysis.parameters.values()}
    for site in deps.analysis.sites:
        if _role(site.role, site.tensor) != role:
            continue
        known = by_name[site.tensor]
        block = next(b for b in known.type.blocks if b.atoms is site.atoms)
        other = [d for d in range(known.value.dim()) if d not in block.dims]
        value = known.value.detach().abs()
        top = (value.amax(other) if other else value).double().cpu().numpy()
        channel = deps.channels.of[block.atoms].ravel()
        np.maximum.at(largest, channel, np.nan_to_num(top, nan=np.inf).ravel())
        seen[channel] = True
    silent: Mask = (largest == 0) & (seen | (role == "shift"))
    return silent


def _role(role: str, tensor: str) -> str:
    shifts = tensor.rpartition(".")[2] in ("bias", "running_mean")
    return "shift" if role == "follower" and shifts else role


def _moved(deps: Dependencies) -> Mask:
    """Channels whose zeros become something else somewhere."""
    out = np.zeros(deps.channels.count, dtype=bool)
    for t in flatten(list(deps.analysis.types.values())):
        for block in t.blocks:
            if not block.zero:
                out[deps.channels.of[block.atoms].ravel()] = True
    return out


def _counted(deps: Dependencies) -> Mask:
    """Channels over which a norm or a mean takes statistics."""
    out = np.zeros(deps.channels.count, dtype=bool)
    graph = deps.analysis.graph
    for node in deps.analysis.types:
        layer = node.op == "call_module" and graph.get_submodule(str(node.target))
        if node.target in STATISTICS or isinstance(layer, STATISTIC_LAYERS):
            for t in flatten([deps.analysis.types[n] for n in node.all_input_nodes]):
                for block in t.blocks:
                    out[deps.channels.of[block.atoms].ravel()] = True
    return out
