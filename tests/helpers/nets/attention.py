"""Attention in every writing style."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers.nets.base import SEQUENCE, Net, floats, idiom, several
from tests.helpers.nets.layers import OUT

HEADS, WIDTH = 2, 8


def projections(**more: Any) -> dict[str, Any]:
    """Embedding, q, k, v, projection back, head: width 8 in 2 heads of 4."""
    layers = {name: nn.Linear(WIDTH, WIDTH) for name in ("q", "k", "v", "o")}
    return {"a": nn.Linear(5, WIDTH), **layers, "out": nn.Linear(WIDTH, 3), **more}


def heads(y: Tensor, count: int = HEADS) -> Tensor:
    """``[B, N, C]`` to ``[B, heads, N, C / heads]``."""
    b, n, c = y.shape
    return y.view(b, n, count, c // count).transpose(1, 2)


def merged(y: Tensor) -> Tensor:
    """Back."""
    b, h, n, d = y.shape
    return y.transpose(1, 2).reshape(b, n, h * d)


# With a residual, `o` writes the same space as `a`. A query goes with its key.
QKV = {"a": (8, 4), "q": (8, 4), "v": (8, 4), **OUT}
QKVO = {**QKV, "o": (8, 4)}
PACKED = {"a": (8, 4), "qkv#1": (8, 4), "qkv#2": (8, 4), **OUT}
PACKED_O = {**PACKED, "o": (8, 4)}


@idiom(SEQUENCE, QKV)
def attention_by_hand() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        q, k, v = (heads(layer(y)) for layer in (m.q, m.k, m.v))
        scores = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
        return m.out(y + m.o(merged(scores @ v)))

    return Net(run, **projections())


@idiom(SEQUENCE, {"a": (8, 4), "k": (8, 4), "v": (8, 4), **OUT})
def attention_with_batch_norms() -> nn.Module:
    """As in LeViT: keys first. What is the same for all keys would not show behind a softmax."""

    def normed(layer: nn.Module, norm: nn.Module, y: Tensor) -> Tensor:
        z = layer(y)
        return heads(norm(z.flatten(0, 1)).reshape_as(z))

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        k, q = normed(m.k, m.kn, y), normed(m.q, m.qn, y)
        z = (q @ k.transpose(-2, -1)).softmax(-1) @ heads(m.v(y))
        return m.out(y + m.o(merged(z)))

    norms = {"qn": nn.BatchNorm1d(WIDTH), "kn": nn.BatchNorm1d(WIDTH)}
    return Net(run, **projections(**norms))


@idiom(SEQUENCE, QKV)
def attention_by_cosines() -> nn.Module:
    """As in Swin v2."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        q, k = (F.normalize(heads(layer(y)), dim=-1) for layer in (m.q, m.k))
        z = (10 * q @ k.transpose(-2, -1)).softmax(-1) @ heads(m.v(y))
        return m.out(y + m.o(merged(z)))

    return Net(run, **projections())


@idiom(SEQUENCE, QKV)
def attention_fused() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        q, k, v = (heads(layer(y)) for layer in (m.q, m.k, m.v))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return m.out(y + m.o(merged(z)))

    return Net(run, **projections())


@idiom(SEQUENCE, QKVO)
def attention_by_einsum() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        q, k, v = (layer(y).unflatten(-1, (HEADS, -1)) for layer in (m.q, m.k, m.v))
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k).mul(0.5).softmax(-1)
        z = torch.einsum("bhnm,bmhd->bnhd", scores, v).flatten(2)
        return m.out(m.o(z))

    return Net(run, **projections())


@idiom(SEQUENCE, QKVO)
def attention_with_baddbmm() -> nn.Module:
    """Heads folded into the batch, scores added to a bias by baddbmm."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        b, n, c = y.shape
        q, k, v = (heads(layer(y)).reshape(b * HEADS, n, c // HEADS) for layer in (m.q, m.k, m.v))
        zero = y.new_zeros(b * HEADS, n, n)
        scores = torch.baddbmm(zero, q, k.transpose(1, 2), beta=0, alpha=0.5).softmax(-1)
        return m.out(m.o(merged(torch.bmm(scores, v).view(b, HEADS, n, c // HEADS))))

    return Net(run, **projections())


def packed(**more: Any) -> dict[str, Any]:
    layers = {
        "a": nn.Linear(5, WIDTH),
        "qkv": nn.Linear(WIDTH, 3 * WIDTH),
        "o": nn.Linear(WIDTH, WIDTH),
    }
    return {**layers, "out": nn.Linear(WIDTH, 3), **more}


@idiom(SEQUENCE, PACKED)
def packed_qkv_as_in_timm() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        b, n, c = y.shape
        q, k, v = m.qkv(y).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        z = F.scaled_dot_product_attention(q, k, v)
        return m.out(y + m.o(z.transpose(1, 2).reshape(b, n, c)))

    return Net(run, **packed())


@idiom(SEQUENCE, PACKED_O)
def packed_qkv_by_chunk() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        q, k, v = (heads(t) for t in m.qkv(m.a(x)).chunk(3, dim=-1))
        scores = (q @ k.transpose(-2, -1)).softmax(dim=-1)
        return m.out(m.o(merged(scores @ v)))

    return Net(run, **packed())


@idiom(SEQUENCE, PACKED_O)
def packed_qkv_by_split() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        q, k, v = (heads(t) for t in m.qkv(m.a(x)).split(WIDTH, dim=2))
        return m.out(m.o(merged(F.scaled_dot_product_attention(q, k, v, scale=0.3))))

    return Net(run, **packed())


@idiom(SEQUENCE, PACKED_O)
def packed_qkv_heads_first() -> nn.Module:
    """Head by head q, k and v lie side by side (BLOOM, GPT-NeoX)."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        b, n, c = y.shape
        mixed = m.qkv(y).view(b, n, HEADS, 3 * c // HEADS)
        q, k, v = (t.transpose(1, 2) for t in mixed.chunk(3, dim=-1))
        return m.out(m.o(merged(F.scaled_dot_product_attention(q, k, v))))

    return Net(run, **packed())


@idiom(SEQUENCE, {"a": (8, 4), "qkv": (8, 4), "o": (8, 4), **OUT})
def packed_qkv_indexed() -> nn.Module:
    """``[B, N, heads, d, 3]``, read by subscripts."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        b, n, c = y.shape
        qkv = m.qkv(y).view(b, n, HEADS, c // HEADS, 3).permute(4, 0, 2, 1, 3)
        z = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return m.out(m.o(merged(z)))

    return Net(run, **packed())


@idiom(floats(3, 4, 4), PACKED_O)
def packed_qkv_by_convolution() -> nn.Module:
    """Positions are queries; channels first."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        b, c, h, w = y.shape
        q, k, v = m.qkv(y).view(b, 3 * HEADS, c // HEADS, h * w).chunk(3, dim=1)
        scores = (q.transpose(2, 3) @ k).softmax(-1)
        z = (v @ scores.transpose(2, 3)).reshape(b, c, h, w)
        return m.out(m.o(z))

    return Net(
        run,
        a=nn.Conv2d(3, 8, 1),
        qkv=nn.Conv2d(8, 24, 1),
        o=nn.Conv2d(8, 8, 1),
        out=nn.Conv2d(8, 3, 1),
    )


ATTEND = {"a": (8, 4), "attend#1": (8, 4), "attend#2": (8, 4), **OUT}


@idiom(SEQUENCE, ATTEND)
def multihead_attention_self() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.out(y + m.attend(y, y, y, need_weights=False)[0])

    return Net(
        run,
        a=nn.Linear(5, 8),
        attend=nn.MultiheadAttention(8, 2, batch_first=True),
        out=nn.Linear(8, 3),
    )


@idiom(
    several(SEQUENCE, floats(4, 7)),
    {"a": (8, 4), "attend#1": (8, 4), "attend#2": (8, 4), "attend.out_proj": (8, 4), **OUT},
)
def multihead_attention_cross() -> nn.Module:
    """Sequence first; keys and values come from another stream."""

    def run(m: Net, x: Tensor, y: Tensor) -> Tensor:
        q, k = m.a(x).transpose(0, 1), m.b(y).transpose(0, 1)
        z, weights = m.attend(q, k, k)
        return m.out(z.transpose(0, 1)), weights

    return Net(
        run,
        a=nn.Linear(5, 8),
        b=nn.Linear(7, 8),
        attend=nn.MultiheadAttention(8, 2),
        out=nn.Linear(8, 3),
    )


@idiom(
    several(SEQUENCE, floats(4, 7)),
    {
        "a": (8, 4),
        "b": (6, 3),
        "c": (10, 5),
        "attend.q_proj_weight": (8, 4),
        "attend.v_proj_weight": (8, 4),
        "attend.out_proj": (8, 4),
        **OUT,
    },
)
def multihead_attention_with_other_widths() -> nn.Module:
    def run(m: Net, x: Tensor, y: Tensor) -> Tensor:
        return m.out(m.attend(m.a(x), m.b(y), m.c(y))[0])

    attend = nn.MultiheadAttention(8, 2, kdim=6, vdim=10, batch_first=True, bias=False)
    return Net(
        run,
        a=nn.Linear(5, 8),
        b=nn.Linear(7, 6),
        c=nn.Linear(7, 10),
        attend=attend,
        out=nn.Linear(8, 3),
    )


def encoder_layer(**options: Any) -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        return m.out(m.block(m.a(x)).mean(1))

    block = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=True, **options)
    return Net(run, a=nn.Linear(5, 8), block=block, out=nn.Linear(8, 3))


ENCODER = {
    "a": (8, 4),
    "block.self_attn#1": (8, 4),
    "block.self_attn#2": (8, 4),
    "block.linear1": (12, 6),
    **OUT,
}


@idiom(SEQUENCE, ENCODER)
def transformer_encoder_layer() -> nn.Module:
    return encoder_layer()


@idiom(SEQUENCE, ENCODER)
def transformer_encoder_layer_norm_first() -> nn.Module:
    return encoder_layer(norm_first=True, activation="gelu")


@idiom(
    several(SEQUENCE, floats(4, 5)),
    {
        "a": (8, 4),
        "block.self_attn#1": (8, 4),
        "block.self_attn#2": (8, 4),
        "block.multihead_attn#1": (8, 4),
        "block.multihead_attn#2": (8, 4),
        "block.linear1": (12, 6),
        **OUT,
    },
)
def transformer_decoder_layer() -> nn.Module:
    def run(m: Net, x: Tensor, y: Tensor) -> Tensor:
        return m.out(m.block(m.a(x), m.b(y)))

    block = nn.TransformerDecoderLayer(8, 2, 12, batch_first=True)
    return Net(run, a=nn.Linear(5, 8), b=nn.Linear(5, 8), block=block, out=nn.Linear(8, 3))


# ---------------------------------------------------------------- shared keys


def grouped_query(expand: Any) -> nn.Module:
    """Four query heads of width 4 on two key and value heads."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        q, k, v = heads(m.q(y), 4), heads(m.k(y), 2), heads(m.v(y), 2)
        z = F.scaled_dot_product_attention(q, expand(k), expand(v))
        return m.out(m.o(merged(z)))

    return Net(
        run,
        a=nn.Linear(5, 8),
        q=nn.Linear(8, 16),
        k=nn.Linear(8, 8),
        v=nn.Linear(8, 8),
        o=nn.Linear(16, 8),
        out=nn.Linear(8, 3),
    )


# 16 queries in 4 heads share 8 keys in 2 heads.
GQA = {"a": (8, 4), "q": (8, 4), "v": (8, 4), "o": (8, 4), **OUT}


@idiom(SEQUENCE, GQA)
def grouped_query_by_repeat_interleave() -> nn.Module:
    return grouped_query(lambda t: t.repeat_interleave(2, dim=1))


@idiom(SEQUENCE, GQA)
def grouped_query_by_expand() -> nn.Module:
    def expand(t: Tensor) -> Tensor:
        b, h, n, d = t.shape
        return t[:, :, None].expand(b, h, 2, n, d).reshape(b, h * 2, n, d)

    return grouped_query(expand)


@idiom(SEQUENCE, GQA)
def grouped_query_fused() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        q, k, v = heads(m.q(y), 4), heads(m.k(y), 2), heads(m.v(y), 2)
        z = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return m.out(m.o(merged(z)))

    net = grouped_query(None)
    net.run = run
    return net


@idiom(SEQUENCE, {"a": (8, 4), "q": (4, 2), "v": (4, 2), "o": (8, 4), **OUT})
def multi_query() -> nn.Module:
    """One key and value head for all, broadcast."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        q, k, v = heads(m.q(y), 4), m.k(y).unsqueeze(1), m.v(y).unsqueeze(1)
        scores = (q @ k.mT).softmax(-1)
        return m.out(m.o(merged(scores @ v)))

    return Net(
        run,
        a=nn.Linear(5, 8),
        q=nn.Linear(8, 16),
        k=nn.Linear(8, 4),
        v=nn.Linear(8, 4),
        o=nn.Linear(16, 8),
        out=nn.Linear(8, 3),
    )


# ---------------------------------------------------------------- positions and norms inside


@idiom(SEQUENCE, {**QKV, "q": (2, 1)})
def rotary_embedding_by_halves() -> nn.Module:
    """LLaMA's rotate_half: a feature, its partner half a head away and their angle go together."""

    def rotated(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        left, right = t[..., : t.shape[-1] // 2], t[..., t.shape[-1] // 2 :]
        return t * cos + torch.cat((-right, left), dim=-1) * sin

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        q, k, v = (heads(layer(y)) for layer in (m.q, m.k, m.v))
        angle = torch.outer(torch.arange(6, dtype=x.dtype), m.inverse)
        angle = torch.cat((angle, angle), dim=-1)
        q, k = (rotated(t, angle.cos(), angle.sin()) for t in (q, k))
        return m.out(y + m.o(merged(F.scaled_dot_product_attention(q, k, v))))

    return Net(run, **projections(inverse=torch.ones(2)))


@idiom(SEQUENCE, {**QKV, "q": (2, 1)})
def rotary_embedding_by_pairs() -> nn.Module:
    """Neighbouring features are rotated; tables are buffers."""

    def rotated(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned = torch.stack([-t[..., 1::2], t[..., ::2]], -1).reshape(t.shape)
        return t * cos + turned * sin

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        q, k, v = (heads(layer(y)) for layer in (m.q, m.k, m.v))
        q, k = (rotated(t, m.cos, m.sin) for t in (q, k))
        return m.out(y + m.o(merged(F.scaled_dot_product_attention(q, k, v))))

    return Net(run, **projections(cos=torch.ones(6, 4), sin=torch.ones(6, 4)))


@idiom(SEQUENCE, {**QKV, "q": (4, 2)})
def norm_of_queries_and_keys() -> nn.Module:
    """One norm for all heads: every head keeps the same features."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        q, k, v = (heads(layer(y)) for layer in (m.q, m.k, m.v))
        z = F.scaled_dot_product_attention(m.nq(q), m.nk(k), v)
        return m.out(y + m.o(merged(z)))

    return Net(run, **projections(nq=nn.LayerNorm(4), nk=nn.RMSNorm(4)))


@idiom(floats(4, 4, 5), PACKED)
def window_attention_with_relative_position_bias() -> nn.Module:
    """Swin's: windows of 2 × 2, a cyclic shift, a table of biases per head."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        b, h, w, c = y.shape
        z = torch.roll(m.norm(y), shifts=(-1, -1), dims=(1, 2))
        z = z.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        qkv = m.qkv(z).reshape(-1, 4, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        bias = m.table[m.index.view(-1)].view(4, 4, -1).permute(2, 0, 1).contiguous()
        scores = (q * 0.5) @ k.transpose(-2, -1) + bias.unsqueeze(0)
        z = m.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, 4, c))
        z = z.view(b, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return m.out(y + torch.roll(z, shifts=(1, 1), dims=(1, 2)))

    index = torch.arange(16).view(4, 4) % 9
    return Net(
        run, **packed(norm=nn.LayerNorm(8), table=nn.Parameter(torch.zeros(9, 2)), index=index)
    )


@idiom(SEQUENCE, {**QKV, "bias": (2, "it counts rows of channels")})
def attention_with_embedded_position_bias() -> nn.Module:
    """T5's: an embedding of distances gives each head a bias; its width counts heads."""

    def run(m: Net, x: Tensor) -> Tensor:
        y, at = m.a(x), torch.arange(x.shape[1])
        q, k, v = (heads(layer(y)) for layer in (m.q, m.k, m.v))
        bias = m.bias((at[None, :] - at[:, None]).clamp(-2, 2) + 2).permute(2, 0, 1).unsqueeze(0)
        return m.out(y + m.o(merged((q @ k.transpose(-2, -1) + bias).softmax(-1) @ v)))

    return Net(run, **projections(bias=nn.Embedding(5, HEADS)))


@idiom(floats(4, 4, 5), {"a": (8, 4), "merge": (12, 6), **OUT})
def patch_merging() -> nn.Module:
    """Swin's: four neighbours side by side, normalized, mixed."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        parts = [y[:, i::2, j::2, :] for j in (0, 1) for i in (0, 1)]
        return m.out(m.merge(m.norm(torch.cat(parts, -1))).relu())

    return Net(
        run,
        a=nn.Linear(5, 8),
        norm=nn.LayerNorm(32),
        merge=nn.Linear(32, 12, bias=False),
        out=nn.Linear(12, 3),
    )


@idiom(floats(3, 4, 4), {"a": (8, 4), "qkv": (2, 1), "o": (8, 4), **OUT})
def attention_over_channels() -> nn.Module:
    """XCiT's: features attend to features, so those of q and k are what the softmax runs over."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        b, c, h, w = y.shape
        q, k, v = m.qkv(y).reshape(b, 3, HEADS, c // HEADS, h * w).unbind(1)
        scores = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)).softmax(-1)
        return m.out(m.o((scores @ v).reshape(b, c, h, w)))

    return Net(
        run,
        a=nn.Conv2d(3, 8, 1),
        qkv=nn.Conv2d(8, 24, 1),
        o=nn.Conv2d(8, 8, 1),
        out=nn.Conv2d(8, 3, 1),
    )


@idiom(SEQUENCE, QKVO)
def linear_attention() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        q, k, v = (heads(layer(y)) for layer in (m.q, m.k, m.v))
        q, k = q.relu(), k.relu()
        memory = k.transpose(-2, -1) @ v
        total = q @ k.sum(dim=-2, keepdim=True).transpose(-2, -1)
        return m.out(m.o(merged((q @ memory) / (total + 1.0))))

    return Net(run, **projections())
