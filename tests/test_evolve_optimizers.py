"""Optimizers, schedulers and scalers that go on with a resized network."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxsvd
from fxsvd.edits import Assign, Plan, Remap
from fxsvd.errors import FxsvdError, PlanError
from fxsvd.passes import Factorize, Prune, Rotate, Widen
from tests.helpers.evolving import OPTIMIZERS, Residual, batch, made, train


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


def test_what_is_turned_into_another_basis_forgets_its_moments() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    x = torch.randn(32, 4).double()
    optimizer = torch.optim.Adam(net.parameters())
    evolver = fxsvd.Evolver(net, x, optimizer, data=32)
    for _ in range(3):
        optimizer.zero_grad()
        evolver.model(x).square().sum().backward()
        optimizer.step()
    evolver.resize(Rotate(ratio=0.5))
    parameters = dict(evolver.model.named_parameters())
    assert parameters["0.weight"].shape == (3, 4)
    remembered = {name for name, p in parameters.items() if optimizer.state.get(p)}
    assert remembered == {"3.weight", "3.bias"}


def copied(edit: Remap) -> Tensor:
    """Which channels of a widened space are copies."""
    return torch.tensor([i > 0 and k == edit.keep[i - 1] for i, k in enumerate(edit.keep)])


def test_copies_start_without_a_past_and_the_others_with_theirs() -> None:
    evolver, optimizer = made()
    train(evolver.model, optimizer, range(30))
    old = copy.deepcopy(optimizer.state[evolver.model.a.weight])
    (edit,) = evolver.resize(Widen(ratio=0.5, only="a")).plan.edits
    new = optimizer.state[evolver.model.a.weight]
    copies = copied(edit)
    assert int(copies.sum()) == 4
    assert (old["step"], new["step"]) == (30, 10)
    for key, beta in (("exp_avg", 0.9), ("exp_avg_sq", 0.999), ("max_exp_avg_sq", 0.999)):
        assert not new[key][copies].any()
        corrected = new[key][~copies] / (1 - beta**10)
        assert torch.allclose(corrected, old[key] / (1 - beta**30), rtol=1e-12)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_new_weights_make_steps_as_long_as_the_rate(kind: Any, scale: float) -> None:
    rate, generator = 1e-3, torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    optimizer = kind(net.parameters(), rate, weight_decay=0)
    evolver = fxsvd.Evolver(net, torch.randn(5, 3).double(), optimizer)

    def step(scale: float) -> Tensor:
        before = evolver.model.get_submodule("1").weight.detach().clone()
        for parameter in evolver.model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.grad = scale * (1 + noise)
        optimizer.step()
        return (evolver.model.get_submodule("1").weight - before).detach().abs()

    for _ in range(500):
        step(1.0)
    (edit,) = evolver.resize(Widen(to=7, only="0")).plan.edits
    new = copied(edit)
    for _ in range(20):
        moved = step(scale)[:, new]
        assert rate / 5 < moved.mean() < 2 * rate
        assert moved.max() < 3 * rate


@pytest.mark.parametrize(
    ("kind", "options"),
    [("rmsprop", {"square_avg": 1}), ("lion", {"exp_avg": 0}), ("lamb", {"exp_avg_sq": 1})],
)
def test_where_no_steps_are_counted_copies_inherit_what_is_divided_by(
    kind: str, options: dict[str, int]
) -> None:
    optimizers = pytest.importorskip("timm.optim")
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    optimizer = optimizers.create_optimizer_v2(net, kind, lr=1e-3)
    evolver = fxsvd.Evolver(net, torch.randn(5, 3).double(), optimizer)
    for _ in range(30):
        optimizer.zero_grad()
        evolver.model(torch.randn(5, 3).double()).square().sum().backward()
        optimizer.step()
    old = copy.deepcopy(optimizer.state[evolver.model.get_submodule("0").weight])
    (edit,) = evolver.resize(Widen(to=6, only="0")).plan.edits
    new = optimizer.state[evolver.model.get_submodule("0").weight]
    copies = copied(edit)
    for key, share in options.items():
        assert torch.equal(new[key][~copies], old[key])
        assert torch.equal(new[key][copies], share * old[key][list(edit.keep)][copies])
    evolver.model(torch.randn(5, 3).double()).square().sum().backward()
    optimizer.step()


def test_a_strangers_optimizer_is_refused() -> None:
    net, other = Residual(), Residual()
    x = batch(0)[0].float()
    with pytest.raises(FxsvdError, match="9 of the optimizer's 9 parameters are not this"):
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


SCHEDULES = {
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=20),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "one after the other": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=4),
            torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        ],
        [4],
    ),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")  # SequentialLR's own
@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_follow_their_schedule_through_a_resize(name: str) -> None:
    (evolver, optimizer), (control, other) = made("nesterov"), made("nesterov")
    schedules = [SCHEDULES[name](o) for o in (optimizer, other)]
    train(evolver.model, optimizer, range(1, 6), schedules[0])
    train(control.model, other, range(1, 6), schedules[1])
    evolver.resize(Prune(criterion="dead", ratio=0.5))
    for step in range(6, 18):
        train(evolver.model, optimizer, range(step, step + 1), schedules[0])
        train(control.model, other, range(step, step + 1), schedules[1])
        options = ("lr", "momentum")
        for key in options:
            assert optimizer.param_groups[0][key] == other.param_groups[0][key]
    alive = [i for i in range(8) if i % 3]
    expected = control.model.a.weight[alive]
    assert torch.allclose(evolver.model.a.weight, expected, rtol=1e-9, atol=1e-12)


def test_a_gradient_scaler_goes_on() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    evolver = fxsvd.Evolver(net, torch.randn(2, 4), optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    x = torch.randn(16, 4)
    losses = []
    for step in range(12):
        if step == 4:
            evolver.resize(Widen(ratio=0.5))
        if step == 8:
            evolver.resize(Prune(0.25))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(evolver.model(x), (x.sum(1) > 0).long())
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(evolver.model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert scaler.get_scale() == 2.0**14
    assert losses[7] < losses[3] < losses[0]
    assert [len(optimizer.state[p]) for p in evolver.model.parameters()] == [3] * 4


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (torch.optim.LBFGS, "its history is of all parameters in one vector"),
        (torch.optim.Adafactor, "it remembers rows and columns, not numbers"),
        (torch.optim.ASGD, "let an AveragedModel do that"),
    ],
)
def test_optimizers_whose_memory_cannot_be_resized_are_refused(kind: Any, why: str) -> None:
    net = Residual().double()
    with pytest.raises(FxsvdError, match=f"{kind.__name__} cannot be resized: .*{why}"):
        fxsvd.Evolver(net, batch(0)[0], kind(net.parameters()))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("Adafactor", "it remembers rows and columns, not numbers"),
        ("Adahessian", "on the parameters themselves"),
    ],
)
def test_those_of_timm_are_refused_likewise(name: str, why: str) -> None:
    optimizers = pytest.importorskip("timm.optim", reason="needs the timm extra")
    net = Residual().double()
    with pytest.raises(FxsvdError, match=f"{name} cannot be resized: .*{why}"):
        fxsvd.Evolver(net, batch(0)[0], getattr(optimizers, name)(net.parameters()))


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("row_var", torch.zeros(8, 1, 1, 1), r"\[8, 1, 1, 1\] for one of \[8, 6, 3, 3\]"),
        ("factors", [torch.eye(8), torch.eye(8)], r"\[8, 8\] for one of \[8, 6, 3, 3\]"),
        ("x0", torch.zeros(8, 6, 3, 3), "where it was, and a resize moves it"),
    ],
)
def test_memory_of_anything_but_gradients_is_refused_before_anything_changes(
    key: str, value: Any, why: str
) -> None:
    evolver, optimizer = made("sgd")
    train(evolver.model, optimizer, range(2))
    optimizer.state[evolver.model.a.weight][key] = value
    shapes = [p.shape for p in evolver.model.parameters()]
    with pytest.raises(FxsvdError, match=rf"remembers `{key}` for `a.weight`, .*{why}"):
        evolver.resize(Prune(0.5))
    assert [p.shape for p in evolver.model.parameters()] == shapes
    train(evolver.model, optimizer, range(2, 4))


def linear_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 2)).double()


def step_of(evolver: fxsvd.Evolver, *optimizers: Any) -> None:
    x = torch.randn(8, 6).double()
    for optimizer in optimizers:
        optimizer.zero_grad()
    F.cross_entropy(evolver.model(x), (x.sum(1) > 0).long()).backward()
    for optimizer in optimizers:
        optimizer.step()


def test_muon_goes_on_with_matrices_and_is_given_nothing_else() -> None:
    net = linear_net()
    weights: list[Any] = [net.get_parameter(f"{i}.weight") for i in (0, 2)]
    optimizer = torch.optim.Muon(weights, lr=0.01)
    evolver = fxsvd.Evolver(net, torch.randn(2, 6).double(), optimizer)
    step_of(evolver, optimizer)
    old = optimizer.state[weights[1]]["momentum_buffer"].clone()
    (edit,) = evolver.resize(Prune(0.5)).plan.edits
    new = optimizer.state[evolver.model.get_parameter("2.weight")]["momentum_buffer"]
    assert torch.equal(new, old[:, list(edit.keep)])
    evolver.resize(Factorize(rank={"0": 2}))
    assert len(optimizer.param_groups[0]["params"]) == 3
    step_of(evolver, optimizer)
    with pytest.raises(FxsvdError, match="Muon trains matrices only"):
        evolver.resize(Factorize(rank={"2": 1}, last=True))
    step_of(evolver, optimizer)


@pytest.mark.parametrize("kind", ["adagrad", "adam"])
def test_what_is_new_joins_the_group_of_what_it_stands_for(kind: str) -> None:
    net = linear_net()
    weights = [p for p in net.parameters() if p.dim() == 2]
    biases = [p for p in net.parameters() if p.dim() == 1]
    groups: Any = [{"params": biases, "lr": 0.5}, {"params": weights}]
    optimizer = OPTIMIZERS[kind](groups)
    evolver = fxsvd.Evolver(net, torch.randn(2, 6).double(), optimizer)
    step_of(evolver, optimizer)
    evolver.resize(Factorize(rank={"2": 1}, last=True))
    model = evolver.model
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [
        id(model.get_parameter("2.1.bias"))
    ]
    assert len(optimizer.param_groups[1]["params"]) == 3
    step_of(evolver, optimizer)


@dataclass(frozen=True)
class Shift:
    """Adds a bias to a layer without one."""

    def propose(self, deps: Any, data: Any = None, say: Any = None) -> Plan:
        return Plan(values=(Assign("0.bias", torch.ones(8).double(), "shifts"),))


def test_a_bias_that_a_layer_gets_is_trained() -> None:
    net = linear_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    evolver = fxsvd.Evolver(net, torch.randn(2, 6).double(), optimizer)
    evolver.resize(Shift())
    step_of(evolver, optimizer)
    assert not bool((evolver.model.get_parameter("0.bias") == 1).any())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(7, 6)
        self.inner, self.back = nn.Linear(6, 8), nn.Linear(8, 6)
        self.out = nn.Linear(6, 7, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.back(self.inner(self.words(x)).tanh()))


@pytest.mark.parametrize("options", [Prune(0.5), Widen(ratio=0.5)])
def test_tied_weights_stay_tied_and_are_trained_once(options: Any) -> None:
    net, x = Tied().double(), torch.randint(7, (4, 3), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    evolver = fxsvd.Evolver(net, x, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        evolver.model(x).square().mean().backward()
        optimizer.step()
        evolver.resize(options)
    assert evolver.history
    model: Any = evolver.model
    assert model.out.weight is model.words.weight
    assert len(optimizer.param_groups[0]["params"]) == 5
    assert {p.shape for p in optimizer.state} == {p.shape for p in model.parameters()}


@pytest.mark.parametrize("options", [Prune(0.5), Widen(ratio=0.5), Factorize(rank={"a": 1})])
def test_a_frozen_layer_in_a_space_stays_frozen_and_out_of_the_optimizer(options: Any) -> None:
    net = Residual().double().train()
    net.a.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.01)
    evolver = fxsvd.Evolver(net, batch(0)[0], optimizer)
    train(evolver.model, optimizer, range(2))
    evolver.resize(options)
    frozen = {name for name, p in evolver.model.named_parameters() if not p.requires_grad}
    assert {name.partition(".")[0] for name in frozen} == {"a"}
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = {id(p) for p in evolver.model.parameters() if p.requires_grad}
    assert owned == trained
    before = {name: evolver.model.get_parameter(name).clone() for name in frozen}
    train(evolver.model, optimizer, range(2, 4))
    assert all(torch.equal(evolver.model.get_parameter(n), v) for n, v in before.items())
