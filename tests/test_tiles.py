"""Skips that tile channels: streams behind them are narrowed together and grow by themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxsvd
from fxsvd.passes import Prune, Widen
from fxsvd.rules.gathering import regathered
from tests.helpers.nets import randomized

INITS = ("orthogonal", "split")


class Streams(nn.Module):
    """Three features to 8 channels, then to 12: neither is a whole number of tiles."""

    def __init__(self, inner: int = 5) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, inner)
        self.c, self.head = nn.Linear(inner, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = (x.repeat(1, 3)[:, :8] + self.a(x)).relu()
        x = (x.repeat(1, 2)[:, :12] + self.c(self.b(x).relu())).relu()
        return self.head(x)


def by_hand(net: Any, x: Tensor, first: Sequence[int], second: Sequence[int]) -> Tensor:
    """The same, the numbers of what is tiled written out."""
    x = (x[:, list(first)] + net.a(x)).relu()
    x = (x[:, list(second)] + net.c(net.b(x).relu())).relu()
    out: Tensor = net.head(x)
    return out


def made() -> tuple[Streams, Tensor]:
    torch.manual_seed(0)
    return Streams().double(), torch.randn(6, 3).double()


def widened(net: nn.Module, x: Tensor, *passes: Any) -> Any:
    return fxsvd.compile(net, x, passes=passes, progress=False)


# Which channel of what it is tiled from each one holds: as it was, and with a copy beside each.
FIRST = [i % 3 for i in range(8)]
SECOND = [i % 8 for i in range(12)]
FIRST_TWICE = [i for i in FIRST for _ in (0, 1)]
CASES = {
    "the first stream": (16, 12, FIRST_TWICE, [2 * i for i in SECOND]),
    "the second": (8, 24, FIRST, [i for i in SECOND for _ in (0, 1)]),
    "both": (16, 24, FIRST_TWICE, [2 * i + n for i in SECOND for n in (0, 1)]),
}


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("case", CASES)
def test_each_stream_grows_by_itself(case: str, init: Any) -> None:
    one, other, first, second = CASES[case]
    net, x = made()
    wide = widened(net, x, Widen(to={"a": one, "b": 5, "c": other}, init=init))
    assert (wide.a.out_features, wide.c.out_features) == (one, other)
    assert (wide(x) - net(x)).abs().max() < 1e-12
    assert (randomized(wide)(x) - by_hand(wide, x, first, second)).abs().max() < 1e-12


@pytest.mark.parametrize("init", INITS)
def test_what_has_grown_is_narrowed_and_grows_again(init: Any) -> None:
    net, x = made()
    wide = randomized(widened(net, x, Widen(to={"a": 12}, init=init)))
    small = widened(wide, x, Prune(0.5))
    again = widened(small, x, Widen(ratio=0.5, init=init))
    assert (again(x) - small(x)).abs().max() < 1e-12
    assert again.a.out_features > small.a.out_features < wide.a.out_features


def test_what_one_stream_alone_has_got_can_go_without_the_others() -> None:
    net, x = made()
    wide = widened(net, x, Widen(to={"a": 12}))
    spaces = fxsvd.analyze(fxsvd.capture(wide, x)).spaces
    found = {space.layers: space.width for space in spaces}
    assert found == {("a", "c"): 8, ("a",): 4, ("b",): 5, ("head",): 2}


def test_of_a_fixed_axis_an_index_is_left() -> None:
    net, x = made()
    small = widened(net, x, Prune(0.5, only="a"))
    assert small.a.out_features == 4
    (index,) = (n for n in small.graph.nodes if n.target == "index_select")
    assert len(getattr(small, str(index.args[2].target))) == 4 + 1  # which the slice cuts off


class Alone(nn.Module):
    """Nobody but the tile writes what the head reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(3, 4), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.a(x).relu().repeat(1, 2)[:, :6])
        return out


@pytest.mark.parametrize("init", INITS)
def test_copies_that_nobody_writes_grow_with_their_originals(init: Any) -> None:
    torch.manual_seed(0)
    net, x = Alone().double(), torch.randn(5, 3).double()
    wide = widened(net, x, Widen(ratio=1.0, init=init))
    assert (wide.a.out_features, wide.head.in_features) == (8, 12)
    assert (wide(x) - net(x)).abs().max() < 1e-12


class Product(nn.Module):
    """Channels that are multiplied with what no layer writes."""

    def __init__(self, factor: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.factor = factor
        self.q, self.k, self.o = nn.Linear(4, 6), nn.Linear(4, 3), nn.Linear(5, 2)
        self.v = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        k = self.k(x)
        scores = self.q(x) @ self.factor(torch.cat([k, x], -1)).transpose(1, 2)
        out: Tensor = self.o(scores) + self.v(k)
        return out


FACTORS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels again": lambda x: x[..., :3].repeat(1, 1, 2),
    "one value": lambda x: x[..., 3:4].repeat(1, 1, 6),
    "a view of it": lambda x: x[..., 3:4].expand(-1, -1, 6),
    "a constant": lambda x: x[..., 3:4] * torch.full((6,), 0.5, dtype=x.dtype),
}


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("name", FACTORS)
def test_in_products_copies_meet_zeros(name: str, init: Any) -> None:
    torch.manual_seed(0)
    net, x = Product(FACTORS[name]).double(), torch.randn(3, 5, 4).double()
    wide = widened(net, x, Widen(to={"q": 9, "k": 4}, init=init))
    assert (wide.q.out_features, wide.k.out_features) == (9, 4)
    assert (wide(x) - net(x)).abs().max() < 1e-12


class Shared(nn.Module):
    """One index for two spaces."""

    def __init__(self, subscript: bool) -> None:
        super().__init__()
        self.subscript = subscript
        self.a, self.b, self.head = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.register_buffer("order", torch.tensor([3, 0, 5, 1, 2, 4]))

    def turned(self, x: Tensor) -> Tensor:
        return x[:, self.order] if self.subscript else x.index_select(1, self.order)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.turned(self.b(self.turned(self.a(x).relu())).relu()))
        return out


@pytest.mark.parametrize("subscript", [True, False])
def test_an_index_that_two_spaces_share_is_mended_for_each(subscript: bool) -> None:
    torch.manual_seed(0)
    net, x = Shared(subscript).double(), torch.randn(5, 3).double()
    small = widened(net, x, Prune({"a": 0.5, "b": 0.34}))
    assert (small.a.out_features, small.b.out_features) == (3, 4)
    wide = widened(net, x, Widen(to={"a": 9, "b": 7}))
    assert (wide(x) - net(x)).abs().max() < 1e-12


def test_the_spectral_rule_looks_at_each_stream_that_could_grow() -> None:
    torch.manual_seed(0)
    graph = fxsvd.capture(Streams(inner=14), torch.randn(6, 3))
    policy = fxsvd.Spectral(prune_below=0, grow_above=0, ignore="b")
    (grow,) = policy(graph, 0)
    assert grow == Widen(to={"c": 13}, length="smallest")  # `a` has three directions at most


def test_training_goes_on_where_it_was_stopped() -> None:
    def trained(steps: range, state: Any = None) -> tuple[fxsvd.Evolver, Tensor]:
        net, x = made()
        optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
        evolver = fxsvd.Evolver(net, x, optimizer)
        if state is not None:
            evolver.load_state_dict(state)
        for step in steps:
            if step == 2:
                evolver.resize(Widen(to={"a": 12, "c": 20, "b": 5}))
            optimizer.zero_grad()
            evolver.model(x).square().sum().backward()
            optimizer.step()
        return evolver, evolver.model(x)

    half, _ = trained(range(4))
    (_, resumed), (_, straight) = trained(range(4, 6), half.state_dict()), trained(range(6))
    assert torch.equal(resumed, straight)


def test_an_index_is_exported(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs the onnx extra")
    net, x = made()
    wide = randomized(widened(net.float(), x.float(), Widen(to={"a": 12, "c": 20, "b": 5})))
    error = fxsvd.export_onnx(wide, tmp_path / "net.onnx", x.float())
    assert error is not None
    assert error < 1e-5


@pytest.mark.parametrize("index", [[0, 1, 0, 2], [2, 1, 0]])
def test_an_index_goes_on_reading_what_it_read(index: list[int]) -> None:
    """As far as originals go, whatever is copied; and copies of copies stand for each other."""
    source, result = np.repeat(np.arange(3), [2, 1, 3]), np.repeat(np.arange(len(index)), 2)
    out = regathered(np.array(index), source, result)
    assert source[out].tolist() == [i for i in index for _ in (0, 1)]
    first = [int(np.flatnonzero(source == i)[0]) for i in index]
    assert out[::2].tolist() == first
    assert out[1::2].tolist() == [n + (i != 1) for n, i in zip(first, index, strict=True)]
