"""Averages of a network's parameters that are resized with it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fxsvd
from fxsvd.edits import Assign, Plan
from fxsvd.errors import FxsvdError, PlanError, VerificationError
from fxsvd.evolving.averages import resized_average
from fxsvd.passes import Factorize, Prune, Select, Widen
from fxsvd.rewrite import rewrite
from tests.helpers.evolving import Residual, batch

AVERAGES: dict[str, dict[str, Any]] = {
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "ema with buffers": {"multi_avg_fn": get_ema_multi_avg_fn(0.9), "use_buffers": True},
    "swa": {},
}


def made(kind: str = "ema", **options: Any) -> tuple[fxsvd.Evolver, Any, Any]:
    net = Residual().double().train()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    evolver = fxsvd.Evolver(net, batch(0)[0], optimizer, **options)
    average = evolver.follow(AveragedModel(evolver.model, **AVERAGES[kind]))
    return evolver, optimizer, average


def train(evolver: fxsvd.Evolver, optimizer: Any, average: Any, steps: range) -> None:
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(evolver.model(x), y).backward()
        optimizer.step()
        average.update_parameters(evolver.model)


@pytest.mark.parametrize("kind", AVERAGES)
def test_without_dead_channels_the_average_is_what_it_is_with_them(kind: str) -> None:
    runs = made(kind), made(kind)
    for run in runs:
        train(*run, range(1, 6))
    (evolver, _, average), (_, _, control) = runs
    evolver.resize(Prune(criterion="dead", ratio=0.5))
    assert average.module.a.weight.shape[0] == 5
    for run in runs:
        train(*run, range(6, 16))
    assert int(average.n_averaged) == 15
    alive = [i for i in range(8) if i % 3]
    expected = control.module.a.weight[alive]
    assert torch.allclose(average.module.a.weight, expected, rtol=1e-9, atol=1e-12)
    a, b = average.eval()(batch(99)[0]), control.eval()(batch(99)[0])
    assert (a - b).abs().max() < 1e-9 * b.abs().max()


@pytest.mark.parametrize("init", ["orthogonal", "split"])
@pytest.mark.parametrize("kind", AVERAGES)
def test_growth_leaves_what_the_average_computes(kind: str, init: Any) -> None:
    evolver, optimizer, average = made(kind)
    train(evolver, optimizer, average, range(5))
    x = batch(99)[0]
    before = [net.eval()(x) for net in (evolver.model, average)]
    assert (before[0] - before[1]).abs().max() > 1e-3
    evolver.model.train()
    evolver.resize(Widen(ratio=0.5, init=init))
    assert average.module.a.weight.shape == (12, 9, 3, 3)
    for net, y in zip((evolver.model, average), before, strict=True):
        assert (net.eval()(x) - y).abs().max() < 1e-9 * y.abs().max()
    evolver.model.train()
    train(evolver, optimizer, average, range(5, 8))


@pytest.mark.parametrize("init", ["orthogonal", "split"])
def test_growth_of_the_average_is_the_average_of_grown_networks(init: Any) -> None:
    """The oracle: all networks of the past, each grown alike, and then averaged."""
    evolver, optimizer, average = made("swa")
    past = []
    for step in range(4):
        train(evolver, optimizer, average, range(step, step + 1))
        past.append(copy.deepcopy(evolver.model))
    options = Widen(ratio=0.5, init=init)
    deps = fxsvd.analyze(evolver.model)
    plan = options.propose(deps)
    evolver.resize(options)
    grown = [resized_average(network, deps, plan, options) for network in past]
    for name, value in average.module.named_parameters():
        mean = sum(network.get_parameter(name) for network in grown) / 4
        assert torch.allclose(value, mean, rtol=1e-9, atol=1e-12), name


def test_growth_by_gradients_leaves_what_the_average_computes() -> None:
    evolver, optimizer, average = made()
    train(evolver, optimizer, average, range(5))
    labelled = [(batch(5)[0], torch.arange(16) % 3)]
    before = average.eval()(batch(99)[0])
    options = Widen(ratio=0.5, only="a", init="gradient", loss=F.cross_entropy, data=labelled)
    assert evolver.resize(options).plan.widens
    assert not average.module.a.weight.flatten(1).any(1).all()
    after = average(batch(99)[0])
    assert (after - before).abs().max() < 1e-9 * before.abs().max()


class PreNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem, self.norm = nn.Linear(5, 8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.a, self.b, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head(x + self.b(F.gelu(self.a(self.norm(x)))))


@pytest.mark.parametrize(
    "options", [Widen(ratio=0.5), Widen(ratio=1.0, init="split"), Widen(ratio=0.5, only="a")]
)
def test_growth_under_norms_leaves_what_the_average_computes(options: Widen) -> None:
    net, x = PreNorm().double(), torch.randn(3, 6, 5).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
    evolver = fxsvd.Evolver(net, x, optimizer)
    average = evolver.follow(AveragedModel(evolver.model))
    for _ in range(4):
        optimizer.zero_grad()
        evolver.model(x).square().mean().backward()
        optimizer.step()
        average.update_parameters(evolver.model)
    before = average(x)
    assert evolver.resize(options).plan.edits
    assert (average(x) - before).abs().max() < 1e-9 * before.abs().max()


def test_what_was_fitted_anew_begins_at_the_networks_numbers() -> None:
    evolver, optimizer, average = made()
    train(evolver, optimizer, average, range(5))
    old = copy.deepcopy(average.module)
    event = evolver.resize(Select(ratio=0.5, only="a"), data=[batch(i)[0] for i in range(4)])
    (edit,) = event.plan.edits
    model, held = evolver.model, average.module
    assert torch.equal(held.b.weight, model.b.weight)
    assert torch.equal(held.b.bias, model.b.bias)
    assert torch.equal(held.a.weight, old.a.weight[list(edit.keep)])
    assert torch.equal(held.stem.weight, old.stem.weight)
    evolver.resize(Factorize(rank={"b": 1}))
    assert torch.equal(held.get_parameter("b.0.weight"), model.get_parameter("b.0.weight"))
    train(evolver, optimizer, average, range(5, 7))


def test_what_is_undone_leaves_the_average() -> None:
    evolver, optimizer, average = made(loss=lambda net: 1 / len(net.a.weight))
    train(evolver, optimizer, average, range(3))
    before = copy.deepcopy(average.state_dict())
    assert evolver.resize(Prune(0.8)).undone
    assert all(torch.equal(v, before[k]) for k, v in average.state_dict().items())


def test_killed_and_resumed_averages_go_on_to_the_last_bit(tmp_path: Path) -> None:
    passes = {
        2: (Widen(ratio=0.5, init="split"),),
        4: (Prune(0.25),),
        5: (Factorize(rank={"a": 2}),),
        6: (Widen(ratio=0.5, only="stem"),),
    }

    def go(run: tuple[fxsvd.Evolver, Any, Any], steps: range) -> None:
        for step in steps:
            train(*run, range(step, step + 1))
            run[0].step(step)

    run = made(policy=fxsvd.Schedule(passes))
    go(run, range(1, 8))
    torch.save(run[0].state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    go(run, range(8, 11))
    again = made(policy=fxsvd.Schedule(passes))
    again[0].load_state_dict(state)
    go(again, range(8, 11))
    expected = run[2].state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in again[2].state_dict().items())
    assert int(again[2].n_averaged) == 10
    alone = made(policy=fxsvd.Schedule(passes))[0]
    alone.averages.clear()
    with pytest.raises(PlanError, match="1 averages, 0 follow"):
        alone.load_state_dict(state)


def test_a_copy_of_the_network_follows_as_well() -> None:
    evolver, optimizer, average = made()
    own = evolver.follow(copy.deepcopy(evolver.model))
    train(evolver, optimizer, average, range(3))
    evolver.resize(Prune(0.5))
    assert own.a.weight.shape == evolver.model.a.weight.shape


def test_averages_of_other_networks_are_refused() -> None:
    evolver, *_ = made()
    late = AveragedModel(evolver.model)
    for stranger in (AveragedModel(Residual()), nn.Linear(2, 3), evolver.model):
        with pytest.raises(FxsvdError, match=r"AveragedModel\(evolver.model"):
            evolver.follow(stranger)
    evolver.resize(Prune(0.5))
    with pytest.raises(FxsvdError, match="no average of the network in training"):
        evolver.follow(late)


@dataclass(frozen=True)
class Halving:
    """Splits as ``Widen`` does, but is not known to."""

    honest: bool = True

    def propose(self, deps: Any, data: Any = None, say: Any = None) -> Plan:
        plan = Widen(ratio=1.0, init="split" if self.honest else "orthogonal", only="a").propose(
            deps
        )
        if self.honest:
            return plan
        wide = torch.zeros(6, 16, 1, 1).double()
        wide[:, ::2] = deps.analysis.by_name("b.weight").value.detach()
        wide[:, 1] = 1.0  # of a copy of a channel that is dead
        return replace(plan, values=(Assign("b.weight", wide, "reads a dead one"),))


def test_growth_that_an_average_cannot_follow_is_refused_and_nothing_changed() -> None:
    evolver, optimizer, average = made()
    train(evolver, optimizer, average, range(3))
    before = copy.deepcopy((evolver.model.state_dict(), average.state_dict()))
    with pytest.raises(PlanError, match=r"take it out of evolver\.averages"):
        evolver.resize(Halving())
    for now, then in zip((evolver.model, average), before, strict=True):
        assert all(torch.equal(p, then[name]) for name, p in now.named_parameters())
    assert not evolver.history
    evolver.averages.clear()
    assert evolver.resize(Halving()).plan.widens
    train(evolver, optimizer, AveragedModel(evolver.model), range(3, 5))


def test_an_average_that_would_compute_something_else_is_refused() -> None:
    evolver, *_ = made()
    with torch.no_grad():
        for average in evolver.averages:
            average.module.a.bias[0] = 1.0  # dead in the network, not in its average
    plan = Halving(honest=False).propose(fxsvd.analyze(evolver.model))
    assert rewrite(fxsvd.analyze(evolver.model), plan).a.out_channels == 16
    before = copy.deepcopy(evolver.model.state_dict())
    with pytest.raises(VerificationError, match="an average cannot follow this Halving"):
        evolver.resize(Halving(honest=False))
    assert all(torch.equal(p, before[name]) for name, p in evolver.model.named_parameters())
