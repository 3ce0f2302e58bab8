"""Channels over which two activations are multiplied: those of queries and keys, say."""

from __future__ import annotations

import operator
from collections import Counter
from functools import partial

import numpy as np
import torch
from torch import fx
from torch.nn import functional as F

from fxsvd.axes import TensorType
from fxsvd.dependency import Dependencies
from fxsvd.layers import BATCH_NORMS
from fxsvd.narrowing import Mask

LIKE = ("view_as", "reshape_as", "expand_as")
PRODUCTS = (torch.matmul, torch.bmm, operator.matmul, torch.baddbmm, torch.einsum, "matmul", "bmm")


def paired(deps: Dependencies) -> Mask:
    """By channel, whether it is summed over in a product of two activations.

    >>> from torch import nn
    >>> from fxsvd.capture import capture
    >>> from fxsvd.dependency import analyze
    >>> deps = analyze(capture(nn.Bilinear(2, 3, 4), (torch.zeros(2, 2), torch.zeros(2, 3))))
    >>> paired(deps).any()
    np.False_
    """
    out = np.zeros(deps.channels.count, dtype=bool)
    for node in deps.analysis.types:
        sides = [t for t in map(deps.analysis.types.get, _operands(node)) if _flows(t)]
        if len(sides) < 2:
            continue
        first, second = (_channels(deps, t) for t in sides[:2])
        out[np.intersect1d(first, second)] = True
    return out


def given(deps: Dependencies) -> set[int]:
    """Channels of values that no parameter writes: constants, and what is gathered from others.

    >>> from torch import nn
    >>> from fxsvd.capture import capture
    >>> from fxsvd.dependency import analyze
    >>> class Gate(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.a = nn.Linear(2, 3)
    ...     def forward(self, x):
    ...         return (self.a(x) * x[:, :1].expand(-1, 3)).sum(1)
    >>> deps = analyze(capture(Gate(), torch.zeros(4, 2)))
    >>> given(deps) == set(deps.spaces[0].channels.tolist())
    True
    """
    relations, of = deps.analysis.relations, deps.channels.of
    found = [of[atoms] for atoms in relations.given]
    apart = [(of[new], of[old]) for new, old in relations.copies]
    return {int(c) for c in np.concatenate([*found, *(a[a != b] for a, b in apart), []])}


def norms_behind(deps: Dependencies) -> dict[str, tuple[str, str]]:
    """By the weight of a layer, scale and shift of the batch norm that sees nothing but its output.

    Reshapes may lie between. A norm without a scale does not count.

    >>> from torch import nn
    >>> from fxsvd.capture import capture
    >>> from fxsvd.dependency import analyze
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    >>> norms_behind(analyze(capture(net, torch.zeros(2, 2))))
    {'0.weight': ('1.weight', '1.bias')}
    """
    graph, sites, of = deps.analysis.graph, deps.analysis.sites, deps.channels.of
    calls = [n for n in graph.graph.nodes if n.op == "call_module"]
    times, out = Counter(n.target for n in calls), dict[str, tuple[str, str]]()
    rows = {s.tensor: of[s.atoms].ravel() for s in sites if s.role != "consumer"}
    for node in filter(partial(_is_batch_norm, graph), calls):
        source = _source(node)
        weight, scale = f"{source.target}.weight", f"{node.target}.weight"
        alone = times[source.target] == 1 and _is_read_once(source)
        if alone and {weight, scale} <= rows.keys() and np.array_equal(rows[weight], rows[scale]):
            out[weight] = scale, f"{node.target}.bias"
    return out


def _source(node: fx.Node) -> fx.Node:
    """What a module's input comes from, behind functions that alone read it."""
    source, functions = node.all_input_nodes[0], ("call_method", "call_function")
    while source.op in functions and source.all_input_nodes and _is_read_once(source):
        source = source.all_input_nodes[0]
    return source


def _is_batch_norm(graph: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(graph.get_submodule(str(node.target)), BATCH_NORMS)


def _is_read_once(node: fx.Node) -> bool:
    """Whether one other node reads its numbers; some ask for the shape alone."""
    return sum(u.target not in LIKE or u.args[0] is node for u in node.users) == 1


def _operands(node: fx.Node) -> list[fx.Node]:
    if node.op not in ("call_function", "call_method"):
        return []
    known = node.target in PRODUCTS or node.target is F.scaled_dot_product_attention
    return node.all_input_nodes[:2] if known else []


def _flows(t: object) -> bool:
    return isinstance(t, TensorType) and bool(t.blocks) and not t.stored


def _channels(deps: Dependencies, t: object) -> np.ndarray:
    assert isinstance(t, TensorType)
    return np.concatenate([deps.channels.of[b.atoms.ravel()] for b in t.blocks])
