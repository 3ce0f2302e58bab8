"""The original network with the channels that a plan drops silenced: what a result must equal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxsvd.analysis import Parameter
from fxsvd.axes import TensorType
from fxsvd.capture import BATCH_HINT
from fxsvd.constants import MOVEMENTS
from fxsvd.dependency import Dependencies
from fxsvd.narrowing import Narrowing
from fxsvd.nests import attribute
from fxsvd.rewrite import add_bias
from fxsvd.rules import RULES, elementwise, normalization, reduction
from fxsvd.running import doubled
from fxsvd.survivors import SURVIVING

LAYER_NORMS: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    nn.LayerNorm: ("layer_norm", ("normalized_shape", "weight", "bias", "eps")),
    nn.RMSNorm: ("rms_norm", ("normalized_shape", "weight", "eps")),
    nn.GroupNorm: ("group_norm", ("num_groups", "weight", "bias", "eps")),
}
Values = dict[int, Tensor]


def silenced(
    deps: Dependencies, narrowing: Narrowing, values: Values, *, double: bool = True
) -> fx.GraphModule:
    """A copy of the graph, in the original's shapes, whose dropped channels are silent.

    Args:
        deps: the analysis of the original graph.
        narrowing: which channels stay.
        values: the numbers to use, by identity of the parameter or buffer.
        double: compute in float64.
    """
    memo: dict[int, Any] = {}
    divisors = _divisors(deps)
    for known in deps.analysis.parameters.values():
        value = narrowing.assigned(known, values[id(known.value)])
        value = _silence(narrowing, known, value, divisors)
        memo[id(known.value)] = like(known.value, value)
    graph: fx.GraphModule = copy.deepcopy(deps.analysis.graph, memo)
    graph = doubled(graph) if double else graph
    for node, original in zip(
        list(graph.graph.nodes), deps.analysis.graph.graph.nodes, strict=True
    ):
        _count_survivors(graph, node, original, deps, narrowing)
    for layer, (bias, stays) in narrowing.biases.items():
        add_bias(graph.get_submodule(layer), bias * torch.from_numpy(stays).to(bias.device))
    graph.recompile()
    return graph


def like(original: Tensor, value: Tensor) -> Tensor:
    """A parameter where the original is one."""
    if isinstance(original, nn.Parameter):
        return nn.Parameter(value, requires_grad=original.requires_grad)
    return value


def mask(model: nn.Module, deps: Dependencies, narrowing: Narrowing) -> nn.Module:
    """A copy of the model itself, same class and shapes, with the dropped channels silenced.

    Layer, RMS and group norm *layers* over a narrowed space count the channels that stay; norms
    that the model's own code calls as functions keep their statistics.
    """
    result = copy.deepcopy(model)
    tensors: dict[str, Tensor] = dict(result.named_parameters(remove_duplicate=False))
    tensors |= result.named_buffers(remove_duplicate=False)
    divisors = _divisors(deps)
    with torch.no_grad():
        for known in deps.analysis.parameters.values():
            if known.names[0] in tensors and narrowing.changes(known):
                value = narrowing.assigned(known, known.value.detach())
                value = _silence(narrowing, known, value, divisors)
                tensors[known.names[0]].copy_(value)
    for module in result.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # no fused path, which would pass the norms by
    for node, t in deps.analysis.types.items():
        if node.op == "call_module" and isinstance(t, TensorType) and narrowing.touches(t):
            _patch_norm(result.get_submodule(str(node.target)), _Mask(t, narrowing))
    return result


def _silence(
    narrowing: Narrowing, known: Parameter, value: Tensor, divisors: dict[int, list[int]]
) -> Tensor:
    """Zeros where something goes; ones where it divides, lest 0 / 0 spread over the network."""
    value = narrowing.silence(value, known.type)
    for dim in divisors.get(id(known.value), ()):
        dead = torch.from_numpy(np.flatnonzero(~narrowing.along(known.type, dim)))
        value = value.index_fill(dim, dead.to(value.device), 1.0)
    return value


def _divisors(deps: Dependencies) -> dict[int, list[int]]:
    """Axes of parameters (by identity) along which zeros would divide: x / s, and v / ‖v‖."""
    out: dict[int, list[int]] = {}
    for node in deps.analysis.types:
        rule = RULES.get(node.target)
        divides = rule in (elementwise.div, normalization.weight_norm) and len(node.args) > 1
        source = node.args[1 if rule is elementwise.div else 0] if divides else None
        while isinstance(source, fx.Node) and _carries_zero(source):
            (source,) = source.all_input_nodes
        if isinstance(source, fx.Node) and source.op == "get_attr":
            value = attribute(deps.analysis.graph, str(source.target))
            last: Any = node.args[2] if len(node.args) > 2 else 0
            dims = list(range(value.dim())) if rule is elementwise.div else [last]
            out.setdefault(id(value), []).extend(dims)
    return out


def _carries_zero(node: fx.Node) -> bool:
    """Whether a node makes zeros of its one input's zeros (``x + eps`` does not)."""
    rule = RULES.get(node.target)
    moves = getattr(rule, "__module__", "") in MOVEMENTS
    keeps = rule in (elementwise.keeps_zero, elementwise.power, reduction.total)
    return len(node.all_input_nodes) == 1 and (moves or keeps)


def _patch_norm(module: nn.Module, survivors: _Mask) -> None:
    if isinstance(module, tuple(LAYER_NORMS)):
        module.forward = partial(_norm_forward, module, survivors)


def _norm_forward(module: nn.Module, survivors: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    name, fields = next(v for k, v in LAYER_NORMS.items() if isinstance(module, k))
    out: Tensor = SURVIVING[name](x, survivors(x), *(getattr(module, f) for f in fields))
    return out


def _count_survivors(
    graph: fx.GraphModule,
    node: fx.Node,
    original: fx.Node,
    deps: Dependencies,
    narrowing: Narrowing,
) -> None:
    """Replace a norm or statistic over a narrowed tensor by its version over the survivors."""
    if node.op not in ("call_function", "call_method", "call_module") or not node.args:
        return
    source = original.args[0]
    t = deps.analysis.types.get(source) if isinstance(source, fx.Node) else None
    if not isinstance(t, TensorType) or not narrowing.touches(t):
        return
    name, rest = statistic(graph, node)
    if name is None:
        return
    mask = _Mask(t, narrowing)
    with graph.graph.inserting_before(node):
        made = graph.graph.call_function(mask, (node.args[0],))
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        node.op, node.target = "call_function", _NormOver(module)
        node.args = (made, node.args[0])
    else:
        node.op, node.target = "call_function", SURVIVING[name]
        node.args = (node.args[0], made, *rest)


def statistic(graph: fx.GraphModule, node: fx.Node) -> tuple[str | None, tuple[Any, ...]]:
    """The norm or statistic that a node takes (a key of ``SURVIVING``), and its other arguments."""
    if node.op == "call_module":
        kind = type(graph.get_submodule(str(node.target)))
        return next((n for k, (n, _) in LAYER_NORMS.items() if issubclass(kind, k)), None), ()
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    name = "torch.batch_norm" if node.target is torch.batch_norm else name  # other arguments
    two = len(node.args) > 1 and isinstance(node.args[1], fx.Node) and name in ("max", "min")
    return (name if name in SURVIVING and not two else None), tuple(node.args[1:])


class _NormOver:
    """A norm layer over the channels that stay, as a function for a graph."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.__name__ = self.__qualname__ = "norm_over_survivors"
        self.__module__ = __name__

    def __call__(self, mask: Tensor, x: Tensor) -> Tensor:
        return _norm_forward(self.module, lambda _: mask, x)


class _Mask:
    """Which entries of a tensor stay, for any batch size."""

    def __init__(self, t: TensorType, narrowing: Narrowing) -> None:
        self.masks = [narrowing.mask(t, block) for block in t.blocks]
        self.__name__ = self.__qualname__ = "survivors"
        self.__module__ = __name__

    def __call__(self, x: Tensor) -> Tensor:
        out = torch.ones((), dtype=torch.bool, device=x.device)
        for mask in self.masks:
            out = out & _fit(mask.to(x.device), x.shape)
        return out.expand(x.shape)


def _fit(mask: Tensor, shape: torch.Size) -> Tensor:
    """A mask made at the batch hint, for another batch (folded in front of its dimension)."""
    for dim, (have, want) in enumerate(zip(mask.shape, shape, strict=True)):
        if have not in (1, want):
            one = mask.narrow(dim, 0, have // BATCH_HINT)
            mask = one.repeat(
                *(want // one.shape[dim] if d == dim else 1 for d in range(mask.dim()))
            )
    return mask
