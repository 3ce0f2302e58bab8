"""Meaning layers by name: paths, glob patterns, enclosing modules, or module objects."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeVar

from torch import fx

from fxsvd.naming import Name, Names, listed, means, paths_of, require_known

Value = TypeVar("Value")


def layers_named(graph: fx.GraphModule, layers: Collection[str], names: Names) -> set[str]:
    """Those of the layers that any of the names means.

    Args:
        graph: the network; a name may mean any module of it, also one that is no such layer.
        layers: paths to choose from.
        names: see above.

    Raises:
        PlanError: a name means nothing in this network; near names are suggested.

    >>> from torch import nn
    >>> graph = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    >>> layers_named(graph, ["0"], ["*"]), layers_named(graph, ["0"], ["1"])
    ({'0'}, set())
    """
    return {layer for name in listed(names) for layer in _meant(graph, layers, name)}


def chosen_layers(
    graph: fx.GraphModule, layers: Collection[str], only: Names, ignore: Names
) -> dict[str, str]:
    """Why layers stay that the options leave out: by layer, in words.

    Args:
        graph: the network.
        layers: paths to choose from.
        only: names of those that are meant; all where there is none.
        ignore: names of those that are not.

    Raises:
        PlanError: a name means nothing in this network.

    >>> from torch import nn
    >>> graph = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    >>> chosen_layers(graph, ["0", "1"], only=["1"], ignore=[])
    {'0': 'not in `only`'}
    """
    wanted, unwanted = listed(only), layers_named(graph, layers, ignore)
    meant = layers_named(graph, layers, wanted) if wanted else set(layers)
    why = {layer: "not in `only`" for layer in layers if layer not in meant}
    return why | {layer: "in `ignore`" for layer in layers if layer in unwanted}


def value_by_layer(
    graph: fx.GraphModule, layers: Collection[str], values: Value | Mapping[str, Value]
) -> dict[str, Value]:
    """A value per layer: the same for all, or from a mapping whose first match counts.

    Raises:
        PlanError: a pattern means nothing in this network.

    >>> from torch import nn
    >>> graph = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    >>> value_by_layer(graph, ["0", "1"], {"1": 5, "*": 7})
    {'1': 5, '0': 7}
    """
    if not isinstance(values, Mapping):
        return dict.fromkeys(layers, values)
    out: dict[str, Value] = {}
    for name, value in values.items():
        for layer in _meant(graph, layers, name):
            out.setdefault(layer, value)
    return out


def _meant(graph: fx.GraphModule, layers: Collection[str], name: Name) -> list[str]:
    patterns = [name] if isinstance(name, str) else paths_of(graph, name)
    found = [path for path in layers if any(means(pattern, path) for pattern in patterns)]
    if not found:
        modules = [path for path, _ in graph.named_modules() if path]
        require_known(graph, patterns, modules, "layer")
    return found
