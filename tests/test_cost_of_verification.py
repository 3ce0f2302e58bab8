"""Proving a result adds at most three forward passes of the original's size to a compilation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import fxsvd
from fxsvd.passes import Prune

MOST = 3


class Net(nn.Module):
    """With a norm that differs in train mode, so that verification runs both modes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(torch.relu(self.norm(self.conv1(x)))).mean((2, 3))


@pytest.fixture
def full_size(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Grows by one entry, the input's type, with each pass on numbers through all 8 channels.

    The first convolution runs once a pass. It has 8 outputs in the original, in its captured graph
    and in the silenced reference, and 4 in the result; while capture traces, it sees fakes.
    """
    passes: list[torch.dtype] = []
    convolve = nn.Conv2d.forward

    def counted(module: nn.Conv2d, x: Tensor) -> Tensor:
        has_numbers = not isinstance(x, FakeTensor) and not x.is_meta
        if has_numbers and (module.in_channels, module.out_channels) == (3, 8):
            passes.append(x.dtype)
        return convolve(module, x)

    monkeypatch.setattr(nn.Conv2d, "forward", counted)
    return passes


def compiled(verify: bool) -> nn.Module:
    return fxsvd.compile(Net(), torch.randn(2, 3, 8, 8), passes=[Prune(ratio=0.5)], verify=verify)


def test_without_verification_nothing_runs(full_size: list[torch.dtype]) -> None:
    assert compiled(verify=False).get_submodule("conv1").out_channels == 4
    assert not full_size


def test_the_check_of_the_capture_is_one_pass_of_each(full_size: list[torch.dtype]) -> None:
    fxsvd.capture(Net(), torch.randn(2, 3, 8, 8))
    assert full_size == 2 * [torch.float32]  # the model, and the graph that is to equal it


def test_proving_the_result_adds_at_most_three(full_size: list[torch.dtype]) -> None:
    compiled(verify=True)
    of_capture, beyond = full_size[:2], full_size[2:]
    assert of_capture == 2 * [torch.float32]
    assert beyond == 2 * [torch.float64]  # the silenced original, in eval and in train mode
    assert len(beyond) <= MOST
