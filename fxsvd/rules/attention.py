"""Fused attention (``nn.MultiheadAttention`` is captured written out, and ends up here)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch.nn import functional as F

from fxsvd.axes import TensorType, take
from fxsvd.rules.contraction import LETTERS
from fxsvd.rules.registry import Call, Edit, literals, rule


@rule(F.scaled_dot_product_attention)
def scaled_dot_product_attention(
    call: Call,
    query: TensorType,
    key: TensorType,
    value: TensorType,
    attn_mask: TensorType | None = None,
    *_: Any,
    enable_gqa: bool = False,
    **__: Any,
) -> TensorType:
    """``softmax(q kᵀ) v`` per head; the features of q and k are contracted, those of v pass."""
    if enable_gqa:
        key, value = (_shared_heads(call, t, query) for t in (key, value))
    batch = LETTERS[: len(query.shape) - 2]
    scores = call.einsum([(batch + "LE", query), (batch + "SE", key)], batch + "LS")
    if attn_mask is not None:
        scores = call.combine(scores, attn_mask.with_zero(False))
    rank = len(scores.shape)
    scores = call.fix(scores, (rank - 1,), "takes a softmax along it").with_zero(False)
    return call.einsum([(batch + "LS", scores), (batch + "SV", value)], batch + "LV")


def _shared_heads(call: Call, t: TensorType, query: TensorType) -> TensorType:
    dim = len(t.shape) - 3
    times = query.shape[dim] // t.shape[dim]
    index = np.repeat(np.arange(t.shape[dim]), times)
    return take(call.relations, t, dim, index, f"`{call.label}`")


@literals(F.scaled_dot_product_attention)
def keep_scale(edit: Edit) -> None:
    """The scale stays what it was: the numbers would change otherwise."""
    query = edit.type_of(edit.node.args[0] if edit.node.args else edit.node.kwargs["query"])
    if edit.node.kwargs.get("scale") is None and edit.shape(query)[-1] != query.shape[-1]:
        edit.node.kwargs = {**edit.node.kwargs, "scale": 1 / math.sqrt(query.shape[-1])}
