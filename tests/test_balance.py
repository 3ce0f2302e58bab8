"""Balance: channels go where they are worth least and come where they promise most."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxsvd
from fxsvd import cost
from fxsvd.errors import PlanError
from fxsvd.evolving.balance import Balance
from fxsvd.evolving.moves import Drop, Fill, Promise, Step, size_of, traded, widened, without
from fxsvd.evolving.prices import prices
from fxsvd.growing.gradients import prospects
from fxsvd.passes import Widen
from fxsvd.rewrite import rewrite


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


class Images(nn.Module):
    """A stream with batch norm, whose branch is free, and a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.a, self.b = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.c, self.head = nn.Conv2d(6, 5, 3), nn.Linear(5 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.b(F.relu(self.a(x)))
        return self.head(F.relu(self.c(x)).flatten(1))


def images(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 2, 5, 5, generator=generator).double()
    return x, (x.mean((1, 2, 3)) * 20).long().clamp(0, 2)


def regression(seed: int, teacher: nn.Module, inputs: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, inputs, generator=generator).double()
    with torch.no_grad():
        return x, teacher(x)


def train(evolver: fxsvd.Evolver, data: list[Any], loss: Any, steps: int) -> float:
    value = torch.zeros(())
    for step in range(steps):
        x, y = data[step % len(data)]
        evolver.optimizer.zero_grad()
        value = loss(evolver.model(x), y)
        value.backward()
        evolver.optimizer.step()
    return float(value.detach())


def analyzed(net: nn.Module, x: Tensor) -> Any:
    return fxsvd.analyze(fxsvd.capture(net, x))


# ---------------------------------------------------------------- what channels are worth


def test_worth_is_the_fisher_estimate_and_what_a_channel_still_learns() -> None:
    """The oracle multiplies each channel by a gate, one sample at a time."""
    torch.manual_seed(0)
    net, x, y = mlp(3, 5, 2), torch.randn(7, 3).double(), torch.randn(7, 2).double()
    gates = torch.ones(5, dtype=torch.float64, requires_grad=True)
    squares = torch.zeros(5, dtype=torch.float64)
    for i in range(7):
        out = net[2](gates * torch.tanh(net[0](x[i : i + 1])))
        squares += torch.autograd.grad(F.mse_loss(out, y[i : i + 1]), gates)[0].square()
    rows = torch.autograd.grad(F.mse_loss(net(x), y), [net[0].weight, net[0].bias])
    learns = rows[0].square().sum(1) + rows[1].square()
    deps = analyzed(net, x)
    channels = deps.space("0").channels
    for data in ([(x, y)], [(x[:7], y[:7])]):
        worth = prices(deps, F.mse_loss, data, 0.3)[channels]
        assert np.allclose(worth, squares / 7 / 2 + 0.3 * learns, rtol=1e-9, atol=0)
    halves = [(x[:3], y[:3]), (x[3:], y[3:])]
    assert np.allclose(prices(deps, F.mse_loss, halves, 0.0)[channels], squares / 14, rtol=1e-9)


def test_worth_sums_over_the_positions_and_readers_of_a_sample() -> None:
    torch.manual_seed(0)
    net, (x, y) = Images().double().eval(), images(0)
    pairs = zip(x.split(1), y.split(1), strict=True)
    squares = sum((_by_readers(net, *pair) for pair in pairs), torch.zeros(6).double())
    deps = analyzed(net, x)
    worth = prices(deps, F.cross_entropy, [(x, y)], 0.0)[deps.space("stem").channels]
    assert np.allclose(worth, squares / len(x) / 2, rtol=1e-9, atol=0)


def _by_readers(net: Images, x: Tensor, y: Tensor) -> Tensor:
    """Squared derivatives in gates before both readers of the stream."""
    gates = torch.ones(6, dtype=torch.float64, requires_grad=True)
    stream = F.relu(net.norm(net.stem(x)))
    stream = stream + net.b(F.relu(net.a(stream * gates[:, None, None])))
    out = net.head(F.relu(net.c(stream * gates[:, None, None])).flatten(1))
    return torch.autograd.grad(F.cross_entropy(out, y), gates)[0].square()


def test_a_new_channel_is_worth_what_it_promised() -> None:
    torch.manual_seed(0)
    net, x, y = mlp(3, 5, 2), torch.randn(7, 3).double(), torch.randn(7, 2).double()
    deps = analyzed(net, x)
    found = prospects(deps, deps.space("0"), F.mse_loss, [(x, y)])
    grow = Widen(to=7, init="gradient", loss=F.mse_loss, data=[(x, y)])
    wide = fxsvd.analyze(rewrite(deps, grow.propose(deps)))
    worth = np.sort(prices(wide, F.mse_loss, [(x, y)], 0.5)[wide.space("0").channels])
    promised = 0.5 * found.gradients[:2].square().numpy()
    for value in promised:
        assert np.isclose(worth, value, rtol=1e-9).any()


# ---------------------------------------------------------------- what moves


def test_sizes_of_what_would_be_are_exact() -> None:
    net, (x, _) = Images(), images(0)
    deps = analyzed(net, x.float())
    gone = Step(0.0, 0, deps.space("a").channels[:3])
    for counts in (without(deps, [gone]), widened(deps, ["a", "a", "c"])):
        small = {True: 5, False: 10}[bool((counts == 0).any())]
        c = 5 if small == 5 else 6
        by_hand = 114 + 12 + small * 55 + (small * 6 + 6) + c * 55 + (c * 27 + 3)
        assert size_of(deps, "parameters", counts) == by_hand
        macs = 25 * (6 * 18 + small * 54 + small * 6) + 9 * c * 54 + c * 27
        assert size_of(deps, "macs", counts) == macs


@pytest.mark.parametrize(
    ("room", "gone", "come"),
    [
        (0, [0.125, 0.25], ["a", "b"]),  # 0.625 is worth too much
        (4, [0.125], ["a", "b"]),
        (12, [], ["a", "b", "c"]),
        (1, [0.125, 0.25], ["a", "b"]),
    ],
)
def test_what_promises_more_takes_the_place_of_what_is_worth_less(
    room: int, gone: list[float], come: list[str]
) -> None:
    there = [Step(4 * d, 4, np.array([0])) for d in (0.125, 0.25, 0.625)]
    promises = [Promise(4 * d, 4, name) for d, name in ((0.9, "a"), (0.5, "b"), (0.05, "c"))]
    steps, spaces = traded(room, there, promises)
    assert [step.density for step in steps] == gone
    assert [promise.space for promise in spaces] == come


def test_dropped_channels_are_those_worth_least_until_it_fits() -> None:
    torch.manual_seed(0)
    net = mlp(4, 10, 6, 2)
    x, y = torch.randn(32, 4).double(), torch.randn(32, 2).double()
    deps = analyzed(net, x)
    policy = Balance(budget=100, loss=F.mse_loss, data=[(x, y)])
    (drop,) = policy(deps.analysis.graph, 1)
    small = rewrite(deps, drop.propose(deps))
    assert cost.parameters(small) <= 100
    worth = prices(deps, F.mse_loss, [(x, y)], 1.0)
    for name in ("0", "2"):
        channels = deps.space(name).channels
        keep = drop.keep.get(name, tuple(range(len(channels))))
        kept, gone = worth[channels[list(keep)]], np.delete(worth[channels], keep)
        assert len(kept) >= 1
        assert not len(gone) or kept.min() >= gone.max()
    after = fxsvd.analyze(small)
    for name in [name for name in ("0", "2") if not after.space(name).frozen]:
        assert size_of(after, "parameters", widened(after, [name])) > 100  # none went needlessly


@pytest.mark.parametrize(("measure", "budget"), [("parameters", 1100), ("macs", 17_000)])
@pytest.mark.parametrize("limit", [10.0, 1e-9])  # the second: what makes room is undone
def test_the_network_is_always_within_the_budget(measure: Any, budget: int, limit: float) -> None:
    torch.manual_seed(0)
    net, data = Images().double().train(), [images(i) for i in range(3)]
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    policy = Balance(budget=budget, measure=measure, loss=F.cross_entropy, data=data, most=0.3)
    evolver = fxsvd.Evolver(net, data[0][0], optimizer, policy=policy)
    size = getattr(cost, measure)
    for step in range(1, 6):
        train(evolver, data, F.cross_entropy, 6)
        evolver.step(step)
        assert size(evolver.model) <= budget
        evolver.loss, evolver.max_loss_increase = held_out, limit
    assert size(evolver.model) > 0.85 * budget
    assert any(event.undone for event in evolver.history) == (limit < 1)
    assert any(event.plan.widens and not event.undone for event in evolver.history)


def held_out(net: nn.Module) -> Tensor:
    x, y = images(0)
    return F.cross_entropy(net(x), y)


def test_channels_move_from_where_most_are_dead_to_where_some_are_missing() -> None:
    """A student whose first layer is far too wide for the teacher and whose second too narrow."""
    torch.manual_seed(0)
    teacher, student = mlp(4, 3, 12, 6), mlp(4, 20, 3, 6)
    with torch.no_grad():
        student[0].weight[4:] = 0
        student[0].bias[4:] = 0
        student[2].weight[:, 4:] = 0
    data = [regression(i, teacher) for i in range(4)]
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    budget = cost.parameters(student)
    policy = Balance(budget=budget, loss=F.mse_loss, data=data, most=0.25)
    evolver = fxsvd.Evolver(student, data[0][0], optimizer, policy=policy)
    start = train(evolver, data, F.mse_loss, 300)
    widths = [(20, 3)]
    for step in range(1, 9):
        evolver.step(step)
        assert cost.parameters(evolver.model) <= budget
        first, second = (evolver.model.get_submodule(n).out_features for n in ("0", "2"))
        widths.append((first, second))
        end = train(evolver, data, F.mse_loss, 100)
    assert widths[-1][0] <= 12
    assert widths[-1][1] >= 6
    assert end < 0.5 * start


def test_nothing_is_emptied_and_a_single_channel_stays() -> None:
    torch.manual_seed(0)
    net, (x, y) = mlp(3, 1, 6, 2), (torch.randn(9, 3).double(), torch.randn(9, 2).double())
    deps = analyzed(net, x)
    (drop,) = Balance(budget=10, loss=F.mse_loss, data=[(x, y)])(deps.analysis.graph, 1)
    assert {name: len(keep) for name, keep in drop.keep.items()} == {"2": 1}
    with pytest.raises(PlanError, match="cannot become smaller than 10 parameters"):
        Balance(budget=9, loss=F.mse_loss, data=[(x, y)])(deps.analysis.graph, 1)


def test_only_and_ignore_leave_spaces_alone() -> None:
    torch.manual_seed(0)
    net, (x, y) = Images().double(), images(0)
    deps = analyzed(net, x)
    for options in ({"only": "a"}, {"ignore": ("stem", "c")}):
        small = Balance(budget=1000, loss=F.cross_entropy, data=[(x, y)], **options)
        (drop,) = small(deps.analysis.graph, 1)
        assert set(drop.keep) == {"a"}
        large = Balance(budget=2000, loss=F.cross_entropy, data=[(x, y)], **options)
        (fill,) = large(deps.analysis.graph, 1)
        assert set(fill.spaces) == {"a"}


def test_without_room_nothing_comes() -> None:
    torch.manual_seed(0)
    net, (x, y) = mlp(3, 4, 2), (torch.randn(9, 3).double(), torch.randn(9, 2).double())
    deps = analyzed(net, x)
    plan = Fill(("0",), 26, "parameters", F.mse_loss, [(x, y)]).propose(deps)
    assert not plan.edits
    assert plan.skips[0].why == "the budget has no room for it"
    assert len(Fill(("0", "0"), 32, "parameters", F.mse_loss, [(x, y)]).propose(deps).edits) == 1
    assert Drop({"0": (1, 3)}).propose(deps).edits[0].keep == (1, 3)


def test_gradients_of_the_parameters_stay_as_they_are() -> None:
    torch.manual_seed(0)
    net, (x, y) = Images().double().train(), images(0)
    graph = fxsvd.capture(net, x).train()
    F.cross_entropy(graph(x), y).backward()
    before = {n: (p.detach().clone(), p.grad.clone()) for n, p in graph.named_parameters()}
    buffers = {n: b.clone() for n, b in graph.named_buffers()}
    Balance(budget=1000, loss=F.cross_entropy, data=[(x, y)])(graph, 1)
    assert graph.training
    assert graph.norm.training
    for name, parameter in graph.named_parameters():
        assert parameter.requires_grad
        assert torch.equal(parameter, before[name][0])
        assert torch.equal(parameter.grad, before[name][1])
    assert all(torch.equal(b, buffers[n]) for n, b in graph.named_buffers())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measure": "bytes"}, "there is no measure 'bytes'"),
        ({"budget": 0}, "above 0"),
        ({"rate": 0.0}, "above 0"),
        ({"most": 1.0}, r"in \[0, 1\)"),
    ],
)
def test_bad_options_say_what_is_wrong(options: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Balance(**{"budget": 10, "loss": F.mse_loss, "data": [], **options})


def test_data_and_loss_have_to_be_there() -> None:
    deps = analyzed(mlp(3, 4, 2), torch.zeros(2, 3).double())
    with pytest.raises(PlanError, match="no batch"):
        Balance(budget=10, loss=F.mse_loss, data=[])(deps.analysis.graph, 1)
    batch = (torch.zeros(2, 3).double(), torch.full((2, 2), torch.nan).double())
    with pytest.raises(PlanError, match="the loss is nan"):
        Balance(budget=10, loss=F.mse_loss, data=[batch])(deps.analysis.graph, 1)
