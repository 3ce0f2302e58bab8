"""Norms: parameters follow the channels; statistics are taken over the channels that survive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from fxsvd.axes import TensorType, fix_dims
from fxsvd.rules.contraction import vector_on
from fxsvd.rules.registry import Call, Edit, literals, rule, spellings


@rule(F.batch_norm, torch.batch_norm)
def batch_norm(
    call: Call,
    input: TensorType,
    running_mean: TensorType | None = None,
    running_var: TensorType | None = None,
    weight: TensorType | None = None,
    bias: TensorType | None = None,
    *_: Any,
    **__: Any,
) -> TensorType:
    """One mean and variance per index of dimension 1."""
    t = input
    for vector in (running_mean, running_var, weight, bias):
        t = vector_on(call, t, vector, 1)
    return t.with_zero(True)


@rule(F.instance_norm, torch.instance_norm)
def instance_norm(call: Call, input: TensorType, *parameters: Any, **kwargs: Any) -> TensorType:
    """As batch norm, by sample."""
    names = ("running_mean", "running_var", "weight", "bias")
    given = dict(zip(names, parameters, strict=False)) | kwargs
    out: TensorType = batch_norm(call, input, *(given.get(name) for name in names))
    return out


@rule(F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm)
def layer_norm(
    call: Call,
    input: TensorType,
    normalized_shape: Sequence[int],
    weight: TensorType | None = None,
    bias: TensorType | None = None,
    *_: Any,
    **__: Any,
) -> TensorType:
    """Statistics over the last dimensions."""
    parameters = [t for t in (weight, bias) if isinstance(t, TensorType)]
    return call.combine(input, *parameters).with_zero(True)


@literals(F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm)
def layer_norm_literals(edit: Edit) -> None:
    """The normalized shape is written out."""
    args = dict(zip(("input", "normalized_shape"), edit.node.args, strict=False))
    args |= edit.node.kwargs
    rank = len(args["normalized_shape"])
    new = edit.shape(edit.out)[len(edit.out.shape) - rank :]
    if len(edit.node.args) > 1:
        edit.node.args = (edit.node.args[0], tuple(new), *edit.node.args[2:])
    else:
        edit.node.kwargs = {**edit.node.kwargs, "normalized_shape": tuple(new)}


@rule(F.group_norm, torch.group_norm)
def group_norm(
    call: Call,
    input: TensorType,
    num_groups: int,
    weight: TensorType | None = None,
    bias: TensorType | None = None,
    *_: Any,
    **__: Any,
) -> TensorType:
    """Statistics over the channels of a group: every group keeps equally many."""
    batch, channels, *rest = input.shape
    t = input
    if num_groups > 1:
        grouped = call.reshape(t, (batch, num_groups, channels // num_groups, *rest))
        grouped = call.fix(grouped, (1,), "has a fixed number of groups")
        t = call.reshape(grouped, tuple(input.shape))
    for vector in (weight, bias):
        t = vector_on(call, t, vector, 1)
    return t.with_zero(True)


@rule(*spellings("local_response_norm"))
def local_response_norm(call: Call, input: TensorType, *_: Any, **__: Any) -> TensorType:
    """Mixes neighbouring channels."""
    reason = f"`{call.label}` mixes neighbouring channels"
    return fix_dims(call.relations, input, (1,), reason)


@rule(F.normalize)
def normalize(
    call: Call, input: TensorType, p: float = 2.0, dim: int = 1, *_: Any, **__: Any
) -> TensorType:
    """Division by a norm, to which silent zeros add nothing."""
    unsafe = [d % len(input.shape) for b in input.blocks if not b.zero for d in b.dims]
    if dim % len(input.shape) in unsafe:
        return call.fix(input, (dim % len(input.shape),), "takes a norm of non-zero silent values")
    return input


@rule(F.cosine_similarity)
def cosine_similarity(
    call: Call, x1: TensorType, x2: TensorType, dim: int = 1, *_: Any, **__: Any
) -> TensorType:
    """A contraction of two normalized tensors."""
    t = call.combine(x1, x2)
    return call.contract(t, (dim % len(t.shape),)).with_zero(False)


@rule(torch._weight_norm)
def weight_norm(call: Call, v: TensorType, g: TensorType, dim: int = 0) -> TensorType:
    """``g · v / ‖v‖``."""
    return call.combine(v, g, product=True)
