"""Calls that a stream passes through: linear maps with a stored weight, and norms over channels."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from fxsvd.layers import layer_of
from fxsvd.rotating.commuting import SCALINGS
from fxsvd.rules.registry import spellings

SQUARES = frozenset(spellings("square"))
POWERS = frozenset([operator.pow, *spellings("pow")])
CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
LAYER_NORMS = (nn.LayerNorm, F.layer_norm, torch.layer_norm)
RMS_NORMS = (nn.RMSNorm, F.rms_norm, torch.rms_norm)


@dataclass(frozen=True, eq=False)
class Map:
    """A linear map.

    Attributes:
        input: what it is given; None for rows looked up by number.
        weight: the path of its weight.
        bias: the path of its bias, which may not be there.
        into: the weight's dimension that is contracted with the input.
        out: the weight's dimension that becomes the result's.
    """

    input: fx.Node | None
    weight: str
    bias: str
    into: int
    out: int


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm over the last dimensions.

    Attributes:
        input: what it is given.
        weight: the path of its gain, which may not be there.
        bias: likewise.
        shape: the sizes of the dimensions.
        centred: whether it subtracts the mean.
    """

    input: fx.Node
    weight: str
    bias: str
    shape: tuple[Any, ...]
    centred: bool


def map_of(graph: fx.GraphModule, node: fx.Node) -> Map | None:
    """The linear map that a node is, if it is one whose weight is a parameter.

    >>> from fxsvd.capture import capture
    >>> graph = capture(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), torch.zeros(1, 2))
    >>> [map_of(graph, n).weight for n in graph.graph.nodes if map_of(graph, n)]
    ['0.weight']
    """
    if node.op == "call_module":
        return _layer(graph.get_submodule(str(node.target)), node)
    given = [_path(argument(node, i, n)) for i, n in enumerate(("input", "weight", "bias"))]
    first, second = (argument(node, i, n) for i, n in ((0, "input"), (1, "weight")))
    if node.target is F.linear and given[1]:
        return Map(first, given[1], given[2], 1, 0)
    if node.target is F.embedding and given[1] and len(node.args) < 4:
        return Map(None, given[1], "", 0, 1)
    plain = node.target is torch.addmm and len(node.args) == 3 and not node.kwargs
    if plain and _path(node.args[2]) and isinstance(second, fx.Node):
        return Map(second, _path(node.args[2]), given[0], 0, 1)
    return None


def _layer(module: nn.Module, node: fx.Node) -> Map | None:
    layer = layer_of(module)
    if layer is None or _hooked(module):
        return None
    weight, bias = f"{node.target}.weight", f"{node.target}.bias"
    if layer.op is F.embedding and getattr(module, "max_norm", None) is None:
        return Map(None, weight, "", 0, 1)
    dense = layer.op is F.linear or (layer.op in CONVOLUTIONS and module.groups == 1)
    source = argument(node, 0, "input")
    return Map(source, weight, bias, 1, 0) if dense and isinstance(source, fx.Node) else None


def norm_of(graph: fx.GraphModule, node: fx.Node) -> Norm | None:
    """The layer or RMS norm that a node is, if it is one.

    >>> from fxsvd.capture import capture
    >>> graph = capture(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)), torch.zeros(1, 2))
    >>> [norm_of(graph, n).shape for n in graph.graph.nodes if norm_of(graph, n)]
    [(3,)]
    """
    source = argument(node, 0, "input")
    if not isinstance(source, fx.Node):
        return None
    if node.op == "call_module":
        module: Any = graph.get_submodule(str(node.target))
        if type(module) not in (nn.LayerNorm, nn.RMSNorm) or _hooked(module):
            return None
        paths = (f"{node.target}.weight", f"{node.target}.bias")
        return Norm(source, *paths, tuple(module.normalized_shape), type(module) in LAYER_NORMS)
    if node.target not in (*LAYER_NORMS, *RMS_NORMS):
        return None
    centred, shape = node.target in LAYER_NORMS, argument(node, 1, "normalized_shape")
    bias = argument(node, 3, "bias") if centred else None
    return Norm(source, _path(argument(node, 2, "weight")), _path(bias), tuple(shape), centred)


def argument(node: fx.Node, place: int, name: str) -> Any:
    """An argument by place or name; None where it is not given.

    >>> graph = fx.symbolic_trace(nn.ReLU()).graph
    >>> [str(argument(node, 0, "input")) for node in graph.nodes if node.op != "placeholder"]
    ['input_1', 'relu']
    """
    return node.args[place] if len(node.args) > place else node.kwargs.get(name)


def drops(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is drop-out, which is random in train mode and nothing else.

    >>> graph = fx.symbolic_trace(nn.Sequential(nn.Dropout()))
    >>> [drops(graph, node) for node in graph.graph.nodes]
    [False, True, False]
    """
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        return isinstance(module, nn.modules.dropout._DropoutNd)
    return node.target is F.dropout


def squares(node: fx.Node) -> bool:
    """Whether a node squares its input.

    >>> [squares(n) for n in fx.symbolic_trace(lambda x: x.pow(2) + x * x + x**3).graph.nodes]
    [False, True, True, False, False, False, False]
    """
    twice = len(node.args) == 2 and node.args[0] is node.args[1]
    if node.target in SCALINGS:
        return twice
    by_two = argument(node, 1, "exponent") == 2
    return node.target in SQUARES or (node.target in POWERS and by_two)


def _path(value: Any) -> str:
    return str(value.target) if isinstance(value, fx.Node) and value.op == "get_attr" else ""


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
