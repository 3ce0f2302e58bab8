"""Channels on the move: reshapes, joins, splits, shifts, shuffles, subscripts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers.nets.base import IMAGE, OUTPUT, SEQUENCE, VECTOR, Net, floats, idiom
from tests.helpers.nets.layers import HEAD, OUT, chain, conv, head

INPUT = "it is joined with the network's input"


# ---------------------------------------------------------------- flatten


@idiom(floats(3, 4, 4), {"a": (8, 4), **OUT})
def flatten_channels_first() -> nn.Module:
    return Net(chain, a=conv(3, 8), r=nn.ReLU(), f=nn.Flatten(), out=nn.Linear(8 * 16, 3))


@idiom(floats(3, 4, 4), {"a": (8, 4), **OUT})
def flatten_channels_last() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        return m.out(m.a(x).relu().permute(0, 2, 3, 1).reshape(x.shape[0], -1))

    return Net(run, a=conv(3, 8), out=nn.Linear(8 * 16, 3))


@idiom(floats(3, 4, 4), {"a": (8, 4), "fc": (6, 3), **OUT})
def flatten_with_literal_size() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x).relu().view(-1, 8 * 4 * 4)
        return m.out(m.fc(y).relu())

    return Net(run, a=conv(3, 8), fc=nn.Linear(8 * 16, 6), out=nn.Linear(6, 3))


@idiom(floats(5), {"a": (8, 4), "b": (6, 3), **OUT})
def unflatten_after_linear() -> nn.Module:
    """A decoder: the linear's outputs become channels and positions; a channel goes as a whole."""

    def run(m: Net, x: Tensor) -> Tensor:
        return m.out(m.b(m.u(m.a(x)).relu()).relu().flatten(2).mean(-1))

    return Net(
        run, a=nn.Linear(5, 128), u=nn.Unflatten(1, (8, 4, 4)), b=conv(8, 6), out=nn.Linear(6, 3)
    )


@idiom(VECTOR, {"a": (12, 4), **OUT}, masked=False)
def maxout() -> nn.Module:
    """Every unit keeps one of its three pieces."""

    def run(m: Net, x: Tensor) -> Tensor:
        return m.out(m.a(x).view(-1, 4, 3).amax(-1))

    return Net(run, a=nn.Linear(7, 12), out=nn.Linear(4, 3))


@idiom(VECTOR, {"a": (6, 3), **OUT})
def maxout_of_halves() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        left, right = m.a(x).chunk(2, dim=1)
        return m.out(torch.maximum(left, right))

    return Net(run, a=nn.Linear(7, 12), out=nn.Linear(6, 3))


# ---------------------------------------------------------------- joining


@idiom(IMAGE, {"a": (8, 4), "b": (6, 3), "c": (4, 2), **HEAD})
def cat_of_branches() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        return m.head(m.c(torch.cat([m.b(y), y], 1)).relu())

    return Net(run, a=conv(3, 8), b=conv(8, 6), c=conv(14, 4), head=head(4))


@idiom(IMAGE, {"a": (8, 4), "b": (6, 3), **HEAD})
def cat_with_the_input() -> nn.Module:
    """The input's three channels stay, the others go."""

    def run(m: Net, x: Tensor) -> Tensor:
        return m.head(m.b(m.n(torch.cat((x, m.a(x)), dim=1))).relu())

    return Net(run, a=conv(3, 8), n=nn.BatchNorm2d(11), b=conv(11, 6), head=head(6))


@idiom(IMAGE, {"a": (4, 2), "b": (4, 2), "c": (4, 2), **HEAD})
def dense_block() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        for n, layer in ((m.n1, m.b), (m.n2, m.c)):
            y = torch.cat([y, layer(n(y).relu())], 1)
        return m.head(y)

    return Net(
        run,
        a=conv(3, 4),
        n1=nn.BatchNorm2d(4),
        b=conv(4, 4),
        n2=nn.BatchNorm2d(8),
        c=conv(8, 4),
        head=head(12),
    )


@idiom(VECTOR, {"a": (8, 4), **OUT})
def stack_and_mean() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        y = torch.stack([m.a(x), m.b(x), m.c(x)], dim=1)
        return m.out((y * m.weights.softmax(0)[:, None]).sum(1))

    layers = {name: nn.Linear(7, 8) for name in "abc"}
    return Net(run, **layers, weights=nn.Parameter(torch.zeros(3)), out=nn.Linear(8, 3))


@idiom(IMAGE, {"a": (8, 4), "b#1": (8, 4), **HEAD})
def option_a_shortcut() -> nn.Module:
    """ResNet's zero-padded shortcut: what is added is what the padding keeps."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        return m.head((m.b(y) + F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))).relu())

    return Net(run, a=conv(3, 8), b=conv(8, 16, stride=2), head=head(16))


# ---------------------------------------------------------------- splitting


@idiom(IMAGE, {"a#1": (4, 2), "a#2": (4, 2), "b": (4, 2), **HEAD})
def split_in_two() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        left, right = torch.split(m.a(x).relu(), 4, dim=1)
        return m.head(torch.cat([left, m.b(right)], 1))

    return Net(run, a=conv(3, 8), b=conv(4, 4), head=head(8))


@idiom(IMAGE, {"a#1": (2, 1), "a#2": (6, 3), "a#3": (4, 2), "b": (4, 2), "c": (6, 3), **HEAD})
def split_in_unequal_parts() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        p, q, r = m.a(x).relu().split([2, 6, 4], dim=1)
        return m.head(torch.cat([p, m.b(q), m.c(r)], 1))

    return Net(run, a=conv(3, 12), b=conv(6, 4), c=conv(4, 6), head=head(12))


@idiom(IMAGE, {"a": (4, 2), "b": (6, 3), **HEAD})
def chunk_in_three() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        p, q, r = m.a(x).chunk(3, 1)
        return m.head(m.b(p * q.sigmoid() + r))

    return Net(run, a=conv(3, 12), b=conv(4, 6), head=head(6))


@idiom(IMAGE, {"a#1": (3, 1), "a#2": (5, 2), "b": (6, 3), **HEAD})
def slices_with_literals() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        return m.head(torch.cat([y[:, :3], m.b(y[:, 3:])], 1))

    return Net(run, a=conv(3, 8), b=conv(5, 6), head=head(9))


@idiom(VECTOR, {"a": (4, 2), "b": (6, 3), **OUT})
def strided_slices() -> nn.Module:
    """Even and odd channels go in pairs of neighbours or each by itself, never mispaired."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.out(m.b(y[:, 0::2] * y[:, 1::2].tanh()))

    return Net(run, a=nn.Linear(7, 8), b=nn.Linear(4, 6), out=nn.Linear(6, 3))


@idiom(VECTOR, {"a": (4, 2), **OUT})
def unbind_rows() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        p, q, r = m.a(x).view(-1, 3, 4).unbind(1)
        return m.out(p * q + r)

    return Net(run, a=nn.Linear(7, 12), out=nn.Linear(4, 3))


@idiom(VECTOR, {"a": (6, 3), **OUT})
def select_rows() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x).unflatten(-1, (2, 6))
        return m.out(y[:, 0] * y.select(1, 1).sigmoid())

    return Net(run, a=nn.Linear(7, 12), out=nn.Linear(6, 3))


# ---------------------------------------------------------------- moving


@idiom(VECTOR, {"a": (8, 4), **OUT})
def roll_channels() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        return m.out(torch.roll(m.a(x), 3, dims=1).relu())

    return Net(run, a=nn.Linear(7, 8), out=nn.Linear(8, 3))


@idiom(VECTOR, {"a": (4, 2), **OUT})
def flip_channels() -> nn.Module:
    """A residual over the flipped: channel i goes with channel 7 - i."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.out(y + y.flip(1).relu())

    return Net(run, a=nn.Linear(7, 8), out=nn.Linear(8, 3))


@idiom(VECTOR, {"a": (8, 4), "b": (6, 3), **OUT})
def permuting_index_buffer() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)[:, m.order].relu()
        return m.out(m.b(y).index_select(1, m.other))

    order, other = torch.tensor([3, 0, 7, 5, 1, 6, 2, 4]), torch.tensor([5, 4, 0, 1, 2, 3])
    return Net(
        run, a=nn.Linear(7, 8), b=nn.Linear(8, 6), order=order, other=other, out=nn.Linear(6, 3)
    )


@idiom(IMAGE, {"a": (8, 4), "c": (6, 3), **HEAD})
def tiled_skips() -> nn.Module:
    """The image's colours tiled to eight channels, and these to twelve: both cut a tile."""

    def run(m: Net, x: Tensor) -> Tensor:
        x = (x.repeat(1, 3, 1, 1)[:, :8] + m.a(x)).relu()
        x = torch.tile(x, (1, 2, 1, 1))[:, :12] + m.b(m.c(x).relu())
        return m.head(x.relu())

    return Net(run, a=conv(3, 8), b=conv(6, 12), c=conv(8, 6), head=head(12))


@idiom(VECTOR, {"a": (8, 4), **OUT})
def tile_that_nobody_writes() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        return m.out(m.a(x).relu().repeat(1, 3)[:, 4:20])

    return Net(run, a=nn.Linear(7, 8), out=nn.Linear(16, 3))


@idiom(VECTOR, {"a": (8, 4), "b": (6, 3), **OUT})
def indices_that_come_again() -> nn.Module:
    """Of an input, and of channels."""

    def run(m: Net, x: Tensor) -> Tensor:
        x = x.index_select(1, m.colours) + m.a(x)
        return m.out(torch.index_select(x, 1, m.order) + m.c(m.b(x)))

    return Net(
        run,
        a=nn.Linear(7, 8),
        b=nn.Linear(8, 6),
        c=nn.Linear(6, 10),
        out=nn.Linear(10, 3),
        colours=torch.tensor([3, 0, 3, 6, 1, 1, 2, 5]),
        order=torch.tensor([0, 5, 5, 3, 1, 2, 4, 6, 7, 0]),
    )


@idiom(SEQUENCE, {"a": (8, 4), **OUT})
def tiled_tokens() -> nn.Module:
    """Nothing of them is free to go, and nothing else is the less so."""

    def run(m: Net, x: Tensor) -> Tensor:
        return m.out(m.a(x.repeat(1, 2, 1)).relu().flatten(1))

    return Net(run, a=nn.Linear(5, 8), out=nn.Linear(96, 3))


@idiom(VECTOR, {"a": (10, 5), **OUT})
def tile_by_keyword() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        return m.out((torch.tile(x, dims=(2,))[:, :10] + m.a(x)).relu())

    return Net(run, a=nn.Linear(7, 10), out=nn.Linear(10, 3))


@idiom(IMAGE, {"a": (8, 4), **HEAD})
def tiled_pixels() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        return m.head(m.a(x.repeat(1, 1, 1, 2)).relu())

    return Net(run, a=conv(3, 8), head=head(8))


@idiom(IMAGE, {"a": (8, 4), **HEAD})
def shifted_channels() -> nn.Module:
    """A shift network: parts of the channels are rolled along positions."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        left, rest = y[:, :2], y[:, 2:]
        return m.head(torch.cat([torch.roll(left, (1, -1), (2, 3)), rest], 1))

    return Net(run, a=conv(3, 8), head=head(8))


@idiom(IMAGE, {"a": (8, 4), "b": (8, 4), **HEAD})
def channel_shuffle_by_hand() -> nn.Module:
    """Both grouped convolutions keep equally many in each of their groups."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return m.head(m.b(y).relu())

    return Net(run, a=conv(3, 8), b=conv(8, 8, groups=2), head=head(8))


@idiom(IMAGE, {"a": (8, 4), "b": (8, 4), **HEAD})
def channel_shuffle_layer() -> nn.Module:
    return Net(
        chain,
        a=conv(3, 8),
        r=nn.ReLU(),
        s=nn.ChannelShuffle(2),
        b=conv(8, 8, groups=2),
        t=nn.ReLU(),
        head=head(8),
    )


@idiom(IMAGE, {"a": (4, 2), "b": (6, 3), **HEAD})
def pixel_shuffle() -> nn.Module:
    """The four channels that make one go together."""
    return Net(chain, a=conv(3, 16), s=nn.PixelShuffle(2), b=conv(4, 6), r=nn.ReLU(), head=head(6))


@idiom(IMAGE, {"a": (4, 2), "b": (6, 3), **HEAD})
def pixel_unshuffle() -> nn.Module:
    return Net(
        chain, a=conv(3, 4), s=nn.PixelUnshuffle(2), b=conv(16, 6), r=nn.ReLU(), head=head(6)
    )


@idiom(IMAGE, {"a": (4, 2), "b": (6, 3), **HEAD})
def space_to_depth() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        n, c, h, w = y.size()
        y = y.view(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).contiguous()
        return m.head(m.b(y.view(n, c * 4, h // 2, w // 2)).relu())

    return Net(run, a=conv(3, 4), b=conv(16, 6), head=head(6))


@idiom(IMAGE, {"a": (4, 2), "b": (6, 3), **HEAD})
def space_to_depth_by_slices() -> nn.Module:
    """YOLO's focus."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        parts = [y[..., i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return m.head(m.b(torch.cat(parts, 1)).relu())

    return Net(run, a=conv(3, 4), b=conv(16, 6), head=head(6))


# ---------------------------------------------------------------- writing in place


@idiom(IMAGE, {"a#1": (4, 2), "a#2": (4, 2), **HEAD})
def slice_written_in_place() -> nn.Module:
    """FasterNet's partial convolution in its forward for inference."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        z = y.clone()
        z[:, :4] = m.part(y[:, :4])
        return m.head(z.relu())

    return Net(run, a=conv(3, 8), part=conv(4, 4), head=head(8))


@idiom(IMAGE, {"a": (8, 4), **HEAD})
def zeros_filled_by_slices() -> nn.Module:
    """TSM's shift: a buffer of zeros is filled part by part."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        z = torch.zeros_like(y)
        z[:, :2, :, :-1] = y[:, :2, :, 1:]
        z[:, 2:4, :, 1:] = y[:, 2:4, :, :-1]
        z[:, 4:] = y[:, 4:]
        return m.head(z)

    return Net(run, a=conv(3, 8), head=head(8))


@idiom(VECTOR, {"a": (8, 4), "b": (6, 3), **OUT})
def in_place_ops() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        y += m.c(x)
        y.mul_(2.0).add_(0.5).relu_()
        z = m.b(y)
        F.relu(z, inplace=True)
        return m.out(z)

    return Net(run, a=nn.Linear(7, 8), b=nn.Linear(8, 6), c=nn.Linear(7, 8), out=nn.Linear(6, 3))


# ---------------------------------------------------------------- positions


@idiom(IMAGE, {"a": (8, 4), "b": (6, 3), "c": (8, 4), **HEAD})
def u_net() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        z = m.b(F.max_pool2d(y, 2)).relu()
        z = F.interpolate(z, size=y.shape[-2:], mode="bilinear", align_corners=False)
        return m.head(m.c(torch.cat([y, z], 1)))

    return Net(run, a=conv(3, 8), b=conv(8, 6), c=conv(14, 8), head=head(8))


@idiom(IMAGE, {"a": (8, 4), "b": (6, 3), **HEAD})
def upsampling_layer_and_padding() -> nn.Module:
    return Net(
        chain,
        a=conv(3, 8),
        u=nn.Upsample(scale_factor=2),
        p=nn.ReflectionPad2d(1),
        b=conv(8, 6),
        head=head(6),
    )


@idiom(
    SEQUENCE, {"a": (8, 4), "time": (4, 2), "back": (6, "ties it to an axis of fixed width"), **OUT}
)
def mixer_over_positions() -> nn.Module:
    """An MLP over positions: its hidden width goes, the number of positions stays."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        y = y + m.back(m.time(y.transpose(1, 2)).relu()).transpose(1, 2)
        return m.out(y.mean(1))

    return Net(
        run, a=nn.Linear(5, 8), time=nn.Linear(6, 4), back=nn.Linear(4, 6), out=nn.Linear(8, 3)
    )


@idiom(VECTOR, {"a": (8, OUTPUT)})
def output_is_the_space() -> nn.Module:
    return Net(lambda m, x: m.a(x).relu(), a=nn.Linear(7, 8))


@idiom(VECTOR, {"a": (7, "ties it to an axis of fixed width"), **OUT})
def residual_with_the_input() -> nn.Module:
    return Net(lambda m, x: m.out(x + m.a(x)), a=nn.Linear(7, 7), out=nn.Linear(7, 3))
