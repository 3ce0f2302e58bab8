"""An oracle for every row of the layer table; a row that has no case fails here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxsvd
from fxsvd.capture import LEAF_TYPES
from fxsvd.layers import LAYERS, Layer, layer_of, row
from fxsvd.passes import Prune
from tests.helpers.nets import IDIOMS
from tests.helpers.nets.base import Net, randomized
from tests.helpers.oracle import Case, check, network


def flat(make: Callable[[], nn.Module], *, nudge: bool = True, **options: Any) -> Case:
    """Over ``[B, 8]``."""
    return Case(lambda op, x, y, m: m.layer(x), nudge=nudge, members={"layer": make}, **options)


def image(make: Callable[[], nn.Module], *, nudge: bool = True, **options: Any) -> Case:
    """Over ``[B, 8, 4, 4]``."""
    return flat(make, nudge=nudge, image=True, **options)


def line(make: Callable[[], nn.Module], *, nudge: bool = True, **options: Any) -> Case:
    """Over ``[B, 8, 16]``."""
    use = lambda op, x, y, m: m.layer(x.flatten(2))  # noqa: E731 (a line of a table)
    return Case(use, nudge=nudge, image=True, members={"layer": make}, **options)


def volume(make: Callable[[], nn.Module], *, nudge: bool = True, **options: Any) -> Case:
    """Over ``[B, 8, 2, 4, 4]``."""
    use = lambda op, x, y, m: m.layer(torch.stack([x, y], 2))  # noqa: E731 (a line of a table)
    return Case(use, nudge=nudge, image=True, members={"layer": make}, **options)


OVER = {1: line, 2: image, 3: volume}

CASES: dict[str, Case] = {
    "Linear": flat(lambda: nn.Linear(8, 6), nudge=False),
    "LayerNorm": flat(lambda: nn.LayerNorm(8), nudge=False),
    "RMSNorm": flat(lambda: nn.RMSNorm(8), nudge=False),
    "GroupNorm": flat(lambda: nn.GroupNorm(2, 8), nudge=False),
    "SyncBatchNorm": image(lambda: nn.SyncBatchNorm(8)),
    "LocalResponseNorm": image(
        lambda: nn.LocalResponseNorm(3),
        nudge=False,
        narrowed=False,
        why="mixes neighbouring channels",
    ),
    "PReLU": flat(lambda: nn.PReLU(8)),
    "Embedding": Case(
        lambda op, x, y, m: x + m.layer(torch.ones_like(y[:, 0]).long()),
        nudge=False,
        members={"layer": lambda: nn.Embedding(4, 8)},
    ),
    "Softmax": flat(lambda: nn.Softmax(1), nudge=False, narrowed=False, why="mixes along it"),
    "LogSoftmax": flat(lambda: nn.LogSoftmax(1), nudge=False, narrowed=False, why="mixes along it"),
    "GLU": flat(lambda: nn.GLU(1)),
    "Hardtanh": flat(lambda: nn.Hardtanh(-0.5, 0.5)),
    "Flatten": image(nn.Flatten),
    "Unflatten": flat(lambda: nn.Unflatten(1, (2, 4))),
    "PixelShuffle": image(lambda: nn.PixelShuffle(2)),
    "PixelUnshuffle": image(lambda: nn.PixelUnshuffle(2)),
    "Unfold": image(lambda: nn.Unfold(2)),
    "Fold": Case(
        lambda op, x, y, m: m.layer(m.unfold(x)),
        image=True,
        members={"unfold": lambda: nn.Unfold(2), "layer": lambda: nn.Fold((4, 4), 2)},
    ),
    "Upsample": image(lambda: nn.Upsample(scale_factor=2)),
    "UpsamplingNearest2d": image(lambda: nn.UpsamplingNearest2d(scale_factor=2)),
    "UpsamplingBilinear2d": image(lambda: nn.UpsamplingBilinear2d(scale_factor=2)),
}
for _k, _over in OVER.items():
    CASES[f"Conv{_k}d"] = _over(lambda k=_k: getattr(nn, f"Conv{k}d")(8, 6, 1), nudge=False)
    CASES[f"ConvTranspose{_k}d"] = _over(
        lambda k=_k: getattr(nn, f"ConvTranspose{k}d")(8, 6, 1, groups=2), nudge=False
    )
    CASES[f"BatchNorm{_k}d"] = _over(lambda k=_k: getattr(nn, f"BatchNorm{k}d")(8))
    CASES[f"InstanceNorm{_k}d"] = _over(
        lambda k=_k: getattr(nn, f"InstanceNorm{k}d")(8, affine=True, track_running_stats=True)
    )
    for _name in ("AvgPool", "MaxPool", "AdaptiveAvgPool", "AdaptiveMaxPool"):
        CASES[f"{_name}{_k}d"] = _over(lambda n=_name, k=_k: getattr(nn, f"{n}{k}d")(2))
    CASES[f"LPPool{_k}d"] = _over(lambda k=_k: getattr(nn, f"LPPool{k}d")(2.0, 2))
    for _name in ("ZeroPad", "ReflectionPad", "ReplicationPad", "CircularPad"):
        CASES[f"{_name}{_k}d"] = _over(lambda n=_name, k=_k: getattr(nn, f"{n}{k}d")(1))
    CASES[f"ConstantPad{_k}d"] = _over(lambda k=_k: getattr(nn, f"ConstantPad{k}d")(1, 0.5))
for _name in (
    *("ReLU", "ReLU6", "LeakyReLU", "RReLU", "ELU", "CELU", "SELU", "GELU", "SiLU", "Mish"),
    *("Hardswish", "Tanh", "Tanhshrink", "Softsign", "Softshrink", "Hardshrink", "Identity"),
    *("Sigmoid", "Hardsigmoid", "LogSigmoid", "Softplus", "Dropout", "AlphaDropout"),
):
    CASES[_name] = flat(getattr(nn, _name))
CASES["FeatureAlphaDropout"] = image(nn.FeatureAlphaDropout)
for _k, _over in OVER.items():
    CASES[f"Dropout{_k}d"] = _over(getattr(nn, f"Dropout{_k}d"))

BY_NAME = ("DropPath", "StochasticDepth")  # rows for layers of other libraries
ELSEWHERE = {"LSTM": "lstm", "GRU": "gru", "RNN": "plain_rnn_without_bias"}  # in test_idioms.py


def name_of(kind: type[nn.Module] | str) -> str:
    return kind if isinstance(kind, str) else kind.__name__


ROWS = {name_of(kind): kind for kind in LAYERS}


def test_every_row_has_a_case() -> None:
    ours = {n for n, k in ROWS.items() if isinstance(k, str) or k.__module__.startswith("torch.")}
    missing = ours - CASES.keys() - set(BY_NAME) - ELSEWHERE.keys()
    assert not missing, f"rows without a case in tests/test_layers.py: {sorted(missing)}"
    assert set(ELSEWHERE.values()) <= IDIOMS.keys()


@pytest.mark.parametrize("name", CASES)
def test_row(name: str) -> None:
    check(CASES[name], nn.Identity(), ROWS[name])


@pytest.mark.parametrize("name", CASES)
def test_attributes_follow(name: str) -> None:
    """A layer that says its widths says the new ones: it prints as a fresh one of its size does."""
    net = network(CASES[name], nn.Identity())
    inputs = torch.randn(13, 3, 4, 4) if CASES[name].image else torch.randn(13, 5)
    small = fxsvd.compile(net, inputs, passes=[Prune(0.5)], verify=False)
    layer, old = small.get_submodule("layer"), net.get_submodule("layer")
    expected = {
        field: width // 2 if CASES[name].narrowed else width
        for field in (
            "in_features",
            "in_channels",
            "num_features",
            "num_channels",
            "num_parameters",
        )
        if isinstance(width := getattr(old, field, None), int)
    }
    assert {field: getattr(layer, field) for field in expected} == expected
    assert type(layer) is type(old)


@pytest.mark.parametrize("name", BY_NAME)
def test_rows_by_name(name: str) -> None:
    """Whatever library a layer of this name is from."""
    kind = type(name, (nn.Identity,), {})
    case = flat(kind)
    net = network(case, nn.Identity())
    small = fxsvd.compile(net, torch.randn(13, 5), passes=[Prune(0.5)])
    assert small.get_submodule("a").out_features == 4
    assert layer_of(kind()) is LAYERS[name]


def test_a_second_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="has a row already"):
        row(nn.Linear, op=torch.relu)


def test_a_registered_layer_is_kept_whole_and_narrowed() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    known: Layer = LAYERS[nn.Linear]
    fxsvd.register_layer(Doubled, op=known.op, operands=known.operands, resize=known.resize)
    try:
        net = randomized(Net(lambda m, x: m.out(m.a(x)), a=Doubled(5, 8), out=nn.Linear(8, 2)))
        small = fxsvd.compile(net, torch.randn(2, 5), passes=[Prune(0.5)])
        assert isinstance(small.get_submodule("a"), Doubled)
        assert small.get_submodule("a").out_features == 4
    finally:
        del LAYERS[Doubled]
        LEAF_TYPES.discard(Doubled)
