"""Attention: the fused op, and ``nn.MultiheadAttention`` as a layer."""

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


@rule(F.multi_head_attention_forward)
def multi_head_attention(
    call: Call,
    query: TensorType,
    key: TensorType,
    value: TensorType,
    parameters: dict[str, TensorType],
    heads: int,
    extra: bool = False,
) -> tuple[Any, ...]:
    """``nn.MultiheadAttention``: the stream and the heads keep the same number of features.

    The layer computes its head size as ``embed_dim / num_heads``, so the features inside a head
    shrink with the stream; query, key and value stay of one width.
    """
    if extra:
        raise NotImplementedError("bias_k, bias_v and add_zero_attn")
    width = query.shape[-1]
    q, k, v = _projections(call, query, key, value, parameters)
    for t in (q, k, v):
        call.relations.equal_rows(_rows(t, heads), f"`{call.label}` has heads of equal length")
    batch = LETTERS[: len(query.shape) - 1]
    seen = [call.reshape(t, (*t.shape[:-1], heads, width // heads)) for t in (q, k, v)]
    seen = [call.fix(t, (len(t.shape) - 2,), "has a fixed number of heads") for t in seen]
    q, k, v = seen
    call.combine(_features(q), _features(k))
    merged = call.reshape(_features(v), (width,))
    weight, bias = parameters["out_proj.weight"], parameters.get("out_proj.bias")
    inner = TensorType((1,) * len(batch) + (width,), _moved(merged, len(batch)))
    out = call.einsum([(batch + "Y", inner), ("ZY", weight)], batch + "Z")
    out = out if bias is None else call.combine(out, bias)
    _same_width(call, query, merged, out)
    return TensorType(tuple(query.shape), out.blocks), call.fixed()[1]


def _projections(
    call: Call, query: TensorType, key: TensorType, value: TensorType, p: dict[str, TensorType]
) -> list[TensorType]:
    """q, k, v from one packed weight, or from three."""
    width = query.shape[-1]
    bias = p.get("in_proj_bias")
    out = []
    for i, (name, x) in enumerate(zip("qkv", (query, key, value), strict=True)):
        index = np.arange(i * width, (i + 1) * width)
        own = p.get(f"{name}_proj_weight")
        w = own or take(call.relations, p["in_proj_weight"], 0, index, "")
        call.produced(w, (0,))
        call.consumed(w, (1,))
        batch = LETTERS[: len(x.shape) - 1]
        y = call.einsum([(batch + "Y", x), ("ZY", w)], batch + "Z")
        if bias is not None:
            y = call.combine(y, take(call.relations, bias, 0, index, ""))
        out.append(y)
    return out


def _rows(t: TensorType, heads: int) -> Any:
    atoms = t.vector(len(t.shape) - 1)
    assert atoms is not None  # a projection's output
    return atoms.reshape(heads, -1)


def _features(t: TensorType) -> TensorType:
    """Only the head and feature axes."""
    rank = len(t.shape)
    blocks = tuple(
        type(b)(tuple(d - rank + 2 for d in b.dims), b.atoms, b.zero)
        for b in t.touches((rank - 2, rank - 1))
    )
    return TensorType(t.shape[-2:], blocks)


def _moved(t: TensorType, shift: int) -> tuple[Any, ...]:
    return tuple(type(b)(tuple(d + shift for d in b.dims), b.atoms, b.zero) for b in t.blocks)


def _same_width(call: Call, query: TensorType, inner: TensorType, out: TensorType) -> None:
    """The stream in, the heads and the stream out stay equally wide."""
    rows = []
    for t in (query, inner, out):
        atoms = t.vector(len(t.shape) - 1)
        if atoms is None:
            atoms = call.relations.fresh(t.shape[-1])
            call.relations.freeze(atoms, f"`{call.label}` reads an axis of fixed width")
        rows.append(atoms)
    call.relations.equal_rows(tuple(rows), f"`{call.label}` has one width inside and outside")
