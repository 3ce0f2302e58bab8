"""``nn.MultiheadAttention`` written out: projections, heads, attention, output projection.

As one opaque layer it would tie the width of its heads to the width of the stream, and recompute
its scale from a narrowed head. Written out, its parameters keep their names and each part can be
narrowed by itself. The arithmetic is that of ``F.multi_head_attention_forward``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def can_write_out(module: nn.Module) -> bool:
    """Whether a module is a plain multi-head attention (extra key and value rows stay opaque)."""
    if type(module).forward is not nn.MultiheadAttention.forward:
        return False
    assert isinstance(module, nn.MultiheadAttention)
    return module.bias_k is None and module.bias_v is None and not module.add_zero_attn


def attend(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``module.forward``, in plain tensor operations.

    Args:
        module: the layer.
        query: ``[N, L, E]`` (``[L, N, E]`` unless ``batch_first``), or ``[L, E]``.
        key: likewise with the source length.
        value: likewise.
        key_padding_mask: ``[N, S]``, True or -inf where a key is ignored.
        need_weights: return the attention weights as well.
        attn_mask: ``[L, S]`` or ``[N·heads, L, S]``.
        average_attn_weights: average the weights over heads.
        is_causal: a hint; the mask decides.

    Returns:
        The output in the layout of ``query``, and the weights or None.
    """
    turn = query.dim() == 3 and not module.batch_first
    same = query is key, key is value
    q, k, v = (_batched(t, turn) for t in (query, key, value))
    q, k, v = (_heads(t, module.num_heads) for t in _project(module, q, k, v, same))
    mask = _mask(attn_mask, key_padding_mask, q, module.num_heads)
    if need_weights:
        out, weights = _explicit(module, q, k, v, mask)
        weights = weights.mean(dim=1) if average_attn_weights else weights
    else:
        rate = module.dropout if module.dropout > 0 and module.training else 0.0
        out, weights = F.scaled_dot_product_attention(q, k, v, mask, rate), None
    out = F.linear(out.transpose(1, 2).flatten(2), module.out_proj.weight, module.out_proj.bias)
    if query.dim() == 2:
        return out.squeeze(0), None if weights is None else weights.squeeze(0)
    return (out.transpose(0, 1) if turn else out), weights


def _batched(t: Tensor, turn: bool) -> Tensor:
    if t.dim() == 2:
        return t.unsqueeze(0)
    return t.transpose(0, 1) if turn else t


def _project(
    m: nn.MultiheadAttention, q: Tensor, k: Tensor, v: Tensor, same: tuple[bool, bool]
) -> tuple[Tensor, ...]:
    """Self-attention needs one product, else there is one for each of q, k and v."""
    packed: Tensor | None = m.in_proj_weight
    bias: Tensor | None = m.in_proj_bias
    if packed is not None and all(same):
        return F.linear(q, packed, bias).chunk(3, dim=-1)
    separate = (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight)
    weights = separate if packed is None else packed.chunk(3)
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    return tuple(F.linear(t, w, b) for t, w, b in zip((q, k, v), weights, biases, strict=True))


def _heads(t: Tensor, heads: int) -> Tensor:
    """``[N, L, E]`` to ``[N, heads, L, E / heads]``."""
    split: Tensor = t.unflatten(-1, (heads, t.shape[-1] // heads))
    return split.transpose(1, 2)


def _mask(
    attn_mask: Tensor | None, padding: Tensor | None, query: Tensor, heads: int
) -> Tensor | None:
    """One additive mask that broadcasts against ``[N, heads, L, S]``."""
    masks = []
    if attn_mask is not None:
        shaped = attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, heads))
        masks.append(_additive(shaped, query.dtype))
    if padding is not None:
        masks.append(_additive(padding, query.dtype)[..., None, None, :])
    return sum(masks[1:], start=masks[0]) if masks else None


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)


def _explicit(
    m: nn.MultiheadAttention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention with its weights."""
    scores = (q * (1.0 / math.sqrt(q.shape[-1]))) @ k.transpose(-2, -1)
    weights = (scores if mask is None else scores + mask).softmax(dim=-1)
    if m.dropout > 0:
        weights = F.dropout(weights, m.dropout, m.training)
    return weights @ v, weights
