"""Channels whose copies something in the graph would notice, with the reason in words."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
from torch import fx
from torch.nn import functional as F

from fxsvd.analysis import Parameter
from fxsvd.axes import TensorType, dimension
from fxsvd.dependency import Dependencies
from fxsvd.narrowing import Mask
from fxsvd.reference import statistic
from fxsvd.relations import Atoms
from fxsvd.rules import RULES, normalization
from fxsvd.rules.indexing import entries
from fxsvd.rules.reduction import SUMS
from fxsvd.widening import Counts

ACROSS = ("layer_norm", "rms_norm", "group_norm")
REDUCTIONS = (*SUMS, F.cosine_similarity)
STATISTIC = "takes a statistic over channels"
TOTAL = "adds up over channels"
SHARED = "is used in two places"


def obstacles(
    deps: Dependencies, counts: Counts, alike: Mask, streams: Collection[int] = ()
) -> dict[int, str]:
    """Why channels cannot get copies: by channel, the first reason that is met.

    Args:
        deps: what ``fxsvd.analyze`` found.
        counts: how often every channel is to be there.
        alike: by channel, whether its copies compute what it does: a mean over equally many of all
            such channels stays what it was.
        streams: spaces that grow such that norms over them, and weights that are used twice, give
            what they did (``fxsvd.growing.streams``).

    >>> import torch
    >>> from torch import nn
    >>> from fxsvd.capture import capture
    >>> from fxsvd.dependency import analyze
    >>> net = nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2), nn.Linear(2, 1))
    >>> deps = analyze(capture(net, torch.zeros(2, 4)))
    >>> counts, alike = (np.full(deps.channels.count, value) for value in (2, True))
    >>> obstacles(deps, counts, alike), set(obstacles(deps, counts, ~alike).values())
    ({}, {'`_1` takes a statistic over channels'})
    """
    out: dict[int, str] = {}
    followed = np.isin(deps.space_of, list(streams))
    for known in _shared(deps):
        touched = np.concatenate(_all(deps, known.type))
        for channel in touched[(counts[touched] > 1) & ~followed[touched]].tolist():
            out[channel] = f"`{known.names[0]}` {SHARED}"
    for node, source, why in _noticing(deps):
        channels = np.unique(np.concatenate(_all(deps, source)))
        even = alike[channels].all() and len(set(counts[channels].tolist())) == 1
        same = followed[channels[counts[channels] > 1]].all() or (even and why == STATISTIC)
        if why not in (STATISTIC, TOTAL) or source.stored or not same:
            for channel in channels[counts[channels] > 1].tolist():
                out.setdefault(channel, f"`{node.name}` {why}")
    return out


def passable(deps: Dependencies, counts: Counts, alike: Mask) -> list[int]:
    """The spaces that would grow but for norms over them, or weights that are used twice.

    Args:
        deps: what ``fxsvd.analyze`` found.
        counts: how often every channel is to be there.
        alike: as for ``obstacles``.

    >>> import torch
    >>> from torch import nn
    >>> from fxsvd.capture import capture
    >>> from fxsvd.dependency import analyze
    >>> net = nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2), nn.Linear(2, 1))
    >>> deps = analyze(capture(net, torch.zeros(2, 4)))
    >>> passable(deps, np.full(deps.channels.count, 2), np.zeros(deps.channels.count, dtype=bool))
    [0]
    """
    met = obstacles(deps, counts, alike).items()
    numbers = {int(deps.space_of[c]) for c, why in met if why.endswith((STATISTIC, TOTAL, SHARED))}
    return sorted(numbers - {-1})


def _shared(deps: Dependencies) -> Iterator[Parameter]:
    """Weights of two layers, or of a layer and of the code around it."""
    graph = deps.analysis.graph
    layers = {str(n.target) for n in graph.graph.nodes if n.op == "call_module"}
    read = {str(n.target) for n in graph.graph.nodes if n.op == "get_attr"}
    for known in deps.analysis.parameters.values():
        inside = any(name in read and name.rpartition(".")[0] in layers for name in known.names)
        if known.type.blocks and (inside or len(known.names) > 1):
            yield known


def _noticing(deps: Dependencies) -> Iterator[tuple[fx.Node, TensorType, str]]:
    """Nodes that see how many channels there are, or in which order; their input; what they do."""
    graph, types = deps.analysis.graph, deps.analysis.types
    for node, out in types.items():
        first = node.args[0] if node.args else None
        source = types.get(first) if isinstance(first, fx.Node) else None
        if not isinstance(source, TensorType) or not source.blocks:
            continue
        if RULES.get(node.target) is normalization.weight_norm or _normalizes(node, source):
            yield node, source, "takes a norm over channels"
        elif _over_channels(deps, graph, node, source, out):
            yield node, source, TOTAL if node.target in SUMS else STATISTIC
        elif _reorders(node, source):
            yield node, source, "takes a strided slice of channels, or turns them round"


def _over_channels(
    deps: Dependencies, graph: fx.GraphModule, node: fx.Node, source: TensorType, out: object
) -> bool:
    if node.op not in ("call_function", "call_method", "call_module"):
        return False
    name, _ = statistic(graph, node)
    if name in ACROSS:
        return True
    if name is None and node.target not in REDUCTIONS:
        return False
    if name is not None and "batch_norm" in name:
        return any(d != 1 for d in _dims(source))
    left = [b.atoms.ravel() for b in out.blocks] if isinstance(out, TensorType) else []
    after = deps.channels.of[np.concatenate(left)] if left else np.zeros(0, dtype=np.int64)
    before = np.concatenate(_all(deps, source))
    return not bool(np.isin(before, after).all())


def _normalizes(node: fx.Node, source: TensorType) -> bool:
    if node.target is not F.normalize:
        return False
    dim: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 1)
    return dimension(dim, len(source.shape)) in _dims(source)


def _reorders(node: fx.Node, source: TensorType) -> bool:
    dims = _dims(source)
    if node.target is operator.getitem:
        parts = entries(node.args[1], len(source.shape))
        strided = [d for d, p in parts if isinstance(p, slice) and p.step not in (None, 1)]
        return bool(set(strided) & set(dims))
    if getattr(node.target, "__name__", node.target) != "flip":
        return False
    turned = node.args[1] if len(node.args) > 1 else node.kwargs["dims"]
    listed = turned if isinstance(turned, (tuple, list)) else [turned]
    return any(dimension(int(d), len(source.shape)) in dims for d in listed)  # type: ignore[arg-type]


def _dims(t: TensorType) -> list[int]:
    return sorted({d for block in t.blocks for d in block.dims})


def _all(deps: Dependencies, t: TensorType) -> list[Atoms]:
    return [deps.channels.of[block.atoms.ravel()] for block in t.blocks]
