"""Branches of two layers around which a skip leads, found in a graph, and what they compose to."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn import functional as F

from fxsvd.data.readers import Reader
from fxsvd.folding.absorbing import affine, plain_norm
from fxsvd.layers import layer_of
from fxsvd.rotating.commuting import PER_SAMPLE
from fxsvd.rotating.edges import input_of
from fxsvd.rules.indexing import buffer_of
from fxsvd.rules.registry import spellings

POINTWISE: frozenset[Any] = frozenset(
    spellings(
        *("relu", "relu6", "leaky_relu", "rrelu", "elu", "celu", "selu", "gelu", "silu", "mish"),
        *("hardswish", "hardtanh", "tanh", "softplus", "sigmoid", "hardsigmoid", "clone"),
        *("dropout", "dropout1d", "dropout2d", "dropout3d", "contiguous", "identity"),
    )
)
TILES: frozenset[Any] = frozenset([operator.getitem, *spellings("repeat", "tile", "index_select")])


Step = Callable[[fx.GraphModule, fx.Node], bool]


def _pointwise(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node acts on every number for itself, and near one like a factor or nothing."""
    if len(node.all_input_nodes) != 1:
        return False
    if node.op != "call_module":
        return node.op in ("call_function", "call_method") and node.target in POINTWISE
    module = graph.get_submodule(str(node.target))
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    if type(module) is nn.Identity or type(module).__name__ in PER_SAMPLE:
        return True
    layer = layer_of(module)
    return plain_norm(graph, node) is not None or (layer is not None and layer.op in POINTWISE)


def _skips(graph: fx.GraphModule, node: fx.Node) -> bool:
    constant = all(n.op == "get_attr" for n in node.all_input_nodes[1:])
    tiles = node.target in TILES and bool(node.all_input_nodes) and constant
    return _pointwise(graph, node) or (tiles and node.op in ("call_function", "call_method"))


def _back(graph: fx.GraphModule, node: fx.Node, step: Step) -> Iterator[fx.Node]:
    """The node and those before it, as long as they are steps, and the first that is none."""
    while step(graph, node):
        yield node
        node = node.all_input_nodes[0]
    yield node


@dataclass(frozen=True, eq=False)
class Branch:
    """Two layers, and the skip around them.

    Attributes:
        layers: A and B.
        kernels: their weights in float64, times what batch norms around them multiply by.
        skip: what the skip makes of each channel, ``[out, in]``.
    """

    layers: tuple[Reader, Reader]
    kernels: tuple[Tensor, Tensor]
    skip: Tensor

    @classmethod
    def of(
        cls, graph: fx.GraphModule, plain: Mapping[fx.Node, Reader], end: Any, skip: Any
    ) -> Branch | None:
        """What is added to a skip, if it is such a branch.

        Args:
            graph: the captured graph.
            plain: linear layers and convolutions of stride 1 by their only call.
            end: the node with what the branch puts out.
            skip: the node with what it is added to.
        """
        *behind, last = _back(graph, end, _pointwise)
        if last not in plain:
            return None
        *between, first = _back(graph, input_of(last), _pointwise)
        if first not in plain or type(plain[first].module) is not type(plain[last].module):
            return None
        before = list(_back(graph, input_of(first), _pointwise))
        around = list(_back(graph, skip, _skips))
        source = next((node for node in before if node in around), None)
        if source is None:
            return None
        a, b = (plain[node].weight.value.detach().double() for node in (first, last))
        a = _times(
            _times(a, _gain(graph, before[: before.index(source)]), 1), _gain(graph, between), 0
        )
        b = _times(b, _gain(graph, behind), 0)
        identity = _identity(graph, around[: around.index(source)], a)
        found = cls((plain[first], plain[last]), (a, b), identity)
        fits = identity.shape == (len(b), a.shape[1]) and found.tap is not None
        return found if fits else None

    @property
    def tap(self) -> tuple[int, ...] | None:
        """The place in the composed kernel where a pixel meets itself; None where there is none."""
        one, two = (reader.module for reader in self.layers)
        if isinstance(one, nn.Linear):
            return ()
        tap = tuple(a + b for a, b in zip(_padding(one), _padding(two), strict=True))
        sizes = zip(tap, _reach(one), _reach(two), strict=True)
        return tap if all(place <= a + b for place, a, b in sizes) else None

    def operator(self) -> Tensor:
        """Id + B A, ``[out, in, *taps]``: what comes of an impulse, away from the borders."""
        whole = self._composed()
        index: Any = (slice(None), slice(None), *(self.tap or ()))
        whole[index] += self.skip
        return whole

    def _composed(self) -> Tensor:
        a, b = self.kernels
        if a.dim() == 2:
            return b @ a
        first, last = (_spread(w, r.module) for w, r in zip(self.kernels, self.layers, strict=True))
        dims = tuple(range(2, b.dim()))
        convolve = getattr(F, f"conv{len(dims)}d")
        padding = [size - 1 for size in last.shape[2:]]
        out: Tensor = convolve(first.transpose(0, 1), last.flip(dims), padding=padding)
        return out.transpose(0, 1).contiguous()


def _gain(graph: fx.GraphModule, nodes: list[fx.Node]) -> Tensor | None:
    """What the batch norms among some nodes multiply by, all in all."""
    out = None
    for node in nodes:
        norm = plain_norm(graph, node)
        if norm is not None:
            scale = affine(graph.get_submodule(norm))[0]
            out = scale if out is None else out * scale
    return out


def _identity(graph: fx.GraphModule, nodes: list[fx.Node], first: Tensor) -> Tensor:
    """What nodes of a skip (the last one first) make of each channel that A reads."""
    width = first.shape[1]
    x = torch.eye(width, dtype=torch.float64, device=first.device)
    x = x.reshape(width, width, *[1] * (first.dim() - 2))
    for node in reversed(nodes):
        if node.target in TILES:
            target: Any = node.target
            run = target if callable(target) else getattr(torch.Tensor, target)
            x = run(x, *map_arg(node.args[1:], buffer_of), **map_arg(node.kwargs, buffer_of))
        else:
            x = _times(x, _gain(graph, [node]), 1)
    return x.flatten(1).T


def _times(weight: Tensor, gain: Tensor | None, dim: int) -> Tensor:
    if gain is None:
        return weight
    shape = [-1 if d == dim else 1 for d in range(weight.dim())]
    return weight * gain.to(weight.device).reshape(shape)


def _reach(layer: Any) -> list[int]:
    return [d * (k - 1) for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]


def _padding(layer: Any) -> list[int]:
    """Zeros in front."""
    if isinstance(layer.padding, str):
        return [n // 2 if layer.padding == "same" else 0 for n in _reach(layer)]
    return list(layer.padding)


def _spread(weight: Tensor, layer: Any) -> Tensor:
    """A kernel with the holes of its dilation."""
    out = weight.new_zeros(*weight.shape[:2], *(n + 1 for n in _reach(layer)))
    out[(slice(None), slice(None), *(slice(None, None, d) for d in layer.dilation))] = weight
    return out
