"""One row per layer type: which op it is, which parameters it passes, which attributes follow.

A row does not say how axes are carried: the rule of its op does. ``resize`` runs after the
parameters have been narrowed and sets the attributes that repeat their sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
Resize = Callable[[Any, tuple[int, ...], tuple[int, ...]], None]


def keep(module: nn.Module, before: tuple[int, ...], after: tuple[int, ...]) -> None:
    """No attribute repeats a width."""


@dataclass(frozen=True)
class Layer:
    """A row of the table.

    Attributes:
        op: the function whose rule says how axes are carried.
        operands: names of parameters and buffers, passed behind the inputs.
        before: attributes of the module, passed between the input and the operands.
        options: attributes of the module, passed as keywords.
        arguments: in place of all these, how the op's arguments follow from the layer, its
            parameters by name, and its inputs.
        resize: sets the module's attributes, given the shapes of its (first) input and output
            after narrowing, batch at its hint.
    """

    op: Callable[..., Any] | str
    operands: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    resize: Resize = keep
    before: tuple[str, ...] = ()
    arguments: Callable[..., dict[str, Any]] | None = None


LAYERS: dict[type[nn.Module] | str, Layer] = {}


def layer_of(module: nn.Module) -> Layer | None:
    """The row of a module's type, of the end of its name, or of the nearest base class."""
    for kind in type(module).__mro__:
        if kind in LAYERS:
            return LAYERS[kind]
        for name in LAYERS:
            if isinstance(name, str) and kind.__name__.endswith(name):
                return LAYERS[name]
    return None


def row(*kinds: type[nn.Module] | str, **fields: Any) -> None:
    """Add a row for the types (or, where they cannot be imported, the ends of their names)."""
    for kind in kinds:
        if kind in LAYERS:
            raise ValueError(f"{kind} has a row already")
        LAYERS[kind] = Layer(**fields)


def resize_linear(m: nn.Linear, before: tuple[int, ...], after: tuple[int, ...]) -> None:
    """``weight`` is ``[out, in]``."""
    m.out_features, m.in_features = m.weight.shape


def resize_convolution(m: Any, before: tuple[int, ...], after: tuple[int, ...]) -> None:
    """A depthwise convolution has as many groups as channels; other group counts stay."""
    channel = len(before) - len(m.kernel_size) - 1
    if m.groups == m.in_channels:
        m.groups = before[channel]
    m.in_channels, m.out_channels = before[channel], after[channel]


def resize_batch_norm(m: Any, before: tuple[int, ...], after: tuple[int, ...]) -> None:
    """Dimension 1 holds the channels."""
    m.num_features = after[1]


def resize_layer_norm(m: Any, before: tuple[int, ...], after: tuple[int, ...]) -> None:
    """The last dimensions are normalized."""
    m.normalized_shape = tuple(after[len(after) - len(m.normalized_shape) :])


def resize_group_norm(m: nn.GroupNorm, before: tuple[int, ...], after: tuple[int, ...]) -> None:
    """The number of groups stays."""
    m.num_channels = after[1]


def resize_embedding(m: Any, before: tuple[int, ...], after: tuple[int, ...]) -> None:
    """``weight`` is ``[vocabulary, width]``."""
    m.embedding_dim = m.weight.shape[1]


def resize_recurrent(m: nn.RNNBase, before: tuple[int, ...], after: tuple[int, ...]) -> None:
    """The hidden size is the recurrence's width."""
    m.hidden_size = m.get_parameter("weight_hh_l0").shape[1]
    m.input_size = m.get_parameter("weight_ih_l0").shape[1]


def resize_prelu(m: nn.PReLU, before: tuple[int, ...], after: tuple[int, ...]) -> None:
    """One slope per channel, or one for all."""
    m.num_parameters = m.weight.numel()


def resize_unflatten(m: nn.Unflatten, before: tuple[int, ...], after: tuple[int, ...]) -> None:
    """The sizes of the split dimension are written in the layer."""
    dim = int(m.dim) % len(before)
    m.unflattened_size = tuple(after[dim : dim + len(m.unflattened_size)])


def recurrent_arguments(
    m: nn.RNNBase, parameters: dict[str, Any], input: Any, state: Any = None
) -> dict[str, Any]:
    """The rule sees the parameters by name; projections have no rule."""
    if m.proj_size:
        raise NotImplementedError("proj_size")
    return {"input": input, "state": state, "parameters": parameters} | {
        "layers": m.num_layers,
        "directions": 2 if m.bidirectional else 1,
        "gates": {"LSTM": 4, "GRU": 3}.get(m.mode, 1),
    }


CONVOLUTION = {
    "operands": ("weight", "bias"),
    "options": ("groups", "stride", "padding"),
    "resize": resize_convolution,
}
BATCH_NORM = {
    "operands": ("running_mean", "running_var", "weight", "bias"),
    "resize": resize_batch_norm,
}

row(nn.Linear, op=F.linear, operands=("weight", "bias"), resize=resize_linear)
row(nn.Conv1d, op=F.conv1d, **CONVOLUTION)
row(nn.Conv2d, op=F.conv2d, **CONVOLUTION)
row(nn.Conv3d, op=F.conv3d, **CONVOLUTION)
row(nn.ConvTranspose1d, op=F.conv_transpose1d, **CONVOLUTION)
row(nn.ConvTranspose2d, op=F.conv_transpose2d, **CONVOLUTION)
row(nn.ConvTranspose3d, op=F.conv_transpose3d, **CONVOLUTION)
row(nn.Embedding, op=F.embedding, operands=("weight",), resize=resize_embedding)

row(*BATCH_NORMS, op=F.batch_norm, **BATCH_NORM)
row(
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    op=F.instance_norm,
    **BATCH_NORM,
)
row(
    nn.LayerNorm,
    op=F.layer_norm,
    before=("normalized_shape",),
    operands=("weight", "bias"),
    resize=resize_layer_norm,
)
row(
    nn.RMSNorm,
    op=F.rms_norm,
    before=("normalized_shape",),
    operands=("weight",),
    resize=resize_layer_norm,
)
row(
    nn.GroupNorm,
    op=F.group_norm,
    before=("num_groups",),
    operands=("weight", "bias"),
    resize=resize_group_norm,
)
row(nn.LocalResponseNorm, op=F.local_response_norm)
row(nn.PReLU, op=F.prelu, operands=("weight",), resize=resize_prelu)
row(
    *(nn.LSTM, nn.GRU, nn.RNN),
    op=torch.lstm,
    arguments=recurrent_arguments,
    resize=resize_recurrent,
)

for _name in (
    *("ReLU", "ReLU6", "LeakyReLU", "RReLU", "ELU", "CELU", "SELU", "GELU", "SiLU", "Mish"),
    *("Hardswish", "Tanh", "Tanhshrink", "Softsign", "Softshrink", "Hardshrink"),
    *("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "Identity"),
):
    row(getattr(nn, _name), op=F.relu)
for _name in (
    "Sigmoid",
    "Hardsigmoid",
    "LogSigmoid",
    "Softplus",
    "AlphaDropout",
    "FeatureAlphaDropout",
):
    row(getattr(nn, _name), op=F.logsigmoid)
for _k in (1, 2, 3):
    for _name in ("AvgPool", "MaxPool", "LPPool", "AdaptiveAvgPool", "AdaptiveMaxPool"):
        if hasattr(nn, f"{_name}{_k}d"):
            row(getattr(nn, f"{_name}{_k}d"), op=getattr(F, f"avg_pool{_k}d"))
row(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, op=F.interpolate)
row(nn.Softmax, nn.LogSoftmax, op=F.softmax, options=("dim",))
row(nn.GLU, op=F.glu, options=("dim",))
row(nn.Hardtanh, op=F.hardtanh, options=("min_val", "max_val"))
row(nn.Flatten, op=torch.flatten)
row(nn.Unflatten, op=torch.flatten, resize=resize_unflatten)
row(nn.PixelShuffle, op=F.pixel_shuffle, options=("upscale_factor",))
row(nn.PixelUnshuffle, op=F.pixel_unshuffle, options=("downscale_factor",))
row(nn.Unfold, op=F.unfold)
row(nn.Fold, op=F.fold)
for _k in (1, 2, 3):
    for _name in ("ZeroPad", "ConstantPad", "ReflectionPad", "ReplicationPad", "CircularPad"):
        if hasattr(nn, f"{_name}{_k}d"):
            row(getattr(nn, f"{_name}{_k}d"), op=getattr(F, f"avg_pool{_k}d"))
row("DropPath", "StochasticDepth", op=F.relu)


def register_layer(kind: type[nn.Module], **fields: Any) -> None:
    """Teach fxsvd a layer type of your own.

    Args:
        kind: the layer's class; it is kept whole by ``fxsvd.capture``.
        **fields: the fields of ``Layer``; ``op`` is any function with a rule.

    Raises:
        ValueError: the type has a row already.

    >>> class Scaled(nn.Linear):
    ...     def forward(self, x):
    ...         return 2 * super().forward(x)
    >>> register_layer(Scaled, op=F.linear, operands=("weight", "bias"), resize=resize_linear)
    >>> layer_of(Scaled(2, 3)).operands
    ('weight', 'bias')
    """
    row(kind, **fields)
    from fxsvd.capture import LEAF_TYPES

    LEAF_TYPES.add(kind)
