"""Networks drawn by Hypothesis: chains of blocks that couple channels in all the usual ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers.nets.base import Net

Block = tuple[nn.Module, int]  # and how many channels leave it
Maker = Callable[[int, int, int], Block]  # from the channels that enter it and two small numbers


def conv(i: int, o: int, k: int = 3, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, groups=groups)


# ---------------------------------------------------------------- blocks over [B, C, H, W]


def plain(c: int, a: int, b: int) -> Block:
    out = 3 + 3 * a + b
    return nn.Sequential(conv(c, out, 1 + 2 * (b % 2)), nn.ReLU()), out


def grouped(c: int, a: int, b: int) -> Block:
    groups = next(g for g in (4, 3, 2, 1) if c % g == 0 and g <= 2 + a)
    return nn.Sequential(conv(c, groups * (2 + b), groups=groups), nn.GELU()), groups * (2 + b)


def depthwise(c: int, a: int, b: int) -> Block:
    return conv(c, c * (1 + a % 2), groups=c), c * (1 + a % 2)


def norm(c: int, a: int, b: int) -> Block:
    groups = next(g for g in (4, 3, 2, 1) if c % g == 0 and g < c)
    kinds: list[nn.Module] = [
        nn.BatchNorm2d(c),
        nn.GroupNorm(groups, c),
        nn.InstanceNorm2d(c, affine=True),
        Net(lambda m, x: m.n(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), n=nn.LayerNorm(c)),
        nn.PReLU(c),
    ]
    return kinds[(3 * a + b) % len(kinds)], c


def residual(c: int, a: int, b: int) -> Block:
    inner = nn.Sequential(
        conv(c, 4 + 2 * a), nn.BatchNorm2d(4 + 2 * a), nn.ReLU(), conv(4 + 2 * a, c, 1)
    )
    if b == 0:
        return Net(lambda m, x: (x + m.inner(x)).relu(), inner=inner), c
    gamma = nn.Parameter(torch.zeros(c))
    return Net(lambda m, x: x + m.gamma[:, None, None] * m.inner(x), inner=inner, gamma=gamma), c


def projected(c: int, a: int, b: int) -> Block:
    out = 6 + 2 * a
    side, main = conv(c, out, 1), nn.Sequential(conv(c, out), nn.SiLU())
    return Net(lambda m, x: m.side(x) + m.main(x), side=side, main=main), out


def joined(c: int, a: int, b: int) -> Block:
    """With itself in front or behind, as dense blocks do."""

    def run(m: Net, x: Tensor) -> Tensor:
        parts = [x, m.branch(x)]
        return torch.cat(parts[:: (1, -1)[b % 2]], dim=1)

    return Net(run, branch=conv(c, 2 + a)), c + 2 + a


def split(c: int, a: int, b: int) -> Block:
    """One part is computed, the others pass."""
    sizes = [c // 2, c - c // 2] if b % 2 else [1 + a % (c - 1), c - 1 - a % (c - 1)]

    def run(m: Net, x: Tensor) -> Tensor:
        left, right = x.split(sizes, dim=1)
        return torch.cat([left, m.branch(right).relu()], dim=1)

    return Net(run, branch=conv(sizes[1], sizes[1])), c


def shuffled(c: int, a: int, b: int) -> Block:
    groups = next(g for g in (4, 3, 2, 1) if c % g == 0)

    def run(m: Net, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)

    return Net(run), c


def moved(c: int, a: int, b: int) -> Block:
    order = torch.arange(c).roll(1 + a)
    moves: list[Callable[[Net, Tensor], Tensor]] = [
        lambda m, x: x.flip(1),
        lambda m, x: torch.roll(x, 1 + a, 1),
        lambda m, x: x[:, m.order] * x,
    ]
    return Net(moves[b % len(moves)], order=order), c


def padded(c: int, a: int, b: int) -> Block:
    return Net(lambda m, x: F.pad(x, (0, 0, 0, 0, a, 1 + b))), c + a + 1 + b


def sliced(c: int, a: int, b: int) -> Block:
    start, stop = a % 2, max(c - b, a % 2 + 1)
    return Net(lambda m, x: x[:, start:stop]), stop - start


def gate(c: int, a: int, b: int) -> Block:
    def run(m: Net, x: Tensor) -> Tensor:
        return x * m.up(m.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()

    return Net(run, down=nn.Conv2d(c, 2 + a, 1), up=nn.Conv2d(2 + a, c, 1)), c


def gated(c: int, a: int, b: int) -> Block:
    return nn.Sequential(conv(c, 2 * (3 + a), 1), nn.GLU(dim=1)), 3 + a


def shared(c: int, a: int, b: int) -> Block:
    def run(m: Net, x: Tensor) -> Tensor:
        for _ in range(2):
            x = m.layer(x).relu()
        return x

    return Net(run, layer=conv(c, c)), c


def multi_branch(c: int, a: int, b: int) -> Block:
    """Inception: pooled, plain and deep, joined."""

    def run(m: Net, x: Tensor) -> Tensor:
        return torch.cat([F.avg_pool2d(x, 3, 1, 1), m.p(x), m.r(m.q(x).relu())], 1)

    return Net(run, p=conv(c, 2 + a, 1), q=conv(c, 4, 1), r=conv(4, 2 + b)), c + 4 + a + b


def attention(c: int, a: int, b: int) -> Block:
    """Over positions; packed or not, with the stream added or not."""
    heads, size = 1 + a % 2, 2 + 2 * (b % 2)
    width = heads * size

    def run(m: Net, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        y = x.flatten(2).transpose(1, 2)
        qkv = m.qkv(y).view(n, h * w, 3, heads, size).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        z = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, h * w, width)
        return x + m.back(z).transpose(1, 2).reshape(n, c, h, w)

    return Net(run, qkv=nn.Linear(c, 3 * width), back=nn.Linear(width, c)), c


def attention_by_hand(c: int, a: int, b: int) -> Block:
    heads, size = 2, 2 + a

    def run(m: Net, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        q, k, v = (layer(x).view(n, heads, size, h * w) for layer in (m.q, m.k, m.v))
        scores = (q.transpose(2, 3) @ k * size**-0.5).softmax(-1)
        return m.back((v @ scores.transpose(2, 3)).reshape(n, heads * size, h, w))

    layers = {name: nn.Conv2d(c, heads * size, 1) for name in "qkv"}
    return Net(run, **layers, back=nn.Conv2d(heads * size, 4 + b, 1)), 4 + b


def resized(c: int, a: int, b: int) -> Block:
    """A U-Net's skip."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = F.interpolate(m.deep(F.max_pool2d(x, 2)), scale_factor=2.0)
        return torch.cat([x, y], 1) if b % 2 else y

    return Net(run, deep=conv(c, 3 + a)), 3 + a + (c if b % 2 else 0)


CONVOLUTIONAL: tuple[Maker, ...] = (
    plain,
    grouped,
    depthwise,
    norm,
    residual,
    projected,
    shared,
    gate,
)
MOVING: tuple[Maker, ...] = (
    plain,
    joined,
    split,
    shuffled,
    moved,
    padded,
    sliced,
    multi_branch,
    gated,
)
ATTENTIVE: tuple[Maker, ...] = (attention, attention_by_hand, norm, residual, joined, gated, plain)
ANY: tuple[Maker, ...] = tuple(dict.fromkeys((*CONVOLUTIONAL, *MOVING, *ATTENTIVE, resized)))


class Head(nn.Module):
    """A classifier behind pooling, or behind a flatten of all positions."""

    def __init__(self, width: int, flat: bool) -> None:
        super().__init__()
        self.pool = nn.Identity() if flat else nn.AdaptiveAvgPool2d(1)
        self.out = nn.Linear(width * (16 if flat else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.pool(x).flatten(1))


@st.composite
def networks(draw: Any, makers: Sequence[Maker]) -> nn.Module:
    """A stem, two to five blocks and a head, for inputs ``[B, 3, 4, 4]``."""
    small = st.integers(0, 2)
    width = draw(st.sampled_from([4, 6, 8, 12]))
    chosen = draw(
        st.lists(st.tuples(st.sampled_from(makers), small, small), min_size=2, max_size=5)
    )
    blocks: list[nn.Module] = [conv(3, width)]
    for make, a, b in chosen:
        block, width = make(width, a, b) if width > 1 else plain(width, a, b)
        blocks.append(block)
    return distinct(nn.Sequential(*blocks, Head(width, draw(st.booleans()))))


def distinct(model: nn.Module) -> nn.Module:
    """Within a tensor no value occurs twice, so that each is known by its value; none is zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point():
                places = torch.randperm(tensor.numel(), generator=generator) + 1
                values = (places / tensor.numel()).reshape(tensor.shape)
                tensor.copy_(values + 0.5 if name.endswith("running_var") else values - 0.51)
    return model
