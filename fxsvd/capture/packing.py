"""A graph as plain data, which can be pickled, and back.

Pickled code would be traced again, which loses in-place operations; this keeps each node.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from torch import fx
from torch.fx.node import _get_qualified_name

from fxsvd.errors import FxsvdError


class _Ref(NamedTuple):
    """Stands for a node in a pickled graph."""

    name: str


class Packed(NamedTuple):
    """A node as plain data; functions are named by where they can be imported from."""

    op: str
    target: str
    args: Any
    kwargs: Any
    name: str
    scope: str


def pack(graph: fx.Graph) -> list[Packed]:
    """Turns a graph into plain data that can be pickled.

    Example:
        >>> from torch import nn
        >>> graph = fx.symbolic_trace(nn.ReLU()).graph
        >>> [node.target for node in unpack(pack(graph)).nodes]
        ['input', <function relu at ...>, 'output']
    """
    return [_packed(node) for node in graph.nodes]


def _packed(node: fx.Node) -> Packed:
    target = node.target if isinstance(node.target, str) else _get_qualified_name(node.target)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda other: _Ref(other.name))
    return Packed(node.op, target, args, kwargs, node.name, node.meta.get("scope", ""))


def unpack(nodes: list[Packed]) -> fx.Graph:
    """Makes the graph again; shapes are lost."""
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    for packed in nodes:
        target = _find(packed.target) if packed.op == "call_function" else packed.target
        args, kwargs = _restore((packed.args, packed.kwargs), made)
        node = graph.create_node(packed.op, target, args, kwargs, packed.name)
        node.meta["scope"] = packed.scope
        made[packed.name] = node
    return graph


def _restore(value: Any, made: dict[str, fx.Node]) -> Any:
    if isinstance(value, _Ref):
        return made[value.name]
    if isinstance(value, dict):
        return {key: _restore(item, made) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*_restore((value.start, value.stop, value.step), made))
    if isinstance(value, (tuple, list)):
        items = [_restore(item, made) for item in value]
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return items if isinstance(value, list) else tuple(items)
    return value


def _find(qualified_name: str) -> Any:
    """Finds an object by its dotted name, of which some leading part is a module."""
    parts = qualified_name.split(".") if "." in qualified_name else ["builtins", qualified_name]
    for size in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:size]))
        except ModuleNotFoundError:
            continue
        for name in parts[size:]:
            found = getattr(found, name)
        return found
    raise FxsvdError(f"cannot import {qualified_name}, which a pickled graph calls")
