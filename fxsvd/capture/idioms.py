"""Idioms that mean one operation, written as that operation.

A channel shuffle written by hand, ``x.view(b, g, c // g, h, w).transpose(1, 2).flatten(1, 2)``,
needs groups of equal size at each step, although all it does is put channels in another order. As
``channel_shuffle`` the intermediate shapes are gone.
"""

from __future__ import annotations

from torch import Tensor, fx
from torch.nn import functional as F

from fxsvd.capture.batch import concrete

_VIEWS = ("view", "reshape", "flatten", "unflatten")
_TURNS = ("transpose", "permute", "swapaxes", "swapdims")


def name_shuffles(graph: fx.Graph) -> None:
    """Replace each hand-written channel shuffle by ``F.channel_shuffle``."""
    for last in list(graph.nodes):
        chain = _chain(last)
        if chain is None or (groups := _groups(*chain)) is None:
            continue
        source = chain[0]
        with graph.inserting_before(last):
            node = graph.call_function(F.channel_shuffle, (source, groups))
        node.meta = dict(last.meta)
        last.replace_all_uses_with(node)
        for step in reversed(chain[1:]):
            sizes = [n for n in step.all_input_nodes if n.target == "size"]
            graph.erase_node(step)
            for size in sizes:
                _erase_unused(graph, size)


def _erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    if not node.users:
        graph.erase_node(node)


def _chain(last: fx.Node) -> tuple[fx.Node, ...] | None:
    """(source, split, turned, …, last) where each step is used by the next alone."""
    if _name(last) not in _VIEWS:
        return None
    turned = last.args[0]
    copies = []
    while isinstance(turned, fx.Node) and _name(turned) == "contiguous":
        copies.append(turned)
        turned = turned.args[0]
    if not isinstance(turned, fx.Node) or _name(turned) not in _TURNS:
        return None
    split = turned.args[0]
    if not isinstance(split, fx.Node) or _name(split) not in _VIEWS:
        return None
    source = split.args[0]
    steps = (split, turned, *reversed(copies))
    alone = all(len(step.users) == 1 for step in steps)
    return (source, *steps, last) if alone and isinstance(source, fx.Node) else None


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)) if node.op != "call_module" else ""


def _groups(*chain: fx.Node) -> int | None:
    """The number of groups, if the shapes are those of a shuffle of dimension 1."""
    source, split, turned, *_, last = (_shape(node) for node in chain)
    if source is None or split is None or len(split) != len(source) + 1 or last != source:
        return None
    groups, size = split[1], split[2]
    shuffled = (split[0], size, groups, *split[3:])
    same = split[0] == source[0] and split[3:] == source[2:] and groups * size == source[1]
    return groups if same and turned == shuffled and _swaps(chain[2]) else None


def _swaps(turned: fx.Node) -> bool:
    """Whether a step exchanges dimensions 1 and 2 (equal sizes would hide another order)."""
    rank = len(turned.meta["val"].shape)
    numbers = turned.args[1:] or tuple(turned.kwargs.values())
    flat = numbers[0] if isinstance(numbers[0], (tuple, list)) else numbers
    dims = [d % rank for d in flat if isinstance(d, int)]
    order = [0, 2, 1, *range(3, rank)]
    return sorted(dims) == [1, 2] if len(dims) == 2 else dims == order


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    value = node.meta.get("val")
    return tuple(map(concrete, value.shape)) if isinstance(value, Tensor) else None
