"""Which channels Prune drops, and how many."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxsvd
from fxsvd.errors import PlanError
from fxsvd.passes import Prune


class Residual(nn.Module):
    """A stem, two residual blocks and a classifier: one stream, two inner spaces."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3)
        self.a, self.norm, self.b = nn.Conv2d(16, 20, 1), nn.BatchNorm2d(20), nn.Conv2d(20, 16, 1)
        self.c, self.d = nn.Conv2d(16, 12, 1), nn.Conv2d(12, 16, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.b(F.relu(self.norm(self.a(x))))
        x = x + self.d(F.relu(self.c(x)))
        return self.fc(x.mean((2, 3)))


X = torch.randn(2, 3, 8, 8)


def widths(plan):
    return {edit.space: len(edit.keep) for edit in plan.edits}


def propose(net=None, x=X, **options):
    return fxsvd.plan(net or Residual(), x, passes=[Prune(**options)])


def per_channel(t, dim):
    return t.movedim(dim, 0).reshape(t.shape[dim], -1).sum(1)


def test_every_space_loses_the_ratio():
    assert widths(propose(ratio=0.5)) == {"stem": 8, "a": 10, "c": 6}
    assert widths(propose(ratio=0.25)) == {"stem": 12, "a": 15, "c": 9}
    assert propose(ratio=0.0).edits == ()


def test_plan_reads_well():
    assert str(propose(ratio=0.5)) == (
        "stem: 16 -> 8\na: 20 -> 10\nc: 12 -> 6\nfc: 5 stays (it is the network's output)"
    )


@pytest.mark.parametrize(("criterion", "power"), [("l1", 1), ("l2", 2)])
def test_magnitude_sums_over_all_coupled_tensors(criterion, power):
    net = Residual()
    size = sum(
        per_channel(t.detach().abs().pow(power), dim)
        for t, dim in [
            *((net.stem.weight, 0), (net.stem.bias, 0), (net.b.weight, 0), (net.b.bias, 0)),
            *((net.d.weight, 0), (net.d.bias, 0), (net.a.weight, 1), (net.c.weight, 1)),
            (net.fc.weight, 1),
        ]
    )
    kept = propose(net, ratio=0.5, criterion=criterion, only=("stem",)).edits[0].keep
    assert kept == tuple(sorted(size.topk(8).indices.tolist()))


def test_bn_criterion_reads_the_scales():
    net = Residual()
    with torch.no_grad():
        net.norm.weight.copy_(torch.arange(20.0) * torch.tensor([1.0, -1.0] * 10))
    assert propose(net, criterion="bn", only=("a",)).edits[0].keep == tuple(range(10, 20))


def test_taylor_is_the_first_order_change_of_the_loss():
    net, data = Residual().eval(), [(X, torch.tensor([0, 1]))]
    F.cross_entropy(net(X), data[0][1]).backward()
    coupled = [(net.c.weight, 0), (net.c.bias, 0), (net.d.weight, 1)]
    change = sum(per_channel(t.detach() * t.grad, dim) for t, dim in coupled)
    net.zero_grad()
    options = {"criterion": "taylor", "loss": F.cross_entropy, "data": data, "only": ("c",)}
    with torch.no_grad():  # as somebody may who does not train
        kept = propose(net, **options).edits[0].keep
    assert kept == tuple(sorted(change.abs().topk(6).indices.tolist()))
    assert all(p.grad is None for p in net.parameters())


def test_taylor_needs_something_that_is_trained():
    with pytest.raises(PlanError, match="no parameter requires a gradient"):
        propose(
            Residual().requires_grad_(False),
            criterion="taylor",
            loss=F.cross_entropy,
            data=[(X, torch.tensor([0, 1]))],
        )


def test_random_is_seeded():
    first, again, other = (propose(criterion="random", seed=s) for s in (0, 0, 1))
    assert first == again
    assert first != other


def test_global_scope_removes_the_ratio_of_all_channels():
    net = Residual()
    with torch.no_grad():
        fading = torch.linspace(0.01, 1, 12)
        net.c.weight.mul_(fading.reshape(-1, 1, 1, 1))
        net.d.weight.mul_(fading.reshape(1, -1, 1, 1))
    plan = propose(net, ratio=0.5, scope="global")
    left = {"stem": 16, "a": 20, "c": 12} | widths(plan)
    assert sum(left.values()) == 24
    assert all(width >= 1 for width in left.values())
    assert left["c"] < 12


@pytest.mark.parametrize("multiple", [2, 4, 8])
def test_round_to(multiple):
    left = widths(propose(ratio=0.5, round_to=multiple))
    assert left
    assert all(width % multiple == 0 for width in left.values())


def test_ratios_by_name_pattern():
    plan = propose(ratio={"a": 0.9, "*": 0.25})
    assert widths(plan) == {"stem": 12, "a": 2, "c": 9}
    assert widths(propose(ratio={"c": 0.5})) == {"c": 6}


def test_only_and_ignore_mean_a_space_by_any_of_its_producers():
    net = Residual()
    assert widths(propose(net, only=("d",))) == {"stem": 8}
    assert widths(propose(net, only=(net.b,))) == {"stem": 8}
    both = fxsvd.compile(net, X, passes=[Prune(0.5, ignore="a")], ignore="b", progress=False)
    assert {r.name: r.after for r in both.report.spaces if r.after < r.before} == {"c": 6}
    assert widths(propose(net, only="d")) == widths(propose(net, only=net.b)) == {"stem": 8}
    assert widths(propose(net, ignore=("b", "c*"))) == {"a": 10}
    skipped = {s.space: s.why for s in propose(net, ignore=(net.d,)).skips}
    assert skipped["stem"] == "in `ignore`"


def test_containers_are_meant_by_prefix():
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8)), nn.Linear(8, 2))
    assert widths(propose(net, torch.zeros(2, 4), only=("0",))) == {"0.0": 4, "0.2": 4}
    assert widths(propose(net, torch.zeros(2, 4), only=net[0])) == {"0.0": 4, "0.2": 4}


class Attention(nn.Module):
    def __init__(self, heads=4, table=False):
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.inp, self.out = heads, nn.Linear(6, 32), nn.Linear(32, 3)
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.bias = nn.Parameter(torch.randn(heads, 5, 5)) if table else None

    def forward(self, x):
        x = self.inp(x)
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * (c // self.heads) ** -0.5
        scores = scores if self.bias is None else scores + self.bias
        y = scores.softmax(-1) @ v
        return self.out(x + self.proj(y.transpose(1, 2).reshape(b, n, c)))


def test_head_features_go_in_equal_numbers_chosen_per_head():
    net, x = Attention(), torch.randn(2, 5, 6)
    plan = propose(net, x, ratio=0.5)
    keep = next(e.keep for e in plan.edits if e.space == "qkv#2")
    per_head = np.array(keep).reshape(4, 4)
    assert (per_head // 8 == np.arange(4)[:, None]).all()
    assert len({tuple(row % 8) for row in per_head}) > 1
    small = fxsvd.compile(net, x, passes=[Prune(0.5)])
    assert small.qkv.weight.shape == (48, 16)


def test_whole_heads():
    net, x = Attention(table=True), torch.randn(2, 5, 6)
    small = fxsvd.compile(net, x, passes=[Prune(0.5, heads=True)])
    assert small.bias.shape == (2, 5, 5)
    assert small.qkv.weight.shape == (48, 16)
    assert "5, 3, 2, 8)" in small.code


def test_rows_of_equal_length_across_a_cat():
    class Cat(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 4, 1)
            self.norm, self.out = nn.GroupNorm(3, 12), nn.Conv2d(12, 2, 1)

        def forward(self, x):
            return self.out(self.norm(torch.cat([self.a(x), self.b(x)], 1)))

    assert widths(propose(Cat(), ratio=0.5)) == {"a": 4, "b": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.0}, "in [0, 1)"),
        ({"ratio": -0.1}, "in [0, 1)"),
        ({"ratio": {"a": 2}}, "in [0, 1)"),
        ({"criterion": "best"}, "unknown criterion 'best'"),
        ({"scope": "everywhere"}, "scope is"),
        ({"round_to": 0}, "round_to"),
        ({"criterion": "taylor"}, "needs loss"),
        ({"ignore": ("stemm",)}, "did you mean 'stem'"),
        ({"only": (nn.Linear(2, 2),)}, "no part of the network"),
    ],
)
def test_bad_options_say_what_is_wrong(options, message):
    with pytest.raises(PlanError) as error:
        propose(**options)
    assert message in str(error.value)
