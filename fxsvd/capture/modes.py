"""Merges what train mode does differently into the graph of eval mode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from fxsvd.capture.fakes import Fakes
from fxsvd.capture.inputs import PLAIN_TYPES
from fxsvd.capture.run import trace
from fxsvd.capture.switch import Switch
from fxsvd.errors import CaptureError


class _Differs(Exception):  # noqa: N818 (a signal inside this file, not an error)
    """Where the structures of the eval and the train graph part."""


def merge_train_mode(
    model: nn.Module, fakes: Fakes, args: Any, kwargs: Any, graph: fx.Graph
) -> tuple[str | None, dict[str, Switch]]:
    """Adds to an eval graph what train mode does differently.

    Returns:
        Why it is impossible, or None, and the switches that the graph now calls, by name.
    """
    try:
        trained = trace(model, fakes, args, kwargs, training=True)
        fakes.ensure_dynamic()
        differences = _differences(graph, trained.graph)
    except (CaptureError, _Differs) as error:
        return str(error), {}
    switches: dict[str, Switch] = {}
    for node, path, eval_value, train_value in differences:
        switch = _switch_node(node, Switch(train_value, eval_value), switches)
        args_and_kwargs = _replace((node.args, node.kwargs), path, switch)
        node.args, node.kwargs = args_and_kwargs
    return None, switches


def _differences(
    graph: fx.Graph, other: fx.Graph
) -> list[tuple[fx.Node, tuple[Any, ...], Any, Any]]:
    """Lists the constants in which two graphs differ: node, path in its arguments, both values."""
    found: list[tuple[fx.Node, tuple[Any, ...], Any, Any]] = []
    nodes, others = list(graph.nodes), list(other.nodes)
    twins = dict(zip(others, nodes, strict=False))
    for node, twin in zip(nodes, others, strict=False):
        if (node.op, node.target) != (twin.op, twin.target):
            raise _Differs(f"{node.name} in eval mode is {twin.name} in train mode")
        pair = (node.args, node.kwargs), (twin.args, twin.kwargs)
        for path, ours, theirs in _leaves(*pair, twins, node):
            found.append((node, path, ours, theirs))
    if len(nodes) != len(others):
        raise _Differs(f"{len(nodes)} operations in eval mode, {len(others)} in train mode")
    return found


def _entries(value: Any) -> dict[Any, Any] | None:
    """The items of a container by key or position, or None."""
    if isinstance(value, (tuple, list)):
        return dict(enumerate(value))
    return value if isinstance(value, dict) else None


def _leaves(
    ours: Any, theirs: Any, twins: dict[fx.Node, fx.Node], node: fx.Node, path: Any = ()
) -> Iterator[tuple[tuple[Any, ...], Any, Any]]:
    items, others = _entries(ours), _entries(theirs)
    if isinstance(ours, fx.Node) or isinstance(theirs, fx.Node):
        if twins.get(theirs) is not ours:
            raise _Differs(f"{node.name} has other inputs in train mode")
    elif items is not None and others is not None and items.keys() == others.keys():
        for key, item in items.items():
            yield from _leaves(item, others[key], twins, node, (*path, key))
    elif type(ours) is not type(theirs) or ours != theirs:
        if not isinstance(ours, PLAIN_TYPES) or not isinstance(theirs, PLAIN_TYPES):
            raise _Differs(f"{node.name} has other arguments in train mode")
        yield path, ours, theirs


def _switch_node(node: fx.Node, switch: Switch, switches: dict[str, Switch]) -> fx.Node:
    """Calls the switch before a node; equal switches are shared."""
    wanted = switch.extra_repr()
    call: fx.Node
    for call in node.graph.find_nodes(op="call_module", sort=False) if switches else ():
        known = switches.get(str(call.target))
        if known is not None and known.extra_repr() == wanted:
            return call
    name = f"_switch{len(switches)}"
    switches[name] = switch
    with node.graph.inserting_before(node):
        call = node.graph.call_module(name)
    call.meta.update(val=switch.eval_value, scope=node.meta["scope"])
    return call


def _replace(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Rebuilds nested tuples, lists and dicts with one item replaced."""
    if not path:
        return new
    items = dict(value) if isinstance(value, dict) else list(value)
    items[path[0]] = _replace(value[path[0]], path[1:], new)
    return tuple(items) if isinstance(value, tuple) else items
