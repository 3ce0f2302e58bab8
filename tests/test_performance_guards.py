"""Growth that is counted, not timed: work linear in the graph, no numbers where none are needed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fxsvd
from fxsvd.dependency import analyze
from fxsvd.passes import Prune
from fxsvd.rewrite import rewrite
from fxsvd.rules import RULES


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv2(F.relu(self.norm(self.conv1(x)))))


def network(blocks: int, width: int = 4) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3), *(Block(width) for _ in range(blocks)), nn.Conv2d(width, 2, 1)
    ).eval()


def captured(blocks: int) -> fx.GraphModule:
    return fxsvd.capture(network(blocks), torch.zeros(1, 3, 8, 8), check=False)


def python_calls(work: Callable[[], object]) -> int:
    """How many Python functions a piece of work calls, those of the libraries included."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(before)
    return calls


STAGES: dict[str, Callable[[int], Callable[[], object]]] = {
    "analyse": lambda blocks: _analysing(captured(blocks)),
    "plan": lambda blocks: _planning(captured(blocks), Prune(ratio=0.5)),
    "plan, rounded": lambda blocks: _planning(captured(blocks), Prune(ratio=0.5, round_to=2)),
    "plan, global": lambda blocks: _planning(captured(blocks), Prune(ratio=0.5, scope="global")),
    "rewrite": lambda blocks: _rewriting(captured(blocks)),
}


def _analysing(graph: fx.GraphModule) -> Callable[[], object]:
    return lambda: analyze(graph)


def _planning(graph: fx.GraphModule, prune: Prune) -> Callable[[], object]:
    deps = analyze(graph)
    return lambda: prune.propose(deps)


def _rewriting(graph: fx.GraphModule) -> Callable[[], object]:
    deps = analyze(graph)
    plan = Prune(ratio=0.5).propose(deps)
    return lambda: rewrite(deps, plan)


@pytest.mark.parametrize("stage", STAGES)
def test_calls_grow_with_the_graph_and_not_with_its_square(stage: str) -> None:
    few, some, many = (python_calls(STAGES[stage](blocks)) for blocks in (2, 10, 42))
    each, each_later = (some - few) / 8, (many - some) / 32
    assert 0 < each_later < 1.2 * each


def test_every_node_is_given_to_one_rule_once(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, calls = captured(10), []
    for key, rule in list(RULES.items()):
        monkeypatch.setitem(
            RULES, key, lambda *a, _rule=rule, **k: calls.append(1) or _rule(*a, **k)
        )
    analyze(graph)
    computed = [n for n in graph.graph.nodes if n.op.startswith("call")]
    assert len(calls) == len(computed)


def test_relations_hold_no_more_than_the_axes_that_meet() -> None:
    small, large = (analyze(captured(blocks)).analysis.relations for blocks in (5, 50))
    assert large.count < 10 * small.count
    assert sum(len(a) for a, _ in large.equal) < 10 * sum(len(a) for a, _ in small.equal)


class _LargestTensor(TorchDispatchMode):
    """Notes the largest result that has numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and type(result) is Tensor and not result.is_meta:
            self.numbers = max(self.numbers, result.numel())
        return result


def test_a_network_without_numbers_gets_a_plan_and_a_result_without_numbers() -> None:
    with torch.device("meta"):
        model = network(3, width=512)
    with _LargestTensor() as largest:
        graph = fxsvd.capture(model, torch.zeros(1, 3, 8, 8))
        deps = analyze(graph)
        small = rewrite(deps, Prune(ratio=0.5, criterion="random").propose(deps))
    assert largest.numbers <= 512  # indices, not one weight
    assert all(p.is_meta for p in small.parameters())
    assert small.get_submodule("1.conv1").out_channels == 256


@pytest.mark.parametrize("criterion", ["l1", "l2", "bn", "dead"])
def test_a_criterion_that_measures_refuses_weights_without_numbers(criterion: str) -> None:
    with torch.device("meta"):
        model = network(1)
    with pytest.raises(fxsvd.PlanError, match=r"meta device.*criterion='random'"):
        fxsvd.plan(model, torch.zeros(1, 3, 8, 8), passes=[Prune(ratio=0.5, criterion=criterion)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("power", [1, 2])
def test_a_magnitude_is_the_norm_over_all_coupled_entries(power: int, dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 1, 1)).to(dtype)
    deps = analyze(fxsvd.capture(net, torch.zeros(1, 2, 5, 5, dtype=dtype), check=False))
    (space,) = (s for s in deps.spaces if s.name == "0")
    scores = fxsvd.importance.magnitude(deps, power)[space.channels]
    parts = [net[0].weight, net[0].bias, net[1].weight, net[1].bias, net[2].weight.transpose(0, 1)]
    whole = torch.cat([p.detach().double().reshape(6, -1) for p in parts], dim=1)
    expected = torch.linalg.vector_norm(whole, power, dim=1).numpy()
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
