"""Rows of inputs and outputs, against unfold and against the layers themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxsvd.capture import capture
from fxsvd.data.readers import Reader, input_rows, output_rows, positions, readers
from fxsvd.dependency import Dependencies, analyze

EXACT = {"rtol": 1e-9, "atol": 1e-9}
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stride": {"stride": 2, "padding": 1},
    "uneven": {"kernel_size": (3, 2), "stride": (1, 3), "padding": (0, 1), "dilation": (2, 1)},
    "dilated": {"dilation": 2, "padding": 2},
    "grouped": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 4, "out_channels": 8, "padding": 1},
    "same": {"padding": "same", "dilation": 2},
    "same, even": {"padding": "same", "kernel_size": (2, 4)},
    "valid": {"padding": "valid"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "circular": {"padding": (2, 1), "padding_mode": "circular", "stride": 2},
    "replicate": {"padding": "same", "padding_mode": "replicate", "kernel_size": (2, 3)},
    "1x1": {"kernel_size": 1},
    "no bias": {"bias": False, "padding": 1},
}


def convolution(name: str) -> nn.Conv2d:
    torch.manual_seed(0)
    options = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, **CONVOLUTIONS[name]}
    return nn.Conv2d(**options).double()


def image() -> Tensor:
    return torch.randn(3, 4, 7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def everywhere(module: nn.Module, x: Tensor) -> Tensor:
    return torch.arange(len(x) * positions(module, x))


def unfolded(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """All rows, by ``torch.nn.functional.unfold`` of an input padded beforehand."""
    pads = conv._reversed_padding_repeated_twice
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = F.pad(x, pads, mode=mode)
        padding: Any = 0
    else:
        padding = conv.padding
    out = F.unfold(x, conv.kernel_size, conv.dilation, padding, conv.stride)
    return out.transpose(1, 2).reshape(-1, conv.groups, out.shape[1] // conv.groups)


def reader_of(module: nn.Module, x: Tensor) -> Reader:
    net = nn.Sequential(module).double()
    return readers(analyze(capture(net, x, check=False)))["0"]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_rows_are_those_of_unfold(name: str) -> None:
    conv, x = convolution(name), image()
    rows = input_rows(conv, x, everywhere(conv, x))
    assert torch.equal(rows, unfolded(conv, x))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_matrices_map_rows_to_outputs(name: str) -> None:
    conv, x = convolution(name), image()
    assert_maps_rows_to_outputs(conv, x)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (3, 4, 11)),
        (nn.Conv1d(4, 6, 4, padding="same", padding_mode="circular"), (3, 4, 11)),
        (
            nn.Conv3d(4, 6, (1, 2, 3), stride=(1, 2, 1), padding=1, dilation=(1, 1, 2)),
            (2, 4, 4, 5, 6),
        ),
        (nn.Conv3d(4, 4, 2, groups=4), (2, 4, 4, 5, 6)),
        (nn.Linear(4, 6), (5, 4)),
        (nn.Linear(4, 6), (5, 3, 4)),
        (nn.Linear(4, 6, bias=False), (5, 3, 2, 4)),
    ],
    ids=str,
)
def test_other_dimensions_map_rows_to_outputs(module: nn.Module, shape: tuple[int, ...]) -> None:
    assert_maps_rows_to_outputs(module, torch.randn(shape, dtype=torch.float64))


def assert_maps_rows_to_outputs(module: nn.Module, x: Tensor) -> None:
    reader, where = reader_of(module, x), everywhere(module, x)
    with torch.no_grad():
        rows = input_rows(module, x, where)
        y = torch.einsum("goi,ngi->ngo", reader.matrices(), rows).flatten(1)
        y = y if module.bias is None else y + module.bias
        expected = output_rows(module, module(x), where)
    assert rows.shape == (len(where), *reader.entries().shape)
    torch.testing.assert_close(y, expected, **EXACT)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_some_rows_are_those_of_all(name: str) -> None:
    conv, x = convolution(name), image()
    where = everywhere(conv, x)
    some = where[torch.randperm(len(where))[:7]]
    assert torch.equal(input_rows(conv, x, some), input_rows(conv, x, where)[some])
    with torch.no_grad():
        y = conv(x)
    assert torch.equal(output_rows(conv, y, some), output_rows(conv, y, where)[some])


@pytest.mark.parametrize("name", ["stride", "reflect"])
def test_the_layout_in_memory_does_not_matter(name: str) -> None:
    conv, x = convolution(name), image()
    where = everywhere(conv, x)
    expected = input_rows(conv, x, where)
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(input_rows(conv, last, where), expected)
    wider = torch.cat([x, x], 1)[:, :4]
    assert torch.equal(input_rows(conv, wider, where), expected)


def test_rows_are_copies() -> None:
    for module, x in ((nn.Linear(4, 2), torch.randn(5, 4)), (nn.Conv2d(4, 2, 1), image().float())):
        rows = input_rows(module, x, everywhere(module, x))
        before = rows.clone()
        x.zero_()
        assert torch.equal(rows, before)


def test_padding_outside_of_numbers_is_zero_also_beside_infinities() -> None:
    conv = nn.Conv2d(1, 1, 3, padding=1)
    x = torch.full((1, 1, 2, 2), torch.inf)
    rows = input_rows(conv, x, everywhere(conv, x))
    assert sorted(rows[0].flatten().tolist()) == [0.0] * 5 + [torch.inf] * 4


# ---------------------------------------------------------------- which layers, which channels


def found(net: nn.Module, x: Tensor) -> tuple[Dependencies, dict[str, Reader]]:
    deps = analyze(capture(net, x, check=False))
    return deps, readers(deps)


class Flat(nn.Module):
    """A convolution, flattened with channels first or last, and a linear layer."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.last, self.conv, self.fc = last, nn.Conv2d(3, 5, 3), nn.Linear(20, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.fc((y.permute(0, 2, 3, 1) if self.last else y).flatten(1))


@pytest.mark.parametrize("last", [False, True])
def test_a_flattened_image_has_a_channel_per_entry_in_either_layout(last: bool) -> None:
    deps, by_name = found(Flat(last), torch.randn(2, 3, 4, 4))
    (space,) = [s for s in deps.spaces if s.name == "conv"]
    expected = np.tile(space.channels, 4) if last else np.repeat(space.channels, 4)
    assert (by_name["fc"].channels == expected).all()
    assert (by_name["fc"].entries() == expected).all()
    assert not np.isin(by_name["conv"].channels, space.channels).any()


def test_entries_of_a_convolution_repeat_each_channel_for_its_kernel() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3, groups=2))
    deps, by_name = found(net, torch.randn(2, 3, 5, 5))
    reader = by_name["1"]
    (space,) = [s for s in deps.spaces if s.name == "0"]
    assert (reader.groups, reader.patch, reader.depthwise) == (2, 9, False)
    assert (reader.entries() == np.repeat(space.channels, 9).reshape(2, 18)).all()


def test_a_depthwise_convolution_reads_its_own_channels() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1))
    deps, by_name = found(net, torch.randn(2, 3, 5, 5))
    (space,) = [s for s in deps.spaces if s.name == "0"]
    assert by_name["1"].depthwise
    assert (by_name["1"].channels == space.channels).all()


class Kinds(nn.Module):
    """Layers that can be refitted, and layers that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.twice = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.tied.weight
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.hooked = nn.Linear(4, 4)
        self.hooked.register_forward_hook(lambda module, args, out: out + 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.plain(x)))
        return self.hooked(self.normed(self.other(self.tied(x))))


def test_only_layers_that_hold_their_own_weight_are_readers() -> None:
    _, by_name = found(Kinds(), torch.randn(2, 4))
    assert list(by_name) == ["plain", "twice"]
    assert [len(r.calls) for r in by_name.values()] == [1, 2]


class Norms(nn.Module):
    """Convolutions before a batch norm, of which some have other users, too."""

    def __init__(self) -> None:
        super().__init__()
        self.alone, self.shared, self.none = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.norm, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.batch = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.alone(x))
        y = self.shared(x)
        return self.batch(self.none(self.second(y) + y))


def test_the_batch_norm_behind_is_one_that_alone_sees_the_output() -> None:
    _, by_name = found(Norms().eval(), torch.randn(2, 3, 4, 4))
    assert {name: r.norm for name, r in by_name.items()} == {
        "alone": "norm",
        "shared": None,
        "none": None,
    }


def test_with_one_output_per_group_all_groups_lose_the_same_inputs() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1, groups=2), nn.Conv2d(2, 5, 1))
    deps = analyze(capture(net, torch.randn(2, 3, 4, 4)))
    channels = readers(deps)["1"].channels
    assert len(set(channels.tolist())) == 3
    assert (channels[:3] == channels[3:]).all()
