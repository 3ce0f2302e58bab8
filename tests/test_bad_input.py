"""Bad input is a clear error or a plan with reasons, and the user's model stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxsvd
from fxsvd import CaptureError, FxsvdError, Plan, PlanError, Remap, VerificationError
from fxsvd.passes import Prune
from tests.helpers.nets.base import Net, randomized

HALF = [Prune(0.5)]


def model() -> nn.Module:
    """With all that a careless compiler could change: modes, hooks, gradients, buffers, lists."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 1),
        nn.Flatten(),
        nn.Linear(24, 4),
    )
    randomized(net)
    net.train()
    net[1].eval()
    net[3].weight.requires_grad_(False)
    net[0].register_forward_hook(lambda module, args, out: out)
    net[5](torch.randn(2, 24)).sum().backward()
    net.notes = ["kept"]  # type: ignore[assignment]
    return net


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 4, 4)


@contextmanager
def unchanged(net: nn.Module) -> Iterator[None]:
    before = snapshot(net)
    try:
        yield
    finally:
        after = snapshot(net)
        assert after.keys() == before.keys()
        for key, value in before.items():
            same = torch.equal if isinstance(value, Tensor) else lambda a, b: a == b
            assert same(value, after[key]), key


def snapshot(net: nn.Module) -> dict[str, Any]:
    """All that can be seen of a model; tensors by value and by identity."""
    out: dict[str, Any] = {}
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        out[name] = tensor.detach().clone()
        out[f"{name} itself"] = (id(tensor), tensor._version, tensor.requires_grad)
        out[f"{name} gradient"] = None if tensor.grad is None else tensor.grad.tolist()
    for path, module in net.named_modules():
        out[f"{path} mode"] = module.training
        out[f"{path} attributes"] = sorted(vars(module))
        out[f"{path} hooks"] = list(module._forward_hooks.items())
        out[f"{path} forward"] = module.forward.__func__  # type: ignore[attr-defined]
    out["notes"] = list(getattr(net, "notes", []))
    return out


# ---------------------------------------------------------------- wrong inputs


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.randn(2, 5, 4, 4), r"in 0 \(Conv2d\).*Do the example inputs fit the model\?"),
        (torch.randn(2, 3, 9, 9), r"in 5 \(Linear\).*Do the example inputs fit the model\?"),
        ((), r"the example inputs do not fit Sequential\.forward: missing"),
        ((images(), images()), r"the example inputs do not fit Sequential\.forward: too many"),
        ({"y": images()}, r"the example inputs do not fit Sequential\.forward: missing"),
        ("image.png", r"the model raised"),
        (object(), r"the input input holds a object: give tensors, numbers"),
        (None, r"the model raised"),
    ],
)
def test_wrong_example_inputs(inputs: Any, message: str) -> None:
    net = model()
    with unchanged(net), pytest.raises(CaptureError, match=message):
        fxsvd.compile(net, inputs, passes=HALF)


def test_a_model_that_cannot_be_captured() -> None:
    """The error names the module, the line, and what to do."""

    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if x.sum() > 0 else x

    net = nn.Sequential(nn.Linear(4, 4), Picky())
    message = r"in 1 \(Picky\) at .*test_bad_input\.py:\d+: the code depends on the values"
    with unchanged(net), pytest.raises(CaptureError, match=message):
        fxsvd.compile(net, torch.randn(2, 4), passes=HALF)


@pytest.mark.skipif(
    not torch.backends.cuda.is_built(),
    reason="a CPU-only torch makes no cuda tensors, not even fakes",
)
def test_model_and_inputs_on_different_devices() -> None:
    """A GPU that needs no GPU: fake parameters say that they are on one."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        net = nn.Linear(4, 4, device="cuda")
    with pytest.raises(CaptureError, match="are on cpu and the model is on cuda:0: move one"):
        fxsvd.compile(net, torch.randn(2, 4), passes=HALF)


# ---------------------------------------------------------------- wrong options


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan"), {"0": 2.0}])
def test_ratio_out_of_range(ratio: Any) -> None:
    with pytest.raises(PlanError, match=r"ratio is the fraction removed, in \[0, 1\); got"):
        Prune(ratio)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "l3"}, "unknown criterion 'l3'; there are"),
        ({"scope": "everywhere"}, "scope is 'local' or 'global', not 'everywhere'"),
        ({"round_to": 0}, "round_to is a positive number of channels; got 0"),
    ],
)
def test_unknown_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Prune(0.5, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"ignore": ["stem.con1"]},
            r"no layer or space is called 'stem\.con1'; did you mean 'stem\.conv1",
        ),
        ({"passes": [Prune(0.5, only=("haed",))]}, r"called 'haed'; did you mean 'head'"),
        ({"passes": [Prune({"stm.*": 0.5})]}, r"no layer or space is called 'stm\.\*'"),
        ({"ignore": [nn.Linear(2, 2)]}, "this Linear is no part of the network"),
        (
            {"passes": []},
            r"passes is empty: say what to do, such as passes=\[Prune\(ratio=0\.5\)\]",
        ),
        ({"passes": [Prune(0.5, criterion="taylor")]}, "criterion='taylor' needs loss="),
    ],
)
def test_names_and_passes(options: dict[str, Any], message: str) -> None:
    stem = nn.Sequential()
    stem.add_module("conv1", nn.Linear(4, 8))
    net = nn.Sequential()
    net.add_module("stem", stem)
    net.add_module("head", nn.Linear(8, 2))
    with unchanged(net), pytest.raises(PlanError, match=message):
        fxsvd.compile(net, torch.randn(2, 4), **{"passes": HALF, **options})


# ---------------------------------------------------------------- networks that give little


def test_a_layer_nobody_knows_freezes_what_it_touches() -> None:
    """nn.Bilinear has no row: its neighbours stay, with the reason; the rest is narrowed."""

    def run(m: Net, x: Tensor) -> Tensor:
        return m.out(m.b(m.mix(m.a(x), m.a(x))).relu())

    net = randomized(
        Net(
            run, a=nn.Linear(4, 8), mix=nn.Bilinear(8, 8, 6), b=nn.Linear(6, 8), out=nn.Linear(8, 2)
        )
    )
    with unchanged(net):
        small = fxsvd.compile(net, torch.randn(2, 4), passes=HALF)
    rows = {row.name: (row.before, row.after, row.why) for row in small.report.spaces}
    reason = "Bilinear has no row in the layer table (see fxsvd.register_layer)"
    assert rows["a"][:2] == (8, 8)
    assert reason in rows["a"][2]
    assert rows["b"] == (8, 4, "")
    assert small.report.notes == (f"no rule: {reason}",)


def test_a_function_nobody_knows_freezes_what_it_touches() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        return m.out(m.b(torch.fft.fft(m.a(x), dim=1).abs()).relu())

    net = randomized(Net(run, a=nn.Linear(4, 8), b=nn.Linear(8, 6), out=nn.Linear(6, 2)))
    small = fxsvd.compile(net, torch.randn(2, 4), passes=HALF)
    rows = {row.name: (row.before, row.after, row.why) for row in small.report.spaces}
    assert rows["a"][:2] == (8, 8)
    assert "fft has no rule" in rows["a"][2]
    assert rows["b"][:2] == (6, 3)


@pytest.mark.parametrize("criterion", ["l1", "l2", "bn"])
def test_weights_that_are_no_numbers(criterion: str) -> None:
    net = model()
    with torch.no_grad():
        net[3].weight[0, 0] = float("nan")
    message = r"3\.weight holds numbers that are not finite"
    with pytest.raises(PlanError, match=message):
        fxsvd.compile(net, images(), passes=[Prune(0.5, criterion=criterion)])
    assert int(net[3].weight.isnan().sum()) == 1


def test_a_network_that_computes_no_number_is_not_called_verified() -> None:
    net = model()
    with torch.no_grad():
        net[5].bias.fill_(float("nan"))
    message = "computes no finite number, so nothing can be compared"
    with pytest.raises(VerificationError, match=message):
        fxsvd.compile(net, images(), passes=[Prune(0.5, criterion="random")])


def test_everything_frozen() -> None:
    """One layer: its outputs are the network's. The result is the same network, and says why."""
    net = randomized(nn.Sequential(nn.Linear(4, 8), nn.ReLU()))
    with unchanged(net):
        small = fxsvd.compile(net, torch.randn(2, 4), passes=HALF)
    assert small.report.plan.edits == ()
    assert [str(skip) for skip in small.report.plan.skips] == [
        "0: 8 stays (it is the network's output)"
    ]
    assert "not narrowed:\n  0 (8): it is the network's output" in str(small.report)
    x = torch.randn(3, 4)
    assert torch.equal(small(x), net(x))
    assert small.get_parameter("0.weight") is not net[0].weight


def test_nothing_asked_for() -> None:
    net = model()
    with unchanged(net):
        small = fxsvd.compile(net, images(), passes=[Prune(0.0)])
    assert {row.why for row in small.report.spaces} == {"ratio is 0", "it is the network's output"}
    assert small.report.after == small.report.before


# ---------------------------------------------------------------- wrong plans


def test_the_empty_plan_changes_nothing() -> None:
    net = randomized(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    x = torch.randn(3, 4)
    copied = fxsvd.apply(fxsvd.capture(net, x), Plan())
    assert torch.equal(copied(x), net(x))
    with pytest.raises(PlanError, match="does not say what inputs the model takes"):
        fxsvd.apply(net, Plan())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Remap("1", 8, (0,)), "the network has no space '1'; near names"),
        (Remap("0", 9, (0, 1)), "sees 9 channels in '0', the network 8: it was made for another"),
        (Remap("0", 8, (0, 8)), "it was made for another network"),
        (Remap("0", 8, ()), "the plan leaves '0' without a channel"),
        (Remap("2", 2, (0,)), "'2' cannot be narrowed: it is the network's output"),
    ],
)
def test_a_plan_for_another_network(edit: Remap, message: str) -> None:
    net = randomized(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    with unchanged(net), pytest.raises(PlanError, match=message):
        fxsvd.apply(fxsvd.capture(net, torch.randn(2, 4)), Plan((edit,)))


def test_a_plan_that_leaves_rows_of_unequal_length() -> None:
    """Heads have to keep equally many features, whoever wrote the plan."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x).view(-1, 2, 4)
        return m.out(y.softmax(1).flatten(1))

    net = randomized(Net(run, a=nn.Linear(4, 8), out=nn.Linear(8, 2)))
    graph = fxsvd.capture(net, torch.randn(2, 4))
    edit = Remap("a", 8, tuple(range(7)))
    with unchanged(net), pytest.raises(PlanError, match="unequal numbers of channels"):
        fxsvd.apply(graph, Plan((edit,)))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"edits": 1}', "no plan"])
def test_text_that_is_no_plan(text: str) -> None:
    with pytest.raises(PlanError, match=r"this is no plan written by Plan\.to_json"):
        Plan.from_json(text)


def test_verify_needs_a_result_of_compile() -> None:
    net = nn.Linear(4, 2)
    with pytest.raises(PlanError, match="verify needs a network that compile returned"):
        fxsvd.verify(net, net, torch.randn(2, 4))


# ---------------------------------------------------------------- raising half-way


@dataclass(frozen=True)
class Fails:
    """A pass that raises after the first stage has been applied."""

    def propose(self, deps: Any, data: Any = None, say: Any = None) -> Plan:
        raise RuntimeError("no plan today")


@dataclass(frozen=True)
class Wrong:
    """A pass whose plan is fit for another network."""

    def propose(self, deps: Any, data: Any = None, say: Any = None) -> Plan:
        return Plan((Remap("elsewhere", 8, (0,)),))


def hook_fails(net: nn.Module) -> None:
    def fail(module: nn.Module, args: Any) -> None:
        raise RuntimeError("no hook today")

    net[3].register_forward_pre_hook(fail)


@pytest.mark.parametrize(
    ("passes", "prepare", "error"),
    [
        ([Prune(0.5), Fails()], None, RuntimeError),
        ([Prune(0.5), Wrong()], None, PlanError),
        ([Prune(0.5)], hook_fails, CaptureError),
    ],
)
def test_half_way(
    passes: list[Any], prepare: Callable[[nn.Module], None] | None, error: type[Exception]
) -> None:
    net = model()
    if prepare:
        prepare(net)
    with unchanged(net), pytest.raises(error):
        fxsvd.compile(net, images(), passes=passes)


@pytest.mark.parametrize("stage", ["analyze", "rewrite", "verify_rewrite", "measure"])
def test_half_way_in_any_stage(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever raises, and wherever: the model stays as it was."""
    from fxsvd import compile as pipeline  # the function

    module = __import__("sys").modules[pipeline.__module__]
    owner = {"verify_rewrite": module.validation, "measure": module.cost}.get(stage, module)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise FxsvdError(f"no {stage} today")

    monkeypatch.setattr(owner, stage, fail)
    net = model()
    with unchanged(net), pytest.raises(FxsvdError, match=f"no {stage} today"):
        fxsvd.compile(net, images(), passes=HALF)


def test_success_leaves_the_model_too() -> None:
    net = model()
    with unchanged(net):
        small = fxsvd.compile(net, images(), passes=HALF)
    assert small.report.error == pytest.approx(0, abs=1e-8)
    assert small(images(3)).shape == (3, 4)
