"""Select through the whole pipeline: better than pruning, exact where it can be, verified."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxsvd
from fxsvd.data.moments import Moment
from fxsvd.edits import Plan
from fxsvd.errors import FxsvdError, PlanError
from fxsvd.passes import Prune, Select
from fxsvd.passes.select import CHAININGS

METHODS = ("backward", "forward", "lasso")


class Net(nn.Module):
    """Modules by name, and a function that runs them."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def mlp() -> nn.Module:
    layers = (nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
    return nn.Sequential(*layers)


def convolutions() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.norm(m.a(x)))
        return m.fc(F.max_pool2d(F.relu(m.second(m.b(x))), 2).flatten(1))

    first = {"a": nn.Conv2d(3, 12, 3, padding=1, bias=False), "norm": nn.BatchNorm2d(12)}
    second = {"b": nn.Conv2d(12, 8, 3, bias=False), "second": nn.BatchNorm2d(8)}
    return Net(run, {**first, **second, "fc": nn.Linear(32, 5)})


def residual() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        x = F.relu(x + m.b(F.relu(m.norm(m.a(x)))))
        x = F.relu(x + m.d(F.relu(m.c(x))))
        return m.fc(x.mean((2, 3)))

    ends = {"stem": nn.Conv2d(3, 12, 3), "fc": nn.Linear(12, 5)}
    first = {"a": nn.Conv2d(12, 16, 1), "norm": nn.BatchNorm2d(16), "b": nn.Conv2d(16, 12, 1)}
    return Net(run, {**ends, **first, "c": nn.Conv2d(12, 16, 1), "d": nn.Conv2d(16, 12, 1)})


def joined() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.out(F.relu(m.mix(torch.cat([m.a(x), m.b(x)], 1)))).mean((2, 3))

    two = {"a": nn.Conv2d(3, 8, 3), "b": nn.Conv2d(3, 6, 3)}
    return Net(run, {**two, "mix": nn.Conv2d(14, 8, 1), "out": nn.Conv2d(8, 3, 1)})


def inverted() -> nn.Module:
    """A space that a depthwise convolution follows, and squeeze-and-excite reads."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu6(m.deep(F.relu6(m.expand(x))))
        x = x * m.back(F.relu(m.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid()
        return m.fc(m.project(x).mean((2, 3)))

    deep = {"expand": nn.Conv2d(3, 12, 1), "deep": nn.Conv2d(12, 12, 3, groups=12)}
    gate = {"squeeze": nn.Conv2d(12, 8, 1), "back": nn.Conv2d(8, 12, 1)}
    return Net(run, {**deep, **gate, "project": nn.Conv2d(12, 6, 1), "fc": nn.Linear(6, 3)})


def grouped() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.c(F.relu(m.b(F.relu(m.a(x))))).mean((2, 3))

    middle = {"b": nn.Conv2d(12, 8, 3, groups=2)}
    return Net(run, {"a": nn.Conv2d(3, 12, 3), **middle, "c": nn.Conv2d(8, 4, 1)})


def gated() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        return x + m.down(F.silu(m.gate(x)) * m.up(x))

    return Net(run, {"gate": nn.Linear(8, 20), "up": nn.Linear(8, 20), "down": nn.Linear(20, 8)})


def attention(packed: bool) -> nn.Module:
    """Pre-norm attention with heads, and an MLP."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.first(x)
        if packed:
            q, k, v = m.qkv(y).unflatten(2, (3, 2, 6)).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = (f(y).unflatten(2, (2, 6)).transpose(1, 2) for f in (m.q, m.k, m.v))
        x = x + m.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return m.fc((x + m.down(F.gelu(m.up(m.second(x))))).mean(1))

    names = ("qkv",) if packed else ("q", "k", "v")
    project: dict[str, nn.Module] = {n: nn.Linear(12, 36 // len(names)) for n in names}
    norms = {"first": nn.LayerNorm(12), "second": nn.LayerNorm(12), "fc": nn.Linear(12, 4)}
    rest = {"proj": nn.Linear(12, 12), "up": nn.Linear(12, 24), "down": nn.Linear(24, 12)}
    return Net(run, {**norms, **project, **rest})


def transformer() -> nn.Module:
    return attention(packed=False)


def packed() -> nn.Module:
    return attention(packed=True)


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (8,)),
    "convolutions": (convolutions, (3, 6, 6)),
    "residual": (residual, (3, 5, 5)),
    "joined": (joined, (3, 5, 5)),
    "inverted": (inverted, (3, 5, 5)),
    "grouped": (grouped, (3, 7, 7)),
    "gated": (gated, (5, 8)),
    "transformer": (transformer, (5, 12)),
    "packed": (packed, (5, 12)),
}


def made(name: str) -> tuple[nn.Module, list[Tensor]]:
    """A network in float64 whose batch norms have seen data, and correlated batches."""
    torch.manual_seed(0)
    make, shape = NETS[name]
    net, mix = make().double(), torch.randn(shape[-1], shape[-1], dtype=torch.float64)
    noise = torch.randn(3, 100, *shape, dtype=torch.float64)
    data = list(noise + noise @ mix + 0.5)
    with torch.no_grad():
        for batch in data:
            net(batch)
    return net.eval(), data


def compiled(net: nn.Module, data: list[Tensor], options: Any) -> Any:
    return fxsvd.compile(net, data[0][:4], passes=[options], data=data, progress=False)


def widths(plan: Plan) -> dict[str, int]:
    return {e.space: len(e.keep) for e in plan.edits}


# ---------------------------------------------------------------- every chaining and method


@pytest.mark.parametrize("chaining", CHAININGS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["mlp", "convolutions", "residual"])
def test_better_than_pruning_to_the_same_widths(name: str, method: Any, chaining: Any) -> None:
    net, data = made(name)
    pruned = compiled(net, data, Prune(0.5))
    small = compiled(
        net, data, Select(ratio=0.5, method=method, chaining=chaining, positions="all")
    )
    assert widths(small.report.plan) == widths(pruned.report.plan)
    assert small.report.before.parameters > small.report.after.parameters
    assert small.report.change < 0.5 * pruned.report.change


@pytest.mark.parametrize("name", NETS)
def test_every_kind_of_network_is_selected_from(name: str) -> None:
    net, data = made(name)
    before = copy.deepcopy(net.state_dict())
    pruned, small = (compiled(net, data, p) for p in (Prune(0.5), Select(ratio=0.5)))
    assert widths(small.report.plan) == {
        s: w for s, w in widths(pruned.report.plan).items() if s in widths(small.report.plan)
    }
    assert small.report.error is not None  # verified
    assert small.report.change < pruned.report.change
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert not net.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    out = small(torch.cat(data))
    assert out.shape == net(torch.cat(data)).shape


EXPECTED = {
    "joined": {"a": 4, "b": 3, "mix": 4},
    "inverted": {"expand": 6, "squeeze": 4, "project": 3},
    "grouped": {"a": 6, "b": 4},
    "gated": {"gate": 10},
    "transformer": {"v": 6, "up": 12},
    "packed": {"up": 12},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_these_spaces_lose_half(name: str) -> None:
    net, data = made(name)
    plan = fxsvd.plan(net, data[0][:4], passes=[Select(ratio=0.5)], data=data)
    left = widths(plan)
    assert EXPECTED[name].items() <= left.items()


def test_what_no_layer_reads_stays_with_a_reason() -> None:
    net, data = made("transformer")
    plan = fxsvd.plan(net, data[0][:4], passes=[Select(ratio=0.5)], data=data)
    why = {s.space: s.why for s in plan.skips}
    assert why["q"] == "no layer that could be refitted reads it"
    assert widths(plan).keys() & why.keys() == set()


# ---------------------------------------------------------------- exact where it can be


def repeated(net: nn.Module, data: list[Tensor], layers: tuple[str, ...]) -> nn.Module:
    """Every second output of these layers repeats the one before it."""
    with torch.no_grad():
        for name in layers:
            for t in net.get_submodule(name).state_dict().values():
                if t.dim():
                    t[1::2] = t[::2]
    return net


@pytest.mark.parametrize("chaining", CHAININGS)
@pytest.mark.parametrize("method", ["backward", "forward"])  # the lasso shares among equals
@pytest.mark.parametrize(
    ("name", "layers"),
    [("mlp", ("0", "2")), ("convolutions", ("a", "norm", "b", "second")), ("grouped", ("a",))],
)
def test_channels_that_repeat_others_are_dropped_without_loss(
    name: str, layers: tuple[str, ...], method: Any, chaining: Any
) -> None:
    net, data = made(name)
    net = repeated(net, data, layers)
    spaces = tuple(n for n in layers if not isinstance(net.get_submodule(n), nn.BatchNorm2d))
    select = Select(ratio=0.5, method=method, chaining=chaining, only=spaces, positions="all")
    small = compiled(net, data, select)
    for edit in small.report.plan.edits:
        assert sorted(k // 2 for k in edit.keep) == list(range(edit.width // 2))
    assert small.report.change < 1e-7
    assert all(s.predicted < 1e-7 for s in small.report.sites)
    assert all(s.measured < 1e-7 for s in small.report.sites)


@pytest.mark.parametrize("chaining", CHAININGS)
@pytest.mark.parametrize("method", ["backward", "forward"])  # the lasso prefers large ones
def test_channels_that_do_nothing_are_dropped_without_loss(method: Any, chaining: Any) -> None:
    net, data = made("mlp")
    with torch.no_grad():
        net.get_submodule("2").weight[:, 1::2] = 0
        net.get_submodule("4").weight[:, ::2] = 0
    small = compiled(net, data, Select(ratio=0.5, method=method, chaining=chaining))
    kept = {e.space: e.keep for e in small.report.plan.edits}
    assert kept == {"0": tuple(range(0, 16, 2)), "2": tuple(range(1, 12, 2))}
    assert small.report.change < 1e-20


# ---------------------------------------------------------------- estimates


@pytest.mark.parametrize("name", ["mlp", "convolutions", "joined", "grouped", "gated"])
def test_predicted_is_measured_for_all_layers_fitted_top_down(name: str) -> None:
    net, data = made(name)
    select = Select(ratio=0.5, chaining="top-down", positions="all", everywhere=False)
    small = compiled(net, data, select)
    narrowed = {s.name: s.producers for s in small.report.spaces if s.after < s.before}
    whole = [s for s in small.report.sites if not any(s.layer in p for p in narrowed.values())]
    assert whole
    for site in whole:  # of the others, only the outputs that stay are measured
        assert site.measured == pytest.approx(site.predicted, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("name", ["mlp", "convolutions"])
def test_refitting_everywhere_is_no_worse_than_in_parallel(name: str) -> None:
    net, data = made(name)
    errors = {
        chaining: compiled(net, data, Select(ratio=0.5, chaining=chaining, positions="all"))
        for chaining in ("parallel", "top-down")
    }
    last = {c: s.report.sites[-1].measured for c, s in errors.items()}
    assert last["top-down"] < last["parallel"]


def test_debiasing_helps() -> None:
    net, data = made("mlp")
    plain, refitted = (
        compiled(net, data, Select(ratio=0.5, debias=d, chaining="parallel")) for d in (False, True)
    )
    assert widths(plain.report.plan) == widths(refitted.report.plan)
    assert refitted.report.change < plain.report.change


# ---------------------------------------------------------------- plans


@pytest.mark.parametrize("name", ["convolutions", "residual"])
def test_a_plan_is_the_same_each_time_and_survives_json(name: str) -> None:
    net, data = made(name)
    select = Select(ratio=0.5, positions=4, seed=3)
    small = compiled(net, data, select)
    plan = fxsvd.plan(net, data[0][:4], passes=[select], data=data)
    assert plan == small.report.plan
    again = fxsvd.apply(net, Plan.from_json(plan.to_json()))
    x = torch.cat(data)
    assert torch.equal(again.eval()(x), small.eval()(x))
    other = fxsvd.plan(net, data[0][:4], passes=[Select(ratio=0.5, positions=4, seed=4)], data=data)
    assert other != plan


def test_widths_are_multiples_and_names_are_heeded() -> None:
    net, data = made("residual")
    left = widths(fxsvd.plan(net, data[0], passes=[Select(ratio=0.4, round_to=4)], data=data))
    assert left == {"stem": 8, "a": 12, "c": 12}
    select = Select(ratio={"a": 0.25, "stem": 0.5}, ignore=("d",))
    assert widths(fxsvd.plan(net, data[0], passes=[select], data=data)) == {"a": 12}


def test_two_stages_follow_one_another() -> None:
    net, data = made("mlp")
    passes = [Select(ratio=0.25), Select(ratio=0.5)]
    small = fxsvd.compile(net, data[0], passes=passes, data=data, progress=False)
    assert (small.get_submodule("0").out_features, small.get_submodule("2").out_features) == (6, 4)
    again = fxsvd.apply(net, Plan.from_json(small.report.plan.to_json()))
    assert torch.equal(again(data[0]), small(data[0]))


def test_the_result_can_be_trained() -> None:
    net, data = made("convolutions")
    small = compiled(net, data, Select(ratio=0.5)).train()
    small(data[0]).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())


# ---------------------------------------------------------------- bad input


def test_there_has_to_be_data() -> None:
    net, data = made("mlp")
    with pytest.raises(PlanError, match=r"give compile\(…, data=batches\)"):
        fxsvd.compile(net, data[0], passes=[Select(ratio=0.5)], progress=False)


@pytest.mark.parametrize("select", [Select(ratio=0.5), Select(ratio=0.5, chaining="parallel")])
def test_data_that_can_be_read_once_only_is_refused(select: Select) -> None:
    net, data = made("mlp")
    with pytest.raises(FxsvdError, match="give a list or a DataLoader"):
        fxsvd.compile(net, data[0], passes=[select], data=iter(data), progress=False)


@pytest.mark.parametrize("chaining", CHAININGS)
def test_data_that_is_not_finite_is_refused(chaining: Any) -> None:
    net, data = made("mlp")
    data[1][3] = torch.nan
    with pytest.raises(FxsvdError, match="2 sees numbers that are not finite in batch 1"):
        fxsvd.compile(
            net, data[0], passes=[Select(ratio=0.5, chaining=chaining)], data=data, progress=False
        )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("chaining", CHAININGS)
def test_too_few_samples_are_warned_of_and_still_give_a_network(chaining: Any) -> None:
    net, data = made("mlp")
    with pytest.warns(UserWarning, match="at least 16 samples"):
        small = compiled(net, [data[0][:5]], Select(ratio=0.5, chaining=chaining))
    assert small(data[0]).isfinite().all()


def wide_head() -> nn.Module:
    """A head of more inputs, and a layer of more outputs, than there are samples."""

    def run(m: Any, x: Tensor) -> Tensor:
        return m.fc(F.relu(m.head(F.relu(m.a(x)).flatten(1))))

    return Net(run, {"a": nn.Conv2d(3, 12, 3), "head": nn.Linear(192, 64), "fc": nn.Linear(64, 5)})


@pytest.mark.filterwarnings("ignore:.*fewer than the")
@pytest.mark.parametrize("chaining", CHAININGS)
@pytest.mark.parametrize(
    "options",
    [
        *({"method": method, "ratio": 0.4} for method in METHODS),
        *({"method": method, "error": 0.05} for method in METHODS),
        {"method": "lasso", "penalty": 0.3},
    ],
    ids=str,
)
def test_fewer_samples_than_inputs_give_what_their_moments_give(
    options: dict[str, Any], chaining: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net = wide_head().double().eval()
    data = list(torch.randn(3, 8, 3, 6, 6, dtype=torch.float64).cumsum(-1))
    select = Select(**options, chaining=chaining)
    plan = fxsvd.plan(net, data[0], passes=[select], data=data)
    monkeypatch.setattr(Moment, "root", None)
    expected = fxsvd.plan(net, data[0], passes=[select], data=data)
    assert plan.edits
    assert plan.edits == expected.edits
    for value, other in zip(plan.values, expected.values, strict=True):
        torch.testing.assert_close(value.value, other.value, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.5, "method": "best"}, "there is no 'best'"),
        ({"ratio": 0.5, "chaining": "sideways"}, "there is no 'sideways'"),
        ({"ratio": 1.0}, r"in \[0, 1\)"),
        ({"ratio": 0.5, "round_to": 0}, "round_to"),
    ],
)
def test_bad_options_say_what_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Select(**options)


def test_orders_of_batches_do_not_matter() -> None:
    net, data = made("mlp")
    plans = [
        fxsvd.plan(net, data[0], passes=[Select(ratio=0.5, chaining="parallel")], data=list(order))
        for order in itertools.islice(itertools.permutations(data), 3)
    ]
    assert len({p.edits for p in plans}) == 1
    for plan in plans[1:]:
        for a, b in zip(plan.values, plans[0].values, strict=True):
            torch.testing.assert_close(a.value, b.value, rtol=1e-9, atol=1e-9)
