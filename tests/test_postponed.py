"""Which channels may be chosen when their reader is reached: only those nobody else mixes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxsvd
from fxsvd.capture import capture
from fxsvd.data.readers import readers
from fxsvd.dependency import analyze
from fxsvd.passes import Select
from fxsvd.selecting.postponed import postponable


class Between(nn.Module):
    """Two layers and what stands between them."""

    def __init__(self, step: Any, parts: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.step, self.parts = step, parts

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.step(self, self.a(x)))
        return out


def postponed(step: Any, parts: nn.Module | None = None) -> set[str]:
    deps = analyze(capture(Between(step, parts), torch.randn(2, 3, 6, 6)))
    return set(postponable(deps, deps.groups, readers(deps)))


ALONE = {
    "nothing": (lambda net, x: x, None),
    "relu": (lambda net, x: x.relu(), None),
    "a norm over samples": (lambda net, x: F.gelu(net.parts(x)), nn.BatchNorm2d(8)),
    "pooling": (lambda net, x: F.max_pool2d(x, 2), None),
    "depthwise": (lambda net, x: net.parts(x), nn.Conv2d(8, 8, 3, groups=8)),
    "a sum with itself": (lambda net, x: x + x.sigmoid(), None),
}
MIXED = {
    "a norm over channels": (lambda net, x: net.parts(x), nn.GroupNorm(1, 8)),
    "softmax": (lambda net, x: x.softmax(1), None),
    "a statistic": (lambda net, x: x / x.square().sum(1, keepdim=True), None),
    "another reader": (lambda net, x: x * net.parts(x).mean(), nn.Conv2d(8, 2, 1)),
}


@pytest.mark.parametrize(("step", "parts"), ALONE.values(), ids=ALONE)
def test_channels_that_stay_apart_are_chosen_late(step: Any, parts: nn.Module | None) -> None:
    assert "b" in postponed(step, parts)


@pytest.mark.parametrize(("step", "parts"), MIXED.values(), ids=MIXED)
def test_channels_that_something_mixes_are_chosen_at_once(
    step: Any, parts: nn.Module | None
) -> None:
    assert "b" not in postponed(step, parts)


def test_a_layer_called_twice_chooses_nothing_late() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.c(self.b(self.b(self.a(x)).relu()).relu())
            return out

    deps = analyze(capture(Twice(), torch.randn(2, 3)))
    assert "b" not in postponable(deps, deps.groups, readers(deps))


@torch.no_grad()
def error(seed: int) -> float:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    net, x = net.double().eval(), torch.randn(400, 6, dtype=torch.float64)
    options: dict[str, Any] = {"ratio": 0.5, "chaining": "top-down", "positions": "all"}
    small = fxsvd.compile(net, x[:2], passes=[Select(**options)], data=[x])
    return float((small(x) - net(x)).square().mean() / net(x).var())


def test_a_late_choice_is_better_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    late = sum(error(seed) for seed in range(10))
    monkeypatch.setattr("fxsvd.passes.select.postponable", lambda *_: {})
    assert late < sum(error(seed) for seed in range(10))
