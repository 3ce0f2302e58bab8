"""Layers of every kind: convolutions, norms, activations, embeddings, raw parameters."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, weight_norm

from tests.helpers.nets.base import (
    IMAGE,
    OUTPUT,
    SEQUENCE,
    VECTOR,
    Net,
    floats,
    idiom,
    several,
    tokens,
)


def chain(m: Net, x: Tensor) -> Tensor:
    """The members one after the other."""
    for layer in m.children():
        x = layer(x)
    return x


def conv(i: int, o: int, k: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **options)  # type: ignore[arg-type]


def head(i: int, o: int = 3) -> nn.Sequential:
    """Global pooling and a classifier."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(i, o))


HEAD = {"head.2": (3, OUTPUT)}
OUT = {"out": (3, OUTPUT)}


# ---------------------------------------------------------------- linear and convolution


@idiom(VECTOR, {"a": (8, 4), "b": (12, 6), **OUT})
def linear_chain() -> nn.Module:
    return Net(
        chain, a=nn.Linear(7, 8), r=nn.ReLU(), b=nn.Linear(8, 12), s=nn.GELU(), out=nn.Linear(12, 3)
    )


@idiom(VECTOR, {"a": (9, 4), **OUT})
def linear_of_odd_width() -> nn.Module:
    return Net(chain, a=nn.Linear(7, 9, bias=False), r=nn.Tanh(), out=nn.Linear(9, 3))


@idiom(several(VECTOR, floats(4)), {"a": (8, 4), "mix": (6, 3), "out": (3, OUTPUT)})
def bilinear_by_hand() -> nn.Module:
    def run(m: Net, x: Tensor, y: Tensor) -> Tensor:
        return m.out(m.mix(m.a(x) * m.b(y)).relu())

    return Net(run, a=nn.Linear(7, 8), b=nn.Linear(4, 8), mix=nn.Linear(8, 6), out=nn.Linear(6, 3))


@idiom(floats(3, 16), {"a": (8, 4), "b": (6, 3), **OUT})
def convolution_1d() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        return m.out(m.b(m.n(m.a(x)).relu()).mean(-1))

    return Net(
        run, a=nn.Conv1d(3, 8, 3), n=nn.BatchNorm1d(8), b=nn.Conv1d(8, 6, 3), out=nn.Linear(6, 3)
    )


@idiom(IMAGE, {"a": (8, 4), "b": (12, 6), **HEAD})
def convolution_2d() -> nn.Module:
    return Net(
        chain,
        a=conv(3, 8),
        n=nn.BatchNorm2d(8),
        r=nn.ReLU6(),
        b=conv(8, 12, stride=2),
        head=head(12),
    )


@idiom(floats(2, 4, 6, 6), {"a": (8, 4), "b": (6, 3), **OUT})
def convolution_3d() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        return m.out(m.b(m.n(m.a(x)).relu()).mean((2, 3, 4)))

    return Net(
        run, a=nn.Conv3d(2, 8, 3), n=nn.BatchNorm3d(8), b=nn.Conv3d(8, 6, 1), out=nn.Linear(6, 3)
    )


@idiom(IMAGE, {"a": (8, 4), "b": (6, 3), "out": (3, OUTPUT)})
def transposed_convolution() -> nn.Module:
    return Net(
        chain,
        a=conv(3, 8),
        b=nn.ConvTranspose2d(8, 6, 2, stride=2),
        r=nn.SiLU(),
        out=nn.ConvTranspose2d(6, 3, 3),
    )


@idiom(IMAGE, {"a": (8, 4), "b": (12, 6), **HEAD})
def transposed_grouped_convolution() -> nn.Module:
    """Each group loses half of its inputs and half of its outputs."""
    return Net(
        chain,
        a=conv(3, 8),
        r=nn.ReLU(),
        b=nn.ConvTranspose2d(8, 12, 2, groups=2),
        s=nn.ReLU(),
        head=head(12),
    )


@idiom(IMAGE, {"a": (8, 4), "b": (12, 6), **HEAD})
def grouped_convolution() -> nn.Module:
    """Each of the two groups keeps two of its inputs and three of its outputs."""
    return Net(
        chain, a=conv(3, 8), r=nn.ReLU(), b=conv(8, 12, groups=2), s=nn.ReLU(), head=head(12)
    )


@idiom(IMAGE, {"a": (8, 4), "b": (12, 6), **HEAD})
def depthwise_convolution() -> nn.Module:
    return Net(
        chain,
        a=conv(3, 8),
        r=nn.ReLU(),
        depth=conv(8, 8, groups=8),
        b=conv(8, 12, 1),
        s=nn.ReLU(),
        head=head(12),
    )


@idiom(IMAGE, {"a": (8, 4), **HEAD})
def depthwise_with_multiplier() -> nn.Module:
    """An input takes both of its outputs along."""
    return Net(
        chain, a=conv(3, 8), r=nn.ReLU(), depth=conv(8, 16, groups=8), s=nn.ReLU(), head=head(16)
    )


@idiom(IMAGE, {"a": (8, 4), **HEAD})
def depthwise_transposed_with_multiplier() -> nn.Module:
    depth = nn.ConvTranspose2d(8, 16, 2, stride=2, groups=8)
    return Net(chain, a=conv(3, 8), r=nn.ReLU(), depth=depth, s=nn.ReLU(), head=head(16))


@idiom(IMAGE, {"b": (8, 4), **HEAD})
def depthwise_on_the_input() -> nn.Module:
    return Net(chain, depth=conv(3, 9, groups=3), b=conv(9, 8), head=head(8))


@idiom(IMAGE, {"a": (8, 4), "b": (6, 3), **HEAD})
def functional_convolution() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        y = F.relu(F.conv2d(x, m.a, m.bias, padding=1))
        return m.head(F.conv2d(F.conv2d(y, m.depth, None, 1, 1, 1, 8), m.b))

    return Net(
        run,
        a=nn.Parameter(torch.zeros(8, 3, 3, 3)),
        bias=nn.Parameter(torch.zeros(8)),
        depth=nn.Parameter(torch.zeros(8, 1, 3, 3)),
        b=nn.Parameter(torch.zeros(6, 8, 1, 1)),
        head=head(6),
    )


# ---------------------------------------------------------------- norms and activations


@idiom(IMAGE, {"a": (8, 4), "b": (12, 6), **HEAD})
def norms_of_images() -> nn.Module:
    """Two groups of four; a norm per channel."""
    return Net(
        chain,
        a=conv(3, 8),
        g=nn.GroupNorm(2, 8),
        p=nn.PReLU(8),
        b=conv(8, 12),
        i=nn.InstanceNorm2d(12, affine=True, track_running_stats=True),
        q=nn.PReLU(),
        head=head(12),
    )


@idiom(IMAGE, {"a": (8, 4), **HEAD})
def group_norm_over_everything() -> nn.Module:
    return Net(chain, a=conv(3, 8), g=nn.GroupNorm(1, 8), r=nn.Hardswish(), head=head(8))


@idiom(IMAGE, {"a": (8, 4), **HEAD})
def group_norm_per_channel_pair() -> nn.Module:
    return Net(chain, a=conv(3, 8), g=nn.GroupNorm(4, 8), r=nn.ReLU(), head=head(8))


@idiom(IMAGE, {"a": (8, "has a fixed number of groups"), **HEAD})
def group_norm_of_single_channels() -> nn.Module:
    """Nothing can go: each group has one channel, and their number is fixed."""
    return Net(chain, a=conv(3, 8), g=nn.GroupNorm(8, 8), r=nn.ReLU(), head=head(8))


@idiom(SEQUENCE, {"a": (8, 4), "b": (12, 6), "out": (3, OUTPUT)})
def norms_of_sequences() -> nn.Module:
    return Net(
        chain,
        a=nn.Linear(5, 8),
        n=nn.LayerNorm(8),
        r=nn.GELU(),
        b=nn.Linear(8, 12),
        s=nn.RMSNorm(12),
        out=nn.Linear(12, 3),
    )


@idiom(IMAGE, {"a": (8, 4), "b": (6, 3), **HEAD})
def layer_norm_channels_first() -> nn.Module:
    """ConvNeXt's: permute, normalize, permute back."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.n(m.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return m.head(m.b(y.relu()))

    return Net(run, a=conv(3, 8), n=nn.LayerNorm(8), b=conv(8, 6), head=head(6))


@idiom(IMAGE, {"a": (8, 4), "b": (6, 3), **HEAD}, masked=False)
def layer_norm_by_hand() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        u = y.mean(1, keepdim=True)
        s = (y - u).pow(2).mean(1, keepdim=True)
        y = (y - u) / torch.sqrt(s + 1e-6)
        return m.head(m.b((m.gain[:, None, None] * y + m.shift[:, None, None]).relu()))

    gain, shift = (nn.Parameter(torch.zeros(8)) for _ in range(2))
    return Net(run, a=conv(3, 8), gain=gain, shift=shift, b=conv(8, 6), head=head(6))


@idiom(IMAGE, {"a": (8, 4), **HEAD}, masked=False)
def functional_norms() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        y = F.group_norm(m.a(x), 2, m.gain, m.shift).relu()
        y = F.layer_norm(y.transpose(1, 3), (8,), m.gain, m.shift).transpose(1, 3)
        return m.head(F.instance_norm(y))

    gain, shift = (nn.Parameter(torch.zeros(8)) for _ in range(2))
    return Net(run, a=conv(3, 8), gain=gain, shift=shift, head=head(8))


@idiom(IMAGE, {"a": (8, 4), **HEAD})
def layer_norm_over_positions_too() -> nn.Module:
    """A raw weight over channels, height and width loses channels only."""

    def run(m: Net, x: Tensor) -> Tensor:
        return m.head(m.n(m.a(x)).relu())

    return Net(run, a=conv(3, 8), n=nn.LayerNorm((8, 8, 8)), head=head(8))


@idiom(SEQUENCE, {"a": (8, 4), **OUT}, masked=False)
def rms_norm_by_hand() -> nn.Module:
    """LLaMA's."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return m.out(m.gain * y)

    return Net(run, a=nn.Linear(5, 8), gain=nn.Parameter(torch.zeros(8)), out=nn.Linear(8, 3))


def old_weight_norm(layer: nn.Module) -> nn.Module:
    """``torch.nn.utils.weight_norm``, which says that it is deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return weight_norm(layer)


@idiom(IMAGE, {"a": (8, 4), "b": (6, 3), **HEAD}, masked=False)
def weight_norm_old() -> nn.Module:
    """PyTorch cannot copy such a module, so there is no mask of it; its graph can be copied."""
    with_norm = old_weight_norm(conv(3, 8)), old_weight_norm(conv(8, 6))
    return Net(chain, a=with_norm[0], r=nn.ReLU(), b=with_norm[1], s=nn.ReLU(), head=head(6))


@idiom(
    IMAGE,
    {
        "a.parametrizations.weight.original1": (8, 4),
        "b.parametrizations.weight.original1": (6, 3),
        **HEAD,
    },
)
def weight_norm_parametrized() -> nn.Module:
    return Net(
        chain,
        a=parametrizations.weight_norm(conv(3, 8)),
        r=nn.ReLU(),
        b=parametrizations.weight_norm(conv(8, 6)),
        s=nn.ReLU(),
        head=head(6),
    )


class StandardizedConv2d(nn.Conv2d):
    """timm's and BiT's: the weight has zero mean and unit variance over each output."""

    def forward(self, x: Tensor) -> Tensor:
        w = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0
        ).reshape_as(self.weight)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class StandardizedByHand(nn.Conv2d):
    """The same with var_mean."""

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, unbiased=False)
        w = (self.weight - mean) / torch.sqrt(variance + 1e-6)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


@idiom(IMAGE, {"a": (8, 4), "b": (6, 3), **HEAD}, masked=False)
def weight_standardized_convolution() -> nn.Module:
    a, b = (StandardizedConv2d(i, o, 3, padding=1) for i, o in ((3, 8), (8, 6)))
    return Net(chain, a=a, r=nn.ReLU(), b=b, s=nn.ReLU(), head=head(6))


@idiom(IMAGE, {"a": (8, 4), "b": (6, 3), **HEAD}, masked=False)
def weight_standardized_by_hand() -> nn.Module:
    a, b = (StandardizedByHand(i, o, 3, padding=1) for i, o in ((3, 8), (8, 6)))
    return Net(chain, a=a, r=nn.ReLU(), b=b, s=nn.ReLU(), head=head(6))


class ScaledStdConv2d(nn.Conv2d):
    """As in NFNets: batch norm over the flattened kernel, with a gain per output."""

    def __init__(self, i: int, o: int, k: int) -> None:
        super().__init__(i, o, k, padding=k // 2)
        self.gain = nn.Parameter(torch.rand(o, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        flat, gain = self.weight.reshape(1, self.out_channels, -1), (self.gain * 0.3).view(-1)
        weight = F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, padding=self.padding)


@idiom(IMAGE, {"a": (8, 4), "b": (6, 3), **HEAD}, masked=False)
def scaled_weight_standardization() -> nn.Module:
    a, b = ScaledStdConv2d(3, 8, 3), ScaledStdConv2d(8, 6, 3)
    return Net(chain, a=a, r=nn.ReLU(), b=b, s=nn.ReLU(), head=head(6))


@idiom(SEQUENCE, {"a": (8, 4), **OUT})
def convolution_over_a_stack() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        streams = torch.stack([m.a(x).mean(1), m.b(x).amax(1)], dim=1)
        return m.out(m.mix(streams).squeeze(1))

    a, b = nn.Linear(5, 8), nn.Linear(5, 8)
    return Net(run, a=a, b=b, mix=nn.Conv1d(2, 1, 1), out=nn.Linear(8, 3))


# ---------------------------------------------------------------- raw parameters and embeddings


@idiom(IMAGE, {"a": (8, 4), **HEAD})
def layer_scale_and_buffers() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        y = (m.a(x) - m.mean.view(1, -1, 1, 1)) / m.std[:, None, None]
        return m.head(y + m.gamma.reshape(1, 8, 1, 1) * y.sigmoid())

    return Net(
        run,
        a=conv(3, 8),
        gamma=nn.Parameter(torch.zeros(8)),
        mean=torch.zeros(8),
        std=torch.ones(8),
        head=head(8),
    )


@idiom(tokens(6), {"words": (8, 4), "b": (12, 6), **OUT})
def embedding_and_positions() -> nn.Module:
    """A learned position table, and a fixed sinusoidal buffer."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.words(x) + m.positions[:, : x.shape[1]] + m.waves[: x.size(1)]
        return m.out(m.b(y).relu().mean(1))

    return Net(
        run,
        words=nn.Embedding(11, 8),
        positions=nn.Parameter(torch.zeros(1, 10, 8)),
        waves=torch.zeros(10, 8),
        b=nn.Linear(8, 12),
        out=nn.Linear(12, 3),
    )


@idiom(tokens(6), {"words": (8, 4), **OUT})
def position_embedding_by_arange() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        place = torch.arange(x.shape[1], device=x.device)
        return m.out(m.norm(m.words(x) * 2.0 + m.places(place)[None]))

    return Net(
        run,
        words=nn.Embedding(11, 8),
        places=nn.Embedding(10, 8),
        norm=nn.LayerNorm(8),
        out=nn.Linear(8, 3),
    )


@idiom(IMAGE, {"patches": (8, 4), "mlp": (12, 6), **OUT})
def class_token_of_patches() -> nn.Module:
    """A ViT's stem: patches, class token by expand and cat, positions; the token is read out."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.patches(x).flatten(2).transpose(1, 2)
        y = torch.cat([m.token.expand(x.shape[0], -1, -1), y], dim=1) + m.positions
        y = y + m.back(F.gelu(m.mlp(m.norm(y))))
        return m.out(y[:, 0])

    return Net(
        run,
        patches=nn.Conv2d(3, 8, 4, stride=4),
        token=nn.Parameter(torch.zeros(1, 1, 8)),
        positions=nn.Parameter(torch.zeros(1, 5, 8)),
        norm=nn.LayerNorm(8),
        mlp=nn.Linear(8, 12),
        back=nn.Linear(12, 8),
        out=nn.Linear(8, 3),
    )


@idiom(floats(3), {"style": (6, 3), "b": (8, 4), **OUT})
def learned_constant_input() -> nn.Module:
    """A generator's learned start, repeated over the batch, scaled by a style."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.start.repeat(x.shape[0], 1, 1, 1)
        y = m.b(y * m.style(x)[:, :, None, None])
        return m.out(y.relu().mean((2, 3)))

    return Net(
        run,
        start=nn.Parameter(torch.zeros(1, 6, 4, 4)),
        style=nn.Linear(3, 6),
        b=conv(6, 8),
        out=nn.Linear(8, 3),
    )


# ---------------------------------------------------------------- matrix products


@idiom(VECTOR, {"w": (8, 4), "v": (6, 3), "u": (3, OUTPUT)})
def raw_matrices() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        y = F.relu(x @ m.w + m.b)
        return torch.matmul(F.linear(y, m.v), m.u)

    return Net(
        run,
        w=nn.Parameter(torch.zeros(7, 8)),
        b=nn.Parameter(torch.zeros(8)),
        v=nn.Parameter(torch.zeros(6, 8)),
        u=nn.Parameter(torch.zeros(6, 3)),
    )


@idiom(SEQUENCE, {"w": (8, 4), "v": (6, 3), "u": (3, OUTPUT)})
def einsum_with_raw_matrices() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        y = torch.einsum("bld,dk->blk", x, m.w).relu()
        y = torch.einsum("...k,jk->...j", y, m.v)
        return torch.einsum("blj,jo->blo", y, m.u)

    return Net(
        run,
        w=nn.Parameter(torch.zeros(5, 8)),
        v=nn.Parameter(torch.zeros(6, 8)),
        u=nn.Parameter(torch.zeros(6, 3)),
    )


@idiom(SEQUENCE, {"w": (8, 4), "out": (3, OUTPUT)})
def addmm_and_bmm() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        y = torch.addmm(m.b, x.reshape(-1, 5), m.w).view(-1, 6, 8)
        scores = torch.bmm(y, y.transpose(1, 2)).softmax(-1)
        return m.out(torch.bmm(scores, y))

    return Net(
        run,
        w=nn.Parameter(torch.zeros(5, 8)),
        b=nn.Parameter(torch.zeros(8)),
        out=nn.Linear(8, 3),
    )


@idiom(
    SEQUENCE,
    {
        "a": (8, 4),
        "gate": (4, "mixes along it"),
        "experts#1": (4, "ties it to an axis of fixed width"),
        "experts#2": (12, 6),
        **OUT,
    },
)
def mixture_of_experts_by_einsum() -> nn.Module:
    """Every expert runs, a softmax weighs them: the features of each can go, the experts stay."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        gate = m.gate(y).softmax(-1)
        z = torch.einsum("bld,edh->bleh", y, m.experts).relu()
        return m.out(torch.einsum("bleh,ble->blh", z, gate))

    return Net(
        run,
        a=nn.Linear(5, 8),
        gate=nn.Linear(8, 4),
        experts=nn.Parameter(torch.zeros(4, 8, 12)),
        out=nn.Linear(12, 3),
    )


# ---------------------------------------------------------------- dropout


@idiom(VECTOR, {"a": (8, 4), "b": (12, 6), **OUT})
def functional_dropout() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        y = F.dropout(m.a(x).relu(), 0.5, m.training)
        return m.out(F.dropout(m.b(y), p=0.2, training=m.training))

    return Net(run, a=nn.Linear(7, 8), b=nn.Linear(8, 12), out=nn.Linear(12, 3))
