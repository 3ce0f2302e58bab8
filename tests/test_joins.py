"""What a layer's output is added to, and in which order nodes may run."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxsvd.capture import capture
from fxsvd.selecting.joins import join_behind, schedule


class Net(nn.Module):
    """Layers by name, and a function that runs them."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.run = run
        self.a, self.b, self.short = (nn.Conv2d(4, 4, 1) for _ in range(3))
        self.norm, self.second, self.drop = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Dropout()
        self.same, self.batch = nn.Identity(), nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def graph_of(run: Callable[[Any, Tensor], Tensor]) -> fx.GraphModule:
    return capture(Net(run).eval(), torch.randn(2, 4, 3, 3), check=False)


def node(graph: fx.GraphModule, layer: str) -> fx.Node:
    return next(n for n in graph.graph.nodes if n.op == "call_module" and n.target == layer)


JOINED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "add": lambda m, x: m.short(x) + m.a(x),
    "reversed": lambda m, x: m.a(x) + m.short(x),
    "torch.add": lambda m, x: torch.add(m.short(x), m.a(x)),
    "method": lambda m, x: m.short(x).add(m.a(x)),
    "in place": lambda m, x: operator.iadd(m.short(x), m.a(x)),
    "method in place": lambda m, x: m.short(x).add_(m.a(x)),
    "dropout and identity": lambda m, x: m.short(x) + m.drop(m.same(m.a(x))),
}
APART: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a nonlinearity": lambda m, x: m.short(x) + m.a(x).relu(),
    "another user": lambda m, x: (y := m.a(x)).relu() + (m.short(x) + y),
    "a scale": lambda m, x: torch.add(m.short(x), m.a(x), alpha=2),
    "a broadcast": lambda m, x: m.a(x) + m.short(x).mean((2, 3), keepdim=True),
    "itself": lambda m, x: (y := m.a(x)) + y,
    "a number": lambda m, x: m.a(x) + 1.0,
    "a product": lambda m, x: m.short(x) * m.a(x),
    "two norms": lambda m, x: m.short(x) + m.second(m.norm(m.a(x))),
    "batch statistics": lambda m, x: m.short(x) + m.batch(m.a(x)),
    "the end": lambda m, x: m.a(x),
}


@pytest.mark.parametrize("name", JOINED)
def test_a_join_is_found(name: str) -> None:
    graph = graph_of(JOINED[name])
    join = join_behind(node(graph, "a"))
    assert join is not None
    assert join.other is node(graph, "short")
    assert join.norm is None
    change = torch.randn(2, 4, 3, 3)
    assert join.behind(change) is change


@pytest.mark.parametrize("name", APART)
def test_what_is_no_plain_addition_is_no_join(name: str) -> None:
    assert join_behind(node(graph_of(APART[name]), "a")) is None


@pytest.mark.parametrize("affine", [True, False])
def test_a_change_is_turned_back_through_the_batch_norm(affine: bool) -> None:
    graph = graph_of(lambda m, x: m.norm(m.a(x)) + m.short(x)).double()
    norm: Any = graph.get_submodule("norm")
    norm.running_var = torch.rand(4, dtype=torch.float64) + 0.1
    norm.running_mean = torch.randn(4, dtype=torch.float64)
    norm.weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 3.0]).double()) if affine else None
    norm.bias = nn.Parameter(torch.randn(4).double()) if affine else None
    join = join_behind(node(graph, "a"))
    assert join is not None
    assert join.norm is norm
    y, change = torch.randn(2, 2, 4, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        expected = norm(y) + change
        torch.testing.assert_close(norm(y + join.behind(change)), expected, rtol=1e-9, atol=1e-9)


def test_a_channel_that_the_norm_shuts_asks_for_nothing() -> None:
    graph = graph_of(lambda m, x: m.norm(m.a(x)) + m.short(x))
    with torch.no_grad():
        graph.get_submodule("norm").weight[2] = 1e-5
        graph.get_submodule("norm").weight[3] = 0
    join = join_behind(node(graph, "a"))
    assert join is not None
    back = join.behind(torch.ones(2, 4, 3, 3))
    assert back.isfinite().all()
    assert not back[:, 2:].any()
    assert back[:, :2].all()


def ordered(run: Callable[[Any, Tensor], Tensor], layers: set[str]) -> list[str]:
    graph = graph_of(run)
    order = schedule(graph, layers)
    assert sorted(order, key=id) == sorted(graph.graph.nodes, key=id)
    place = {n: i for i, n in enumerate(order)}
    assert all(place[source] < place[n] for n in order for source in n.all_input_nodes)
    return [str(n.target) for n in order if n.op == "call_module"]


def test_a_norm_that_starts_at_zero_asks_for_nothing() -> None:
    graph = graph_of(lambda m, x: m.short(x) + m.norm(m.a(x)))
    with torch.no_grad():
        graph.get_parameter("norm.weight").zero_()
    join = join_behind(node(graph, "a"))
    assert join is not None
    assert (join.behind(torch.ones(2, 4, 3, 3)) == 0).all()


def test_the_other_value_runs_before_the_layer() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.norm(m.b(m.a(x).relu())) + m.short(x)

    assert ordered(run, {"b"}) == ["a", "short", "b", "norm"]
    assert ordered(run, {"a"}) == ["a", "b", "norm", "short"]
    assert ordered(run, set()) == ["a", "b", "norm", "short"]


def test_nothing_moves_past_what_is_done_in_place() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.b(m.a(x).relu())
        x += 1
        return y + m.short(x)

    assert ordered(run, {"b"}) == ["a", "b", "short"]


def test_values_that_are_joins_themselves_run_in_turn() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.b(x) + m.short(y + m.norm(x))

    assert ordered(run, {"a", "b"}) == ["norm", "a", "short", "b"]
