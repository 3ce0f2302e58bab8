"""Widen: wider networks that compute what they did, and go on learning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxsvd
from fxsvd.edits import Assign, Plan, Remap
from fxsvd.errors import PlanError, VerificationError
from fxsvd.growing.rows import orthogonal_rows, shares
from fxsvd.passes import Prune, Widen
from fxsvd.rewrite import rewrite
from fxsvd.running import doubled
from fxsvd.verify import verify_rewrite
from tests.helpers.nets import IDIOMS, call, leaves, randomized, to_double

INITS = ("orthogonal", "split")


class Block(nn.Module):
    """A residual stream with batch norm, a cat, a grouped convolution and a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.a, self.b = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 1)
        self.mix, self.grouped = nn.Conv2d(14, 8, 1), nn.Conv2d(8, 4, 3, groups=2)
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.stem(x)))
        inner = F.silu(self.a(x))
        x = x + self.b(inner)
        x = self.mix(torch.cat([x, inner], 1)).sigmoid()
        return self.head(self.grouped(x).sigmoid().flatten(1))


class Attention(nn.Module):
    """Queries and keys are multiplied with each other: no layer reads them."""

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(size, 8) for _ in range(3))
        self.o = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).view(x.shape[0], -1, 2, 4).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.o(out.transpose(1, 2).reshape(x.shape[0], -1, 8))


def widened(net: nn.Module, x: Any, *passes: Any) -> Any:
    return fxsvd.compile(net, x, passes=passes, progress=False, verify=False)


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1)).double()


def made(kind: Callable[[], nn.Module] = Block) -> nn.Module:
    torch.manual_seed(0)
    return randomized(kind()).double().eval()


def sizes(**after: int) -> dict[str, tuple[int, int]]:
    """The widths of a block, before and after."""
    before = {"stem": 8, "a": 6, "mix": 8, "grouped": 4, "head": 3}
    return {name: (width, after.get(name, width)) for name, width in before.items()}


def widths(small: Any) -> dict[str, tuple[int, int]]:
    return {row.name: (row.before, row.after) for row in small.report.spaces}


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("name", IDIOMS)
def test_every_idiom_computes_what_it_did(name: str, init: Any) -> None:
    torch.manual_seed(0)
    net = randomized(IDIOMS[name].build()).eval()
    inputs = IDIOMS[name].inputs(2)
    ratio = 1.0 if init == "split" else 0.5
    graph = doubled(fxsvd.capture(net, inputs))
    inputs = to_double(inputs)
    wide = widened(graph, inputs, Widen(ratio=ratio, init=init))
    with torch.no_grad():
        expected = leaves(call(graph, inputs))
        for a, b in zip(leaves(call(wide, inputs)), expected, strict=True):
            assert float((a - b).abs().max()) <= 1e-9 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("training", [False, True])
def test_nothing_changes_in_either_mode(init: Any, training: bool) -> None:
    net, x = made(), images()
    wide = widened(net, x, Widen(ratio=0.5, init=init))
    assert widths(wide) == sizes(stem=12, a=9, mix=12, grouped=6)
    expected = net.train(training)(x)
    assert (wide.train(training)(x) - expected).abs().max() < 1e-9 * expected.abs().max()


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize(
    ("kind", "shape"), [(Block, (16, 3, 6, 6)), (Attention, (16, 5, 6))], ids=["block", "attention"]
)
def test_new_units_learn_at_the_next_step(kind: Any, shape: Any, init: Any) -> None:
    net, x = made(kind), torch.randn(shape, generator=torch.Generator().manual_seed(2)).double()
    wide = widened(net, x, Widen(ratio=0.5, init=init)).train()
    before = {n: p.detach().clone() for n, p in wide.named_parameters()}
    optimizer = torch.optim.SGD(wide.parameters(), lr=1e-3)
    for _ in range(2):  # with outgoing zeros, what comes in gets its gradient a step later
        optimizer.zero_grad()
        wide(x).square().sum().backward()
        optimizer.step()
    for name, parameter in wide.named_parameters():
        if parameter.dim() > 1:
            moved = (parameter - before[name]).abs()
            assert (moved.flatten(1).amax(1) > 0).all(), name
            assert (moved.transpose(0, 1).flatten(1).amax(1) > 0).all(), name


def test_copies_that_are_split_become_different() -> None:
    net, x = made(), images(16)
    wide = widened(net, x, Widen(ratio=1.0, init="split")).train()
    assert torch.equal(wide.stem.weight[0], wide.stem.weight[1])
    wide(x).square().sum().backward()
    gradient = wide.stem.weight.grad
    assert not torch.allclose(gradient[0], gradient[1])


@pytest.mark.parametrize("size", [6, 12], ids=["fewer inputs than keys", "more"])
def test_attention_keeps_its_scores(size: int) -> None:
    net, x = made(partial(Attention, size)), torch.randn(3, 5, size).double()
    wide = widened(net, x, Widen(ratio=0.5, init="orthogonal"))
    assert wide.q.weight.shape == (12, size)
    new = (wide.k.weight == 0).all(1)
    assert new.reshape(2, 6).sum(1).tolist() == [2, 2]
    assert not (wide.q.weight == 0).all(1).any()
    assert (wide(x) - net(x)).abs().max() < 1e-9


class Scaled(nn.Module):
    """Features, divided by a number that depends on how many there are."""

    def __init__(self, length: Any) -> None:
        super().__init__()
        self.a, self.out, self.length = nn.Linear(5, 8), nn.Linear(8, 3), length

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.out(y / self.length(y))


LENGTHS = {
    "norm": lambda y: y.norm(dim=-1, keepdim=True),
    "vector_norm": lambda y: torch.linalg.vector_norm(y, dim=-1, keepdim=True),
    "sum": lambda y: y.square().sum(-1, keepdim=True),
    "cosine": lambda y: 2 + F.cosine_similarity(y, y.tanh(), dim=-1).unsqueeze(-1),
}


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("length", LENGTHS)
def test_where_features_are_added_up_copies_would_show(length: str, init: Any) -> None:
    net = Scaled(LENGTHS[length]).double()
    step = Widen(ratio=1.0, init=init)
    wide = fxsvd.compile(net, torch.randn(4, 5).double(), passes=[step], progress=False)
    even = length == "cosine" and init == "split"  # of equally many copies it is what it was
    assert widths(wide)["a"] == (8, 16 if even else 8)
    assert even or "over channels" in wide.report.plan.skips[0].why


def test_what_a_norm_runs_over_is_split_whole_or_stays() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 2)).double()
    x = torch.randn(5, 4).double()
    (skip, _) = widened(net, x, Widen(init="split", ratio=0.5)).report.plan.skips
    assert "takes a statistic over channels" in skip.why
    wide = widened(net, x, Widen(ratio=1.0, init="split"))
    assert wide.get_submodule("1").normalized_shape == (12,)
    assert (wide(x) - net(x)).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"to": 10}, sizes(stem=10, a=10, mix=10, grouped=10)),
        ({"to": {"a": 7}}, sizes(a=7)),
        ({"to": 6}, sizes(grouped=6)),
        ({"ratio": {"st*": 0.25}}, sizes(stem=10)),
        ({"ratio": 2.5, "only": "a"}, sizes(a=21)),
        ({"ratio": 1, "ignore": ("a", "b")}, sizes(mix=16, grouped=8)),
    ],
)
def test_widths_are_what_is_asked_for(options: Any, expected: Any) -> None:
    assert widths(widened(made(), images(), Widen(**options))) == expected


def test_narrowing_afterwards_and_before() -> None:
    net, x = made(), images()
    both = fxsvd.compile(net, x, passes=[Prune(0.5), Widen(to={"a": 6})], progress=False)
    assert widths(both)["a"] == (6, 6)
    wide = fxsvd.compile(net, x, passes=[Widen(ratio=1.0)], progress=False)
    small = fxsvd.compile(wide, x, passes=[Prune(0.5)], progress=False)
    assert {n: p.shape for n, p in small.named_parameters()} == {
        n: p.shape for n, p in net.named_parameters()
    }


def test_a_plan_survives_json() -> None:
    net, x = made(), images()
    plan = fxsvd.plan(net, x, passes=[Widen(ratio=0.5)])
    assert plan.widens
    assert plan.exact
    again = Plan.from_json(plan.to_json())
    assert again == plan
    graph = fxsvd.capture(net, x)
    one, two = (fxsvd.apply(graph, p).state_dict() for p in (plan, again))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_verify_catches() -> None:
    net, x = made(), images()
    plan = fxsvd.plan(net, x, passes=[Widen(ratio=1.0, only="a")])
    wrong = plan.values[-1]
    value = wrong.value.clone()
    value[:, 1] += 0.1
    values = (*plan.values[:-1], Assign(wrong.parameter, value, wrong.why))
    graph = fxsvd.capture(net, x)
    deps = fxsvd.analyze(graph)
    bad = replace(plan, values=values)
    with pytest.raises(VerificationError, match="differs"):
        verify_rewrite(deps, bad, rewrite(deps, bad), x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either ratio= or to="),
        ({"ratio": 0.5, "to": 8}, "either ratio= or to="),
        ({"ratio": -0.5}, "0 or more"),
        ({"to": 8.5}, "a number of channels"),
        ({"ratio": 1, "init": "zeros"}, "there is no init 'zeros'"),
    ],
)
def test_bad_options_say_what_is_wrong(options: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Widen(**options)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan((Remap("head", 3, (0, 0, 1, 2)),)), "cannot be widened: it is the network's output"),
        (Plan((Remap("a", 6, (0, 0, 1)),)), "two stages"),
        (
            Plan((Remap("a", 6, (0, 0, 1, 2, 3, 4, 5)),), values=(Assign("b", torch.ones(2), ""),)),
            "has no place",
        ),
    ],
)
def test_plans_that_do_not_fit_are_refused(plan: Plan, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        fxsvd.apply(fxsvd.capture(made(), images()), plan)


@pytest.mark.parametrize("length", ["typical", "smallest"])
@pytest.mark.parametrize("rank", [0, 2, 5])
def test_new_rows_are_orthogonal_to_those_that_are_there(rank: int, length: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(5, rank, generator=generator).double()
    old = a @ torch.randn(rank, 12, generator=generator).double()
    new = orthogonal_rows(old, 6, generator, length)
    assert new.shape == (6, 12)
    assert (old @ new.T).abs().max() < 1e-9
    values = torch.linalg.svdvals(old)[:rank]
    square = values[-1] ** 2 / 4 if length == "smallest" and rank else values.square().sum() / 5
    expected = (square if rank else 1) * torch.eye(6).double()
    assert torch.allclose(new @ new.T, expected, atol=1e-9)


def test_without_room_new_rows_are_orthogonal_to_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    new = orthogonal_rows(torch.eye(4).double(), 3, generator)
    assert torch.allclose(new @ new.T, torch.eye(3).double(), atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_shares_add_up_exactly(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(50, generator=generator).to(dtype)
    wide = value.repeat_interleave(4)
    rank, times = torch.arange(4).repeat(50), torch.full((200,), 4)
    parts = shares(wide, rank, times, generator)
    total = torch.zeros(50, dtype=dtype)
    for copy in reversed(range(4)):  # in this order the sums have no rounding
        total = total + parts.reshape(50, 4)[:, copy]
    assert torch.equal(total, value)
    assert (parts.reshape(50, 4)[:, 0] != parts.reshape(50, 4)[:, 1]).all()
