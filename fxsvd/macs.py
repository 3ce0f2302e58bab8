"""Multiply-accumulates, counted operator by operator on a captured graph.

A multiply-accumulate (MAC) is two FLOPs. As in ``torch.utils.flop_counter``, contractions count
(convolutions, matrix products, attention, recurrent cells) and everything else is free. Nothing is
computed: rules see meta tensors, whose symbolic sizes are evaluated at the batch asked for.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from fxsvd.running import run_with

Rule: TypeAlias = Callable[..., int]
"""``rule(output, *args, **kwargs)``, with the operator's own arguments."""


def macs(graph: fx.GraphModule, batch: int = 1) -> int:
    """The multiply-accumulates of one forward pass of a captured graph.

    >>> from fxsvd.capture import capture
    >>> macs(capture(nn.Conv2d(3, 8, 3), torch.zeros(2, 3, 6, 6)))  # 8×4×4 outputs, 3×3×3 each
    3456
    """
    return sum(macs_by_node(graph, batch).values())


def macs_by_node(graph: fx.GraphModule, batch: int = 1) -> dict[fx.Node, int]:
    """The multiply-accumulates of every node that has some, in the graph's order.

    Functions without a row in ``FUNCTIONS`` are free; leaf layers without a row in ``LAYERS`` are
    counted by running them on meta tensors.

    >>> from fxsvd.capture import capture
    >>> graph = capture(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.zeros(5, 3))
    >>> {node.target: count for node, count in macs_by_node(graph).items()}
    {'0': 12}
    """
    counts = {node: _macs_of(graph, node, batch) for node in graph.graph.nodes}
    return {node: count for node, count in counts.items() if count}


def at_batch(value: Any, batch: int, device: str | None = None) -> Any:
    """A node's value with its symbolic sizes at ``batch``, and uninitialised tensors for tensors.

    Args:
        value: Tensors, sizes, constants, or tuples, lists and dicts of them.
        batch: Takes the place of the batch symbol, the only one that a captured graph has.
        device: Where the tensors are made, in place of their own device.

    >>> at_batch((torch.zeros(2, 3), 4), batch=1, device="meta")
    (tensor(..., device='meta', size=(2, 3)), 4)
    """
    if isinstance(value, Tensor):
        shape = at_batch(tuple(value.shape), batch)
        return torch.empty(shape, dtype=value.dtype, device=device or value.device)
    if isinstance(value, torch.SymInt):
        formula = value.node.expr
        return int(formula.xreplace(dict.fromkeys(formula.free_symbols, batch)))
    if isinstance(value, (tuple, list)):
        return tuple(at_batch(item, batch, device) for item in value)
    if isinstance(value, Mapping):
        return {name: at_batch(item, batch, device) for name, item in value.items()}
    return value


def _macs_of(graph: fx.GraphModule, node: fx.Node, batch: int) -> int:
    rule = _layer_rule(graph, node) if node.op == "call_module" else FUNCTIONS.get(node.target)
    if rule is None:
        return 0

    def value(operand: fx.Node) -> Any:
        if operand.op == "get_attr" and "val" not in operand.meta:
            return operator.attrgetter(str(operand.target))(graph)
        return at_batch(operand.meta.get("val"), batch, device="meta")

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
    return rule(value(node), *args, **kwargs)


def _layer_rule(graph: fx.GraphModule, node: fx.Node) -> Rule | None:
    layer = graph.get_submodule(str(node.target))
    for base in type(layer).__mro__:
        if base in LAYERS:
            return partial(LAYERS[base], layer)
    has_matrix = any(parameter.dim() > 1 for parameter in layer.parameters())
    return partial(_run_layer, layer) if has_matrix else None


# A convolution's weight is (out, in / groups, *kernel), a transposed one's is (in, out / groups,
# *kernel): weight.shape[1:] is what each output reads, or what each input writes.


def _conv(output: Tensor, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return output.numel() * weight.shape[1:].numel()


def _conv_transpose(output: Tensor, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return input.numel() * weight.shape[1:].numel()


def _matmul(output: Tensor, input: Tensor, *_: Any, **__: Any) -> int:
    return output.numel() * input.shape[-1]


def _add_matmul(output: Tensor, input: Tensor, left: Tensor, right: Tensor, **_: Any) -> int:
    return left.numel() * right.shape[-1]


def _attention(
    output: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> int:
    queries = query.shape[:-1].numel()
    return queries * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _recurrent(layer: nn.Module, output: Any, input: Tensor, *_: Any, **__: Any) -> int:
    matrices = sum(weight.numel() for weight in layer.parameters() if weight.dim() == 2)
    return input.shape[:-1].numel() * matrices


def _layer(rule: Rule) -> Rule:
    """The rule of a function, for the layer that calls it with its own weight."""
    return lambda layer, output, input, *_, **__: rule(output, input, layer.weight)


def _run(function: Callable[..., Any], output: Any, *args: Any, **kwargs: Any) -> int:
    """Counts by running on meta tensors, for what has no short closed form."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*args, **kwargs)
    return int(counter.get_total_flops()) // 2


def _run_layer(layer: nn.Module, output: Any, *args: Any, **kwargs: Any) -> int:
    return _run(run_with, output, layer, lambda t: t.detach().to("meta"), args, kwargs)


FUNCTIONS: dict[Any, Rule] = {
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _conv),
    **dict.fromkeys(
        (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), _conv_transpose
    ),
    **dict.fromkeys((F.linear, torch.matmul, torch.bmm, torch.mm, torch.mv), _matmul),
    **dict.fromkeys((operator.matmul, "matmul", "bmm", "mm", "mv"), _matmul),
    **dict.fromkeys((torch.addmm, torch.baddbmm, torch.addbmm), _add_matmul),
    **dict.fromkeys(("addmm", "addmm_", "baddbmm", "baddbmm_", "addbmm", "addbmm_"), _add_matmul),
    F.scaled_dot_product_attention: _attention,
    torch.einsum: partial(_run, torch.einsum),
    torch.tensordot: partial(_run, torch.tensordot),
    torch.linalg.multi_dot: partial(_run, torch.linalg.multi_dot),
    F.multi_head_attention_forward: partial(_run, F.multi_head_attention_forward),
}
"""What a function costs, or a method of a tensor, by its name."""

LAYERS: dict[type[nn.Module], Rule] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _layer(_conv)),
    **dict.fromkeys(
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _layer(_conv_transpose)
    ),
    nn.Linear: _layer(_matmul),
    **dict.fromkeys((nn.RNNBase, nn.RNNCellBase), _recurrent),
}
"""What a leaf layer costs, by its class or nearest base; the layer is the rule's first argument."""
