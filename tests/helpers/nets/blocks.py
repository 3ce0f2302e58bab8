"""Blocks of well-known networks in small."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers.nets.base import IMAGE, SEQUENCE, Net, floats, idiom
from tests.helpers.nets.layers import HEAD, OUT, chain, conv, head


def unit(i: int, o: int, k: int = 3, **options: Any) -> nn.Sequential:
    """Convolution, norm, ReLU."""
    return nn.Sequential(conv(i, o, k, bias=False, **options), nn.BatchNorm2d(o), nn.ReLU())


# ---------------------------------------------------------------- gates


class Gate(nn.Module):
    """Squeeze and excite."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


@idiom(IMAGE, {"a.0": (8, 4), "gate.squeeze": (4, 2), **HEAD})
def squeeze_and_excite() -> nn.Module:
    return Net(chain, a=unit(3, 8), gate=Gate(8, 4), head=head(8))


@idiom(IMAGE, {"a.0": (8, 4), "squeeze": (4, 2), **HEAD})
def squeeze_and_excite_by_linear() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        b, c, _, _ = y.size()
        s = F.adaptive_avg_pool2d(y, 1).view(b, c)
        s = F.hardsigmoid(m.excite(m.squeeze(s).relu())).view(b, c, 1, 1)
        return m.head(y * s.expand_as(y))

    return Net(run, a=unit(3, 8), squeeze=nn.Linear(8, 4), excite=nn.Linear(4, 8), head=head(8))


@idiom(IMAGE, {"a.0": (8, "slides along it"), **HEAD})
def efficient_channel_attention() -> nn.Module:
    """ECA slides a kernel over the channels: their neighbourhood matters, so they stay."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        s = y.mean((2, 3)).unsqueeze(1)
        s = m.slide(s).squeeze(1).sigmoid()
        return m.head(y * s[:, :, None, None])

    return Net(run, a=unit(3, 8), slide=nn.Conv1d(1, 1, 3, padding=1, bias=False), head=head(8))


@idiom(IMAGE, {"a.0": (8, 4), "squeeze": (4, 2), **HEAD}, masked=False)
def cbam() -> nn.Module:
    """Channel gate from mean and maximum, spatial gate from statistics over the channels."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        mean, top = y.mean((2, 3), keepdim=True), y.amax((2, 3), keepdim=True)
        y = y * sum(m.excite(m.squeeze(s).relu()) for s in (mean, top)).sigmoid()
        s = torch.cat([y.mean(1, keepdim=True), y.max(1, keepdim=True)[0]], 1)
        return m.head(y * m.spatial(s).sigmoid())

    return Net(
        run,
        a=unit(3, 8),
        squeeze=nn.Conv2d(8, 4, 1),
        excite=nn.Conv2d(4, 8, 1),
        spatial=conv(2, 1, 7),
        head=head(8),
    )


@idiom(IMAGE, {"a.0": (8, 4), "b.0": (8, 4), "mix": (4, 2), **HEAD})
def selective_kernel() -> nn.Module:
    """Two branches weighed against each other by a softmax over the branches."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        both = torch.stack([m.b(y), m.c(y)], 1)
        s = m.weigh(m.mix(both.sum(1).mean((2, 3))).relu())
        s = s.view(-1, 2, 8).softmax(1)
        return m.head((both * s[:, :, :, None, None]).sum(1))

    return Net(
        run,
        a=unit(3, 8),
        b=unit(8, 8),
        c=unit(8, 8, 5),
        mix=nn.Linear(8, 4),
        weigh=nn.Linear(4, 16),
        head=head(8),
    )


# ---------------------------------------------------------------- gated MLPs


def gated(activation: Any) -> nn.Module:
    """``w2(f(w1 x) · w3 x)``."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.out(y + m.w2(activation(m.w1(y)) * m.w3(y)))

    return Net(
        run,
        a=nn.Linear(5, 8),
        w1=nn.Linear(8, 12, bias=False),
        w3=nn.Linear(8, 12, bias=False),
        w2=nn.Linear(12, 8, bias=False),
        out=nn.Linear(8, 3),
    )


@idiom(SEQUENCE, {"a": (8, 4), "w1": (12, 6), **OUT})
def swiglu() -> nn.Module:
    return gated(F.silu)


@idiom(SEQUENCE, {"a": (8, 4), "w": (12, 6), **OUT})
def geglu_packed() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        value, gate = m.w(y).chunk(2, dim=-1)
        return m.out(y + m.back(value * F.gelu(gate)))

    return Net(
        run, a=nn.Linear(5, 8), w=nn.Linear(8, 24), back=nn.Linear(12, 8), out=nn.Linear(8, 3)
    )


@idiom(SEQUENCE, {"a": (8, 4), "w": (12, 6), **OUT})
def glu_layer() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.out(y + m.back(m.glu(m.w(y))))

    return Net(
        run,
        a=nn.Linear(5, 8),
        w=nn.Linear(8, 24),
        glu=nn.GLU(),
        back=nn.Linear(12, 8),
        out=nn.Linear(8, 3),
    )


@idiom(IMAGE, {"a.0": (8, 4), "b": (12, 6), **HEAD})
def simple_gate() -> nn.Module:
    """NAFNet's: one half times the other, along channels."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        left, right = m.depth(m.b(y)).chunk(2, dim=1)
        return m.head(y + m.beta * m.c(left * right))

    return Net(
        run,
        a=unit(3, 8),
        b=conv(8, 24, 1),
        depth=conv(24, 24, groups=24),
        c=conv(12, 8, 1),
        beta=nn.Parameter(torch.zeros(1, 8, 1, 1)),
        head=head(8),
    )


# ---------------------------------------------------------------- residual networks


@idiom(IMAGE, {"a.0": (8, 4), "b.0": (6, 3), "d": (12, 6), "e.0": (10, 5), **HEAD})
def residual_network() -> nn.Module:
    """A block with an identity and one with a projection."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        y = (y + m.c(m.b(y))).relu()
        y = (m.d(y) + m.f(m.e(y))).relu()
        return m.head(y)

    return Net(
        run,
        a=unit(3, 8),
        b=unit(8, 6),
        c=conv(6, 8),
        d=conv(8, 12, 1),
        e=unit(8, 10),
        f=conv(10, 12),
        head=head(12),
    )


@idiom(IMAGE, {"a.0": (8, 4), "b.0": (12, 6), "c.0": (12, 6), **HEAD})
def resnext_block() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.head((y + m.d(m.c(m.b(y)))).relu())

    return Net(
        run,
        a=unit(3, 8),
        b=unit(8, 12, 1),
        c=unit(12, 12, groups=3),
        d=conv(12, 8, 1),
        head=head(8),
    )


@idiom(IMAGE, {"a.0": (8, 4), "b.0": (24, 12), "gate.squeeze": (4, 2), **HEAD})
def inverted_residual() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.head(y + m.n(m.c(m.gate(m.depth(m.b(y))))))

    return Net(
        run,
        a=unit(3, 8),
        b=unit(8, 24, 1),
        depth=unit(24, 24, groups=24),
        gate=Gate(24, 4),
        c=conv(24, 8, 1),
        n=nn.BatchNorm2d(8),
        head=head(8),
    )


@idiom(IMAGE, {"a": (8, 4), "b": (32, 16), **HEAD})
def convnext_block() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        z = m.norm(m.depth(y).permute(0, 2, 3, 1))
        z = m.c(F.gelu(m.b(z))) * m.gamma
        return m.head(y + z.permute(0, 3, 1, 2))

    return Net(
        run,
        a=conv(3, 8),
        depth=conv(8, 8, 7, groups=8),
        norm=nn.LayerNorm(8),
        b=nn.Linear(8, 32),
        c=nn.Linear(32, 8),
        gamma=nn.Parameter(torch.zeros(8)),
        head=head(8),
    )


@idiom(IMAGE, {"a": (8, 4), "b": (32, 16), **HEAD}, masked=False)
def convnext_v2_block() -> nn.Module:
    """With a global response norm, whose mean runs over the channels."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        z = F.gelu(m.b(m.norm(m.depth(y).permute(0, 2, 3, 1))))
        energy = torch.norm(z, p=2, dim=(1, 2), keepdim=True)
        z = m.gain * (z * (energy / (energy.mean(dim=-1, keepdim=True) + 1e-6))) + m.shift + z
        return m.head(y + m.c(z).permute(0, 3, 1, 2))

    return Net(
        run,
        a=conv(3, 8),
        depth=conv(8, 8, 7, groups=8),
        norm=nn.LayerNorm(8),
        b=nn.Linear(8, 32),
        gain=nn.Parameter(torch.zeros(1, 1, 1, 32)),
        shift=nn.Parameter(torch.zeros(1, 1, 1, 32)),
        c=nn.Linear(32, 8),
        head=head(8),
    )


SHUFFLED = {"a.0#1": (2, 1), "a.0#2": (2, 1), "a.0#3": (4, 2), "b.0#1": (2, 1), "b.0#2": (2, 1)}


@idiom(IMAGE, {**SHUFFLED, "c.0": (4, 2), **HEAD})
def shufflenet_v2_block() -> nn.Module:
    """Half passes, half is computed; then both are shuffled and split again."""

    def shuffled(y: Tensor) -> Tensor:
        b, c, h, w = y.shape
        return y.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, -1, h, w)

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        for branch in (m.b, m.c):
            left, right = y.chunk(2, dim=1)
            y = shuffled(torch.cat((left, branch(right)), dim=1))
        return m.head(y)

    return Net(run, a=unit(3, 8), b=unit(4, 4), c=unit(4, 4), head=head(8))


@idiom(IMAGE, {"a.0#1": (4, 2), "a.0#2": (4, 2), "b.0": (4, 2), "d.0": (6, 3), **HEAD})
def c2f_block() -> nn.Module:
    """YOLOv8's: split, bottlenecks one after the other, everything joined."""

    def run(m: Net, x: Tensor) -> Tensor:
        parts = list(m.a(x).chunk(2, 1))
        parts.append(parts[-1] + m.c(m.b(parts[-1])))
        return m.head(m.d(torch.cat(parts, 1)))

    return Net(run, a=unit(3, 8), b=unit(4, 4), c=unit(4, 4), d=unit(12, 6), head=head(6))


@idiom(IMAGE, {"a.0": (4, 2), "b.0": (6, 3), **HEAD})
def ghost_module() -> nn.Module:
    """Cheap features from a depthwise convolution, joined with their originals, cut to width."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        y = torch.cat([y, m.cheap(y)], dim=1)[:, :7]
        return m.head(m.b(y))

    return Net(run, a=unit(3, 4), cheap=unit(4, 4, groups=4), b=unit(7, 6), head=head(6))


@idiom(IMAGE, {"a.0#1": (4, 2), "a.0#2": (4, 2), "c.0": (4, 2), **HEAD})
def res2net_block() -> nn.Module:
    """Scales one after the other, each added to the next part."""

    def run(m: Net, x: Tensor) -> Tensor:
        p, q = torch.split(m.a(x), 4, 1)
        p = m.b(p)
        return m.head(torch.cat([p, m.c(p + q)], 1))

    return Net(run, a=unit(3, 8), b=unit(4, 4), c=unit(4, 4), head=head(8))


@idiom(IMAGE, {"a.0": (8, 4), "b.0": (6, 3), **HEAD})
def reparametrizable_branches() -> nn.Module:
    """RepVGG: 3 × 3, 1 × 1 and an identity norm."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.head(m.b((m.three(y) + m.one(y) + m.identity(y)).relu()))

    return Net(
        run,
        a=unit(3, 8),
        three=conv(8, 8),
        one=conv(8, 8, 1),
        identity=nn.BatchNorm2d(8),
        b=unit(8, 6),
        head=head(6),
    )


@idiom(IMAGE, {"a": (8, 4), "b": (6, 3), "side2": (4, 2), **HEAD})
def feature_pyramid() -> nn.Module:
    def run(m: Net, x: Tensor) -> Any:
        fine = m.a(x).relu()
        coarse = m.b(F.max_pool2d(fine, 2)).relu()
        top = m.side2(coarse)
        low = m.c(fine) + F.interpolate(top, scale_factor=2.0, mode="nearest")
        return m.head(low), m.head(top)

    return Net(run, a=conv(3, 8), b=conv(8, 6), c=conv(8, 4, 1), side2=conv(6, 4, 1), head=head(4))


@idiom(floats(4, 6, 5), {"a": (8, 4), **OUT})
def attention_pooling() -> nn.Module:
    """A softmax over positions per channel."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x).flatten(1, 2)
        return m.out((y * m.gate(y).softmax(1)).sum(1))

    return Net(run, a=nn.Linear(5, 8), gate=nn.Linear(8, 8), out=nn.Linear(8, 3))


@idiom(SEQUENCE, {"a": (8, 4), **OUT})
def nearest_of_a_codebook() -> nn.Module:
    """Distances to learned codes, softly assigned."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        weights = (-(y[:, :, None] - m.codes).pow(2).sum(-1)).softmax(-1)
        return m.out(weights @ m.codes)

    return Net(run, a=nn.Linear(5, 8), codes=nn.Parameter(torch.zeros(6, 8)), out=nn.Linear(8, 3))
