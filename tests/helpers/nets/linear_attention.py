"""Attention in linear time: keys are made positive on their own, so zeros are none behind that."""

from __future__ import annotations

from torch import Tensor, nn

from tests.helpers.nets.attention import PACKED_O, QKVO, WIDTH, heads, merged, packed, projections
from tests.helpers.nets.base import SEQUENCE, Net, floats, idiom
from tests.helpers.nets.layers import OUT


@idiom(SEQUENCE, QKVO)
def attention_with_softmaxed_keys() -> nn.Module:
    """As in CoaT: a softmax over the positions, for each feature."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        q, k, v = (heads(layer(y)) for layer in (m.q, m.k, m.v))
        return m.out(m.o(merged(q @ (k.softmax(2).transpose(-2, -1) @ v))))

    return Net(run, **projections())


@idiom(SEQUENCE, PACKED_O)
def attention_with_keys_above_zero() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        q, k, v = (heads(t) for t in m.qkv(m.a(x)).chunk(3, dim=-1))
        return m.out(m.o(merged(q @ (k.sigmoid().transpose(-2, -1) @ v))))

    return Net(run, **packed())


@idiom(SEQUENCE, {"a": (8, 4), "k": (8, 4), "v": (8, 4), "o": (8, 4), **OUT})
def attention_with_softmaxed_queries() -> nn.Module:
    """Keys first: of the two, the queries are those that cannot be silent."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        k, q, v = (heads(layer(y)) for layer in (m.k, m.q, m.v))
        return m.out(m.o(merged(q.softmax(2) @ (k.transpose(-2, -1) @ v))))

    return Net(run, **projections())


@idiom(floats(3, 4, 4), {"a": (8, 4), "qkv#1": (4, 2), "qkv#2": (4, 2), "o": (8, 4), **OUT})
def lambda_layer() -> nn.Module:
    """As in LambdaNetworks: heads share keys; a norm runs over the queries of a packed layer."""

    def run(m: Net, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        q, k, v = m.qkv(m.a(x)).split((WIDTH, WIDTH // 2, WIDTH // 2), dim=1)
        q = m.qn(q).reshape(b, 2, WIDTH // 2, h * w).transpose(-1, -2)
        k, v = k.flatten(2).softmax(-1), v.flatten(2).transpose(-1, -2)
        z = q @ (k @ v).unsqueeze(1)
        near = m.near(v.reshape(b, 1, h, w, WIDTH // 2))
        near = near.reshape(b, 1, WIDTH // 2, h * w, WIDTH // 2).transpose(2, 3)
        z = z + (q.unsqueeze(-2) @ near).squeeze(-2)
        return m.out(m.o(z.transpose(-1, -2).reshape(b, WIDTH, h, w)))

    return Net(
        run,
        a=nn.Conv2d(3, WIDTH, 1),
        qkv=nn.Conv2d(WIDTH, 2 * WIDTH, 1),
        qn=nn.BatchNorm2d(WIDTH),
        near=nn.Conv3d(1, WIDTH // 2, (3, 3, 1), padding=(1, 1, 0)),
        o=nn.Conv2d(WIDTH, WIDTH, 1),
        out=nn.Conv2d(WIDTH, 3, 1),
    )
