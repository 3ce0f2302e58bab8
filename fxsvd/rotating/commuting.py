"""Which operations commute with every matrix across the channels of a space.

They do the same to each channel and mix none. Scalars per sample or position may multiply (they are
the same for all channels), sums need all their terms in the same basis, attention weights may mix
positions. A constant that is added or a drop-out of single channels may not: neither follows a
change of basis.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import fx, nn
from torch.nn import functional as F

from fxsvd.layers import BATCH_NORMS
from fxsvd.rules.registry import spellings

MOVES: frozenset[Any] = frozenset(
    [
        operator.getitem,
        operator.neg,
        *spellings(
            *("view", "reshape", "flatten", "unflatten", "permute", "transpose", "movedim", "t"),
            *("moveaxis", "swapaxes", "swapdims", "contiguous", "unsqueeze", "squeeze", "expand"),
            *("clone", "detach", "chunk", "split", "tensor_split", "unbind", "select", "narrow"),
            *("cat", "concat", "concatenate", "stack", "mean", "sum", "neg", "roll", "flip", "to"),
            *("float", "double", "half", "bfloat16", "repeat", "repeat_interleave", "expand_as"),
            *("view_as", "reshape_as", "avg_pool1d", "avg_pool2d", "avg_pool3d", "interpolate"),
            *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "identity"),
        ),
    ]
)
SUMS = frozenset(
    [operator.add, operator.sub, operator.iadd, operator.isub, *spellings("add", "sub", "subtract")]
)
SCALINGS = frozenset([operator.mul, operator.imul, *spellings("mul", "multiply")])
QUOTIENTS = frozenset(
    [operator.truediv, operator.itruediv, *spellings("div", "divide", "true_divide")]
)
PRODUCTS = frozenset([operator.matmul, *spellings("matmul", "bmm")])
LAYERS = (
    nn.Identity,
    *(nn.Flatten, nn.Unflatten, nn.Upsample, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)
PER_SAMPLE = ("DropPath", "StochasticDepth")  # a whole sample goes, whatever its basis


def why_not(graph: fx.GraphModule, node: fx.Node, holders: Sequence[fx.Node], stays: bool) -> str:
    """Why a node does not commute with changes of basis of a space; empty where it does.

    Args:
        graph: owns the node's layer.
        node: an operation on the space's channels, but no linear map of them.
        holders: its inputs that hold the channels.
        stays: whether its result holds them too.

    >>> graph = fx.symbolic_trace(nn.Sequential(nn.Identity(), nn.Tanh()))
    >>> x, same, bent, _ = graph.graph.nodes
    >>> why_not(graph, same, [x], True), why_not(graph, bent, [same], True)
    ('', '`_1` (Tanh) stands in between and is not linear')
    """
    module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    if not stays:
        return f"`{node.name}` uses it up and is no linear map"
    commutes = _function_commutes(node, holders) if module is None else _layer_commutes(module)
    if commutes:
        return ""
    if isinstance(module, BATCH_NORMS):
        return f"a batch norm (`{node.name}`) stands in between: put Fold() before Rotate()"
    if isinstance(module, nn.modules.dropout._DropoutNd) or node.target is F.dropout:
        return f"`{node.name}` stands in between and drops single numbers in train mode"
    what = type(module).__name__ if module else getattr(node.target, "__name__", str(node.target))
    return f"`{node.name}` ({what}) stands in between and is not linear"


def _layer_commutes(module: nn.Module) -> bool:
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return bool(module.p == 0)
    return isinstance(module, LAYERS) or type(module).__name__ in PER_SAMPLE


def _function_commutes(node: fx.Node, holders: Sequence[fx.Node]) -> bool:
    target, operands = node.target, [*node.args, *node.kwargs.values()]
    if node.op not in ("call_function", "call_method"):
        return False
    if target is F.scaled_dot_product_attention:
        value = node.args[2] if len(node.args) > 2 else node.kwargs.get("value")
        return list(holders) == [value]
    if target is F.dropout:
        return bool(_rate(node) == 0)
    if target is F.pad:
        return not node.kwargs.get("value") and len(node.args) < 4 and _mode(node) == "constant"
    if target in SUMS:
        return len(node.args) == 2 and all(a in holders for a in node.args)
    if target in SCALINGS | PRODUCTS:
        return sum(a in holders for a in operands) == 1
    return target in MOVES or (target in QUOTIENTS and _divides(node, holders))


def _divides(node: fx.Node, holders: Sequence[fx.Node]) -> bool:
    rounds = node.kwargs.get("rounding_mode") is not None
    return list(holders) == [node.args[0]] and not rounds


def _rate(node: fx.Node) -> Any:
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
    training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
    return 0 if training is False else given


def _mode(node: fx.Node) -> Any:
    return node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
