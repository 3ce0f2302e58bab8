"""Channels over which two activations are multiplied: those of queries and keys, say."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import product

import numpy as np
import torch
from torch import fx
from torch.nn import functional as F

from fxsvd.axes import Block, TensorType
from fxsvd.dependency import Dependencies
from fxsvd.layers import BATCH_NORMS
from fxsvd.narrowing import Mask
from fxsvd.relations import Atoms
from fxsvd.rules.joining import DIVISIONS

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
    for first, second in _factors(deps):
        out[_common(deps, first, second)] = True
    return out


def barred(deps: Dependencies) -> Mask:
    """By atom, whether no copy of its channel may write anything but zeros there.

    Of two factors one has to be zeros. Zeros that are written do not arrive behind a sigmoid, or a
    softmax over positions, so there it has to be the other one.

    >>> import torch
    >>> from torch import nn
    >>> from fxsvd.capture import capture
    >>> from fxsvd.dependency import analyze
    >>> class Linearized(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.q, self.k = nn.Linear(2, 3), nn.Linear(2, 3)
    ...     def forward(self, x):
    ...         return self.q(x) @ self.k(x).softmax(1).transpose(1, 2)
    >>> deps = analyze(capture(Linearized(), torch.zeros(1, 4, 2)))
    >>> writers = deps.spaces[0].producers
    >>> {site.tensor: bool(barred(deps)[site.atoms].all()) for site in writers}
    {'q.weight': True, 'k.weight': False}
    """
    of = deps.channels.of
    decided = np.zeros(deps.channels.count, dtype=bool)
    silent, loud = np.zeros(len(of), dtype=bool), np.zeros(len(of), dtype=bool)
    for first, second in _factors(deps):
        if first.zero != second.zero:
            quiet, other = (first, second) if first.zero else (second, first)
            decided[_common(deps, quiet, other)] = True
            silent[quiet.atoms], loud[other.atoms] = True, True
    out: Mask = decided[of] & (silent | ~loud)
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


def norms_behind(deps: Dependencies) -> dict[str, list[tuple[str, Atoms]]]:
    """By the weight of a layer, the batch norms that see nothing but its output, and which rows.

    Reshapes may lie between. A norm without a scale does not count.

    >>> from torch import nn
    >>> from fxsvd.capture import capture
    >>> from fxsvd.dependency import analyze
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    >>> norms_behind(analyze(capture(net, torch.zeros(2, 2))))
    {'0.weight': [('1', array([0, 1, 2]))]}
    """
    graph, of = deps.analysis.graph, deps.channels.of
    calls = [n for n in graph.graph.nodes if n.op == "call_module"]
    times, out = Counter(n.target for n in calls), dict[str, list[tuple[str, Atoms]]]()
    atoms = {s.tensor: s.atoms.ravel() for s in deps.analysis.sites if s.role != "consumer"}
    for node in filter(partial(_is_batch_norm, graph), calls):
        source, seen = _source(node), _seen(deps, node)
        if source is None or seen is None or times[source.target] > 1:
            continue
        weight, scale = (atoms.get(f"{n.target}.weight") for n in (source, node))
        if weight is None or scale is None or not np.isin(seen, weight).all():
            continue
        if np.array_equal(of[seen], of[scale]):
            rows = np.searchsorted(weight, seen)
            out.setdefault(f"{source.target}.weight", []).append((str(node.target), rows))
    return out


def _source(node: fx.Node) -> fx.Node | None:
    """The layer that a module's input comes from, behind functions; None if others read it too."""
    source = node.all_input_nodes[0]
    while _is_read_once(source):
        if source.op not in ("call_method", "call_function") or not source.all_input_nodes:
            return source
        part, source = source, source.all_input_nodes[0]
        if _is_part(part, source):
            source = source.all_input_nodes[0]
    return None


def _is_part(part: fx.Node, whole: fx.Node) -> bool:
    """Whether a node is one of the parts that another divides its input into, and they alone."""
    if whole.target not in DIVISIONS or {u.target for u in whole.users} != {operator.getitem}:
        return False
    places = [user.args[1] for user in whole.users]
    return all(isinstance(i, int) for i in places) and places.count(part.args[1]) == 1


def _seen(deps: Dependencies, node: fx.Node) -> Atoms | None:
    """The atoms over which a batch norm runs."""
    t = deps.analysis.types.get(node.all_input_nodes[0])
    return t.vector(1) if isinstance(t, TensorType) else None


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


def _factors(deps: Dependencies) -> Iterator[tuple[Block, Block]]:
    """What two activations that are multiplied hold their channels in."""
    types = deps.analysis.types
    for node in types:
        sides = [types.get(operand) for operand in _operands(node)]
        flowing = [t.blocks for t in sides if isinstance(t, TensorType) and not t.stored]
        if len(flowing) == 2:
            yield from product(*flowing)


def _common(deps: Dependencies, first: Block, second: Block) -> Atoms:
    return np.intersect1d(deps.channels.of[first.atoms], deps.channels.of[second.atoms])
