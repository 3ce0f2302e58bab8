"""Networks that are resized while they train."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxsvd
from fxsvd.errors import FxsvdError, PlanError
from fxsvd.evolving.spectra import spectrum
from fxsvd.passes import Factorize, Prune, Select, Widen

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
}


class Residual(nn.Module):
    """A stream with batch norm, and a branch some of whose channels are dead."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.a, self.b = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 3)
        with torch.no_grad():
            for tensor in (self.a.weight[::3], self.b.weight[:, ::3]):
                tensor.zero_()
            self.a.bias[::3] = -1.0

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.head((x + self.b(F.relu(self.a(x)))).mean((2, 3)))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 2, 5, 5, generator=generator).double()
    return x, (x.mean((1, 2, 3)) * 20).long().clamp(0, 2)


def train(model: nn.Module, optimizer: Any, seeds: range, *others: Any) -> float:
    loss = torch.zeros(())
    for seed in seeds:
        x, y = batch(seed)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        for other in others:
            other.step()
    return float(loss.detach())


def made(kind: str = "adam", **options: Any) -> tuple[fxsvd.Evolver, Any]:
    net = Residual().double().train()
    optimizer = OPTIMIZERS[kind](net.parameters())
    return fxsvd.Evolver(net, batch(0)[0], optimizer, **options), optimizer


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_without_dead_channels_training_goes_on_as_with_them(kind: str) -> None:
    """The oracle: dead channels never move, so removing them must change no later step."""
    (evolver, optimizer), (control, other) = made(kind), made(kind)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 3, 0.5) for o in (optimizer, other)]
    train(evolver.model, optimizer, range(1, 6), schedules[0])
    train(control.model, other, range(1, 6), schedules[1])
    model = evolver.model
    evolver.resize(Prune(criterion="dead", ratio=0.5))
    assert model.a.weight.shape[0] == 5
    train(evolver.model, optimizer, range(6, 16), schedules[0])
    train(control.model, other, range(6, 16), schedules[1])
    assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"]
    alive = [i for i in range(8) if i % 3]
    assert torch.allclose(model.a.weight, control.model.a.weight[alive], rtol=1e-9, atol=1e-12)
    x = batch(99)[0]
    for mode in (True, False):
        a, b = model.train(mode)(x), control.model.train(mode)(x)
        assert (a - b).abs().max() < 1e-9 * b.abs().max()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("options", [Widen(ratio=0.5), Widen(ratio=1, init="split"), Prune(0.5)])
def test_the_optimizer_has_the_new_parameters_and_their_state(kind: str, options: Any) -> None:
    evolver, optimizer = made(kind)
    train(evolver.model, optimizer, range(3))
    evolver.resize(options)
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in owned} == {id(p) for p in evolver.model.parameters()}
    assert set(optimizer.state) == set(owned)
    for parameter in owned:
        for value in optimizer.state[parameter].values():
            assert value.shape in ((), parameter.shape)
    before = train(evolver.model, optimizer, range(3, 4))
    assert train(evolver.model, optimizer, range(4, 40)) < before + 0.2
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def test_kept_channels_keep_their_moments() -> None:
    evolver, optimizer = made()
    train(evolver.model, optimizer, range(4))
    old = copy.deepcopy(optimizer.state[evolver.model.a.weight])
    event = evolver.resize(Prune(0.5, only="a"))
    (edit,) = event.plan.edits
    new = optimizer.state[evolver.model.a.weight]
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert torch.equal(new[key], old[key][list(edit.keep)])
    assert new["step"] == old["step"]


def test_copies_start_without_momentum_and_with_second_moments() -> None:
    evolver, optimizer = made()
    train(evolver.model, optimizer, range(4))
    old = copy.deepcopy(optimizer.state[evolver.model.a.weight])
    (edit,) = evolver.resize(Widen(ratio=0.5, only="a")).plan.edits
    new = optimizer.state[evolver.model.a.weight]
    copies = torch.tensor([i > 0 and k == edit.keep[i - 1] for i, k in enumerate(edit.keep)])
    assert int(copies.sum()) == 4
    assert torch.equal(new["exp_avg_sq"], old["exp_avg_sq"][list(edit.keep)])
    assert torch.equal(new["exp_avg"][~copies], old["exp_avg"])
    assert not new["exp_avg"][copies].any()


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


def test_a_strangers_optimizer_is_refused() -> None:
    net, other = Residual(), Residual()
    x = batch(0)[0].float()
    with pytest.raises(FxsvdError, match="10 of the optimizer's 10 parameters are not this"):
        fxsvd.Evolver(net, x, torch.optim.SGD(other.parameters(), lr=0.1))
    with pytest.raises(PlanError, match="1 or more"):
        fxsvd.Evolver(net, x, torch.optim.SGD(net.parameters(), lr=0.1), every=0)


def test_groups_keep_their_options_and_a_part_may_stay_frozen() -> None:
    net = Residual().double().train()
    net.stem.requires_grad_(False)
    some = [net.a.weight, net.b.weight]
    groups: Any = [{"params": net.head.parameters(), "lr": 0.5}, {"params": some}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    evolver = fxsvd.Evolver(net, batch(0)[0], optimizer)
    evolver.resize(Widen(ratio=0.5))
    model = evolver.model
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.1]
    assert optimizer.param_groups[0]["params"][0] is model.head.weight
    assert optimizer.param_groups[1]["params"][1] is model.b.weight
    assert not model.stem.weight.requires_grad


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


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_killed_and_resumed_training_goes_on_to_the_last_bit(kind: str, tmp_path: Path) -> None:
    passes = {
        2: (Widen(ratio=0.5),),
        4: (Prune(0.8),),
        5: (Factorize(rank={"a": 2}),),
        6: (Prune(0.25, only="stem"), Widen(ratio=1.0, init="split", only="stem")),
    }

    def fresh() -> tuple[fxsvd.Evolver, Any]:
        policy = fxsvd.Schedule(passes)
        return made(kind, policy=policy, loss=thinness, max_loss_increase=1.0)

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
    assert [str(e) for e in again.history] == [str(e) for e in evolver.history]
    assert {e.undone for e in again.history} == {True, False}
    go(again, resumed, range(8, 12))
    expected, state = evolver.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    with pytest.raises(PlanError, match="resized already"):
        again.load_state_dict(evolver.state_dict())
