"""Elementwise ops: axes that meet are unified; what matters besides is whether zero stays zero."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch

from fxsvd.axes import TensorType, take
from fxsvd.rules.registry import Call, rule, spellings

KEEPS_ZERO = spellings(
    *("relu", "relu6", "leaky_relu", "rrelu", "elu", "celu", "selu", "gelu", "silu", "mish"),
    *("hardswish", "tanh", "tanhshrink", "softsign", "softshrink", "hardshrink"),
    *("abs", "absolute", "neg", "negative", "sin", "tan", "asin", "atan", "sinh", "asinh", "sqrt"),
    *("square", "erf", "floor", "ceil", "round", "trunc", "sign", "sgn", "expm1", "log1p"),
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "nan_to_num"),
    *("clone", "contiguous", "detach", "alias", "positive", "conj", "real", "resolve_conj"),
    *("to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda"),
    *("requires_grad", "deg2rad", "rad2deg"),
)
MOVES_ZERO = spellings(
    *("sigmoid", "hardsigmoid", "exp", "exp2", "log", "log2", "log10", "cos", "cosh", "acos"),
    *("rsqrt", "reciprocal", "softplus", "logsigmoid", "erfc", "isnan", "isinf", "isfinite"),
    *("logical_not", "bitwise_not", "logit", "lgamma", "digamma", "alpha_dropout"),
    *("feature_alpha_dropout", "threshold", "bool", "int", "long"),
)
SUMS = spellings("add", "sub", "subtract", "maximum", "minimum", "fmax", "fmin", "logaddexp")
COMPARISONS = spellings(
    *("eq", "ne", "lt", "le", "gt", "ge", "less", "greater", "less_equal", "greater_equal"),
    *("not_equal", "logical_and", "logical_or", "logical_xor", "bitwise_and", "bitwise_or"),
    *("bitwise_xor", "isclose", "rsub"),
)
QUOTIENTS = spellings("div", "divide", "true_divide", "floor_divide", "fmod", "remainder", "atan2")


def tensors(*args: Any) -> list[TensorType]:
    """Those of the arguments that are tensors."""
    return [a for a in args if isinstance(a, TensorType)]


@rule(*KEEPS_ZERO, operator.neg, operator.pos, operator.abs)
def keeps_zero(call: Call, input: TensorType, *_: Any, **__: Any) -> TensorType:
    """f(0) = 0."""
    return input


@rule(*MOVES_ZERO, operator.invert)
def moves_zero(call: Call, input: TensorType, *_: Any, **__: Any) -> TensorType:
    """f(0) ≠ 0, or not known to be."""
    return input.with_zero(False)


@rule(*spellings("clamp", "clip", "hardtanh"))
def clamp(
    call: Call, input: TensorType, min: Any = None, max: Any = None, *_: Any, **kwargs: Any
) -> TensorType:
    """Zero stays where the bounds are numbers around it."""
    low = kwargs.get("min_val", min if min is not None else 0)
    high = kwargs.get("max_val", max if max is not None else 0)
    types = tensors(input, low, high)
    if len(types) > 1:
        return call.combine(*types).with_zero(False)
    return input if low <= 0 <= high else input.with_zero(False)


@rule(*SUMS, operator.add, operator.sub, operator.iadd, operator.isub)
def add(call: Call, input: Any, other: Any, *_: Any, **__: Any) -> TensorType:
    """Zero only where both sides are."""
    out = call.combine(*tensors(input, other))
    scalars = [a for a in (input, other) if not isinstance(a, TensorType)]
    return out.with_zero(False) if any(s != 0 for s in scalars) else out


@rule(*spellings("mul", "multiply"), operator.mul, operator.imul)
def mul(call: Call, input: Any, other: Any, *_: Any, **__: Any) -> TensorType:
    """Zero where either side is."""
    return call.combine(*tensors(input, other), product=True)


@rule(*QUOTIENTS, operator.truediv, operator.itruediv, operator.floordiv, operator.mod)
def div(call: Call, input: Any, other: Any, *_: Any, **__: Any) -> TensorType:
    """Zero where the numerator is."""
    if not isinstance(input, TensorType):
        return call.combine(*tensors(other)).with_zero(False)
    if not isinstance(other, TensorType):
        return input
    return call.combine(input, other.with_zero(False), product=True)


@rule(*spellings("pow", "float_power"), operator.pow, operator.ipow)
def power(call: Call, input: Any, exponent: Any, *_: Any, **__: Any) -> TensorType:
    """Zero stays under a positive exponent."""
    out = call.combine(*tensors(input, exponent))
    positive = isinstance(exponent, (int, float)) and exponent > 0
    return out if positive else out.with_zero(False)


@rule(
    *COMPARISONS,
    *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge),
    *(operator.and_, operator.or_, operator.xor, operator.iand, operator.ior),
)
def compare(call: Call, input: Any, other: Any, *_: Any, **__: Any) -> TensorType:
    """A mask: zeros say nothing."""
    return call.combine(*tensors(input, other)).with_zero(False)


@rule(*spellings("where"))
def where(call: Call, condition: Any, input: Any = None, other: Any = None) -> TensorType:
    """``torch.where(condition, input, other)``."""
    choice = call.combine(*tensors(input, other)) if tensors(input, other) else condition
    zero = all(isinstance(a, TensorType) or a == 0 for a in (input, other))
    choice = choice if zero else choice.with_zero(False)
    return call.combine(choice, condition.with_zero(False), product=True)


@rule(*spellings("masked_fill"))
def masked_fill(call: Call, input: TensorType, mask: TensorType, value: Any) -> TensorType:
    """Zero stays only where zeros are filled in."""
    out = call.combine(input, mask.with_zero(False), product=True)
    return out if value == 0 else out.with_zero(False)


@rule(*spellings("addcmul", "addcdiv", "lerp"))
def three(call: Call, input: TensorType, a: TensorType, b: Any, **_: Any) -> TensorType:
    """Three operands, zero where all are."""
    return call.combine(*tensors(input, a, b))


@rule(*spellings("prelu"))
def prelu(call: Call, input: TensorType, weight: TensorType) -> TensorType:
    """``weight`` runs over dimension 1, or is one number."""
    size = weight.shape[-1] if weight.shape else 1
    shape = (size, *(1 for _ in input.shape[2:]))
    if size > 1:
        return call.combine(input, call.reshape(weight, shape))
    return input


@rule(*spellings("glu"))
def glu(call: Call, input: TensorType, dim: int = -1) -> TensorType:
    """``a · sigmoid(b)`` with the two halves of a dimension."""
    return halves(call, input, dim % len(input.shape))


def halves(call: Call, input: TensorType, dim: int) -> TensorType:
    """The two halves of a dimension combined elementwise."""
    half = input.shape[dim] // 2
    a, b = (
        take(call.relations, input, dim, np.arange(start, start + half), f"`{call.label}`")
        for start in (0, half)
    )
    return call.combine(a, b, product=True)


@rule(torch.complex, torch.polar)
def frozen_complex(call: Call, *args: Any, **_: Any) -> Any:
    """Complex pairs are not narrowed."""
    for t in tensors(*args):
        call.freeze(t, "makes complex numbers of it")
    return call.fixed()
