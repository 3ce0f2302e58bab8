"""Networks that are resized while they train."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxsvd
from fxsvd.edits import Plan, Remap
from fxsvd.errors import PlanError
from fxsvd.evolving.spectra import spectrum
from fxsvd.passes import Factorize, Prune, Select, Shrink, Widen
from tests.helpers.evolving import Residual, batch, made, train


def held_out(net: nn.Module) -> Tensor:
    assert not net.training
    x, y = batch(50)
    return F.cross_entropy(net(x), y)


def test_growing_does_not_move_the_loss() -> None:
    evolver, optimizer = made("sgd", loss=held_out)
    train(evolver.model, optimizer, range(10))
    event = evolver.resize(Widen(ratio=1.0), step=10)
    assert event.before == pytest.approx(event.after, rel=1e-9)
    assert not event.undone
    assert str(event).startswith(f"step 10: {event.parameters} parameters, loss")


def test_what_costs_too_much_is_undone() -> None:
    evolver, optimizer = made(loss=held_out, max_loss_increase=1e-6)
    train(evolver.model, optimizer, range(30))
    before = copy.deepcopy(evolver.model.state_dict())
    event = evolver.resize(Prune(0.8))
    assert event.undone
    assert "(undone)" in str(event)
    assert evolver.model.training
    assert all(torch.equal(v, before[k]) for k, v in evolver.model.state_dict().items())
    train(evolver.model, optimizer, range(30, 32))


def test_a_policy_is_asked_every_so_often() -> None:
    grow, shrink = Widen(to={"a": 10}), Prune(0.5, only="a")
    schedule = fxsvd.Schedule({4: (grow,), 5: (Prune(0.5),), 8: (shrink,)})
    evolver, optimizer = made(policy=schedule, every=4)
    for step in range(1, 10):
        train(evolver.model, optimizer, range(step, step + 1))
        evolver.step(step)
    assert [event.step for event in evolver.history] == [4, 8]
    assert evolver.model.a.weight.shape[0] == 5


def test_calibrated_passes_and_factors_join_in() -> None:
    evolver, optimizer = made("sgd")
    train(evolver.model, optimizer, range(3))
    evolver.resize(Select(ratio=0.5, only="a"), data=[batch(i)[0] for i in range(8)])
    evolver.resize(Factorize(rank={"b": 1}))
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert owned == {id(p) for p in evolver.model.parameters()}
    train(evolver.model, optimizer, range(3, 6))


def test_passes_calibrate_on_what_the_network_was_trained_on_last() -> None:
    (evolver, optimizer), (control, other) = made(data=40), made()
    for each, its in ((evolver, optimizer), (control, other)):
        train(each.model, its, range(6))
    evolver.model.eval()(batch(9)[0])  # not trained on
    evolver.model.train()
    evolver.resize(Select(ratio=0.5, only="a"))
    control.resize(Select(ratio=0.5, only="a"), data=[batch(i)[0] for i in (3, 4, 5)])
    expected, state = control.model.state_dict(), evolver.model.state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    train(evolver.model, optimizer, range(6, 7))
    seen = [kept["x"] for kept in evolver.data]
    assert torch.equal(torch.cat(seen), torch.cat([batch(i)[0] for i in (4, 5, 6)]))
    for copied in (copy.deepcopy(evolver.model), pickle.loads(pickle.dumps(evolver.model))):
        copied.train()(batch(7)[0])
    assert len(list(evolver.data)) == 3
    with pytest.raises(PlanError, match="one sample or more; got 0"):
        made(data=0)


def test_a_refused_pass_changes_nothing() -> None:
    evolver, optimizer = made()
    train(evolver.model, optimizer, range(3))
    before = copy.deepcopy((evolver.model.state_dict(), optimizer.state_dict()))
    with pytest.raises(PlanError):
        evolver.resize(Prune(0.5, only="nothing"))
    state, remembered = evolver.model.state_dict(), optimizer.state_dict()
    assert all(torch.equal(state[k], before[0][k]) for k in before[0])
    assert str(remembered) == str(before[1])
    assert not evolver.history


def spectral_net(*values: float) -> nn.Module:
    """A hidden layer with these singular values."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, len(values)), nn.ReLU(), nn.Linear(len(values), 2)).double()
    v = torch.linalg.qr(torch.randn(8, len(values)).double())[0]
    with torch.no_grad():
        net[0].weight.copy_(torch.diag(torch.tensor(values).double()) @ v.T)
    return net


@pytest.mark.parametrize(
    ("values", "options", "width"),
    [
        ((4, 3, 2, 0.5, 0.3), {"prune_below": 0.05}, 4),  # 0.3 < 0.49 < 0.8
        ((4, 3, 2, 0.5, 0.3), {"prune_below": 0.1}, 3),
        ((4, 3, 2, 0.5, 0.3), {"prune_below": 0.9, "most": 0.4}, 3),
        ((4, 3, 2, 0.5, 0.3), {"prune_below": 0.2, "scale": "width", "grow_above": 0.3}, 4),
        ((4, 3, 2, 0.5, 0.3), {"prune_below": 0.01, "grow_above": 0.02}, 6),
        ((4, 3, 2, 0.5, 0.3), {"prune_below": 0.01, "grow_above": 0.02, "grow_by": 0.4}, 7),
        ((4, 3, 2, 0.5, 0.3), {"prune_below": 0.01, "grow_above": 0.04}, 5),
    ],
)
def test_widths_follow_the_spectrum(values: Any, options: Any, width: int) -> None:
    net, x = spectral_net(*values), torch.randn(4, 8).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    evolver = fxsvd.Evolver(net, x, optimizer, policy=fxsvd.Spectral(**options))
    evolver.step(1)
    assert evolver.model.get_submodule("0").out_features == width
    assert len(evolver.history) == (width != 5)


class Halves(nn.Module):
    """A layer whose two halves go their own ways."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        (a, _, b), (c, _, d) = first, second
        self.a, self.b, self.d = nn.Linear(8, 10).to(a.weight), b, d
        with torch.no_grad():
            self.a.weight.copy_(torch.cat([a.weight, c.weight]))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.a(x).relu().chunk(2, 1)
        return self.b(first) + self.d(second)


def test_one_half_of_a_layer_shrinks_and_the_other_grows() -> None:
    net = Halves(spectral_net(4, 3, 2, 0.5, 0.01), spectral_net(1, 1, 1, 1, 1))
    policy = fxsvd.Spectral(prune_below=0.01, grow_above=0.1)
    shrink, grow = policy(fxsvd.capture(net, torch.randn(4, 8).double()), 0)
    assert shrink == Shrink(ratio={"a#1": 0.2})
    assert grow == Widen(to={"a#2": 6}, length="smallest")


def test_a_stream_has_the_spectrum_of_all_its_writers() -> None:
    net = Residual().double()
    deps = fxsvd.analyze(fxsvd.capture(net, batch(0)[0]))
    both = torch.cat([net.stem.weight.flatten(1), net.b.weight.flatten(1)], 1)
    (stream,) = (s for s in deps.spaces if s.name == "stem")
    assert torch.allclose(spectrum(deps, stream), torch.linalg.svdvals(both), rtol=1e-6)


@pytest.mark.parametrize("options", [{"prune_below": 0.2, "grow_above": 0.1}, {"most": 1.0}])
def test_bad_thresholds_are_refused(options: Any) -> None:
    with pytest.raises(PlanError):
        fxsvd.Spectral(**options)


def thinness(net: nn.Module) -> float:
    stem: Any = net.stem
    return 1 / int(stem.out_channels)


@pytest.mark.parametrize("kind", ["sgd", "adam", "adagrad"])
def test_killed_and_resumed_training_goes_on_to_the_last_bit(kind: str, tmp_path: Path) -> None:
    passes = {
        2: (Widen(ratio=0.5),),
        4: (Prune(0.8),),
        5: (Factorize(rank={"a": 2}),),
        6: (Prune(0.25, only="stem"), Widen(ratio=1.0, init="split", only="stem")),
        8: (Select(ratio=0.25, only="stem"),),
    }

    def fresh() -> tuple[fxsvd.Evolver, Any]:
        policy = fxsvd.Schedule(passes)
        return made(kind, policy=policy, data=40, loss=thinness, max_loss_increase=1.0)

    def go(evolver: fxsvd.Evolver, optimizer: Any, steps: range) -> None:
        for step in steps:
            train(evolver.model, optimizer, range(step, step + 1))
            evolver.step(step)

    evolver, optimizer = fresh()
    go(evolver, optimizer, range(1, 8))
    torch.save(evolver.state_dict(), tmp_path / "state.pt")
    go(evolver, optimizer, range(8, 12))
    again, resumed = fresh()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [str(e) for e in again.history] == [str(e) for e in evolver.history[:-1]]
    assert {e.undone for e in again.history} == {True, False}
    go(again, resumed, range(8, 12))
    expected, state = evolver.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    with pytest.raises(PlanError, match="resized already"):
        again.load_state_dict(evolver.state_dict())


def test_a_compiled_network_goes_on_through_resizes() -> None:
    torch.compiler.reset()
    (evolver, optimizer), (other, control) = made(), made()
    compiled = torch.compile(evolver.model, backend="eager")
    for step, options in enumerate((Widen(ratio=0.5), Prune(0.4))):
        train(compiled, optimizer, range(2 * step, 2 * step + 2))
        train(other.model, control, range(2 * step, 2 * step + 2))
        evolver.resize(options)
        other.resize(options)
    x = batch(9)[0]
    assert (compiled(x) - other.model(x)).abs().max() < 1e-9


@dataclass(frozen=True)
class Empty:
    """Leaves nothing of a space."""

    def propose(self, deps: Any, data: Any = None, say: Any = None) -> Plan:
        return Plan((Remap("a", deps.space("a").width, ()),))


def test_a_policy_that_empties_a_layer_is_refused_and_training_goes_on() -> None:
    evolver, optimizer = made(policy=lambda network, step: (Prune(0.25, only="a"), Empty()))
    train(evolver.model, optimizer, range(2))
    with pytest.raises(PlanError, match="leaves 'a' without a channel"):
        evolver.step(1)
    assert [event.plan.edits[0].space for event in evolver.history] == ["a"]
    assert evolver.model.a.weight.shape[0] == 6
    train(evolver.model, optimizer, range(2, 4))


@pytest.mark.parametrize("asked", [None, Prune(0.5), "prune", [Prune], [0.5], (None,)])
def test_what_is_no_pass_is_refused_in_words(asked: Any) -> None:
    evolver, optimizer = made(policy=lambda network, step: asked)
    with pytest.raises(PlanError, match=r"a policy returns a sequence of passes|is no pass"):
        evolver.step(1)
    with pytest.raises(PlanError, match="is no pass"):
        evolver.resize(Prune)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"a policy returns a sequence of passes|is no pass"):
        fxsvd.Schedule({1: (Prune(0.5),), 10_000: asked})  # at once, not after 10,000 steps
    assert not evolver.history
    train(evolver.model, optimizer, range(2))


@pytest.mark.parametrize("after", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_too_much(after: float) -> None:
    losses = iter([1.0, after])
    evolver, _ = made(loss=lambda network: next(losses), max_loss_increase=1e9)
    event = evolver.resize(Prune(0.5))
    assert event.undone
    assert evolver.model.a.weight.shape[0] == 8


def test_layers_keep_the_modes_that_they_are_in() -> None:
    net = Residual().double().train()
    net.norm.eval()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    evolver = fxsvd.Evolver(net, batch(0)[0], optimizer, loss=held_out)
    statistics = evolver.model.norm.running_mean.clone()
    evolver.resize(Prune(0.5, only="a"))
    evolver.resize(Widen(ratio=0.5, only="a"))
    assert evolver.model.training
    assert evolver.model.b.training
    assert not evolver.model.norm.training
    train(evolver.model, optimizer, range(2))
    assert torch.equal(evolver.model.norm.running_mean, statistics)
