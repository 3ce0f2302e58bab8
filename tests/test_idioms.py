"""Every idiom gets the widths it must get, and computes what its silenced original does."""

from __future__ import annotations

import copy
import pickle
from functools import cache
from typing import Any

import pytest
import torch
from torch import fx, nn

import fxsvd
from fxsvd.naming import spaces_named
from fxsvd.passes import Prune
from tests.helpers.nets import IDIOMS, call, leaves, randomized, to_double
from tests.helpers.nets.base import Width

# Beside each other these cover convolutions, attention, recurrence, sharing and Hugging Face.
EXPORTED = (
    "residual_network",
    "packed_qkv_as_in_timm",
    "shufflenet_v2_block",
    "window_attention_with_relative_position_bias",
    "swiglu",
    "hugging_face_bert",
)


@pytest.fixture(params=IDIOMS)
def name(request: pytest.FixtureRequest) -> Any:
    return request.param


def compiled(name: str) -> tuple[nn.Module, fx.GraphModule]:
    """The original and a copy of its narrowed self."""
    original, small = _compiled(name)
    return original, copy.deepcopy(small)


@cache
def _compiled(name: str) -> tuple[nn.Module, fx.GraphModule]:
    idiom = IDIOMS[name]
    torch.manual_seed(0)
    original = randomized(idiom.build()).eval()
    before = copy.deepcopy(original.state_dict())
    small = fxsvd.compile(original, idiom.inputs(2), passes=[Prune(0.5, **idiom.prune)])
    assert_same(original.state_dict(), before)
    return original, small


def assert_same(state: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> None:
    assert state.keys() == before.keys()
    assert all(torch.equal(state[key], before[key]) for key in state)


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-9) -> None:
    ours, theirs = leaves(actual), leaves(expected)
    assert [t.shape for t in ours] == [t.shape for t in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


def agrees(width: Width, expected: Width) -> bool:
    """Whether a space has the expected widths, or stays for the expected reason."""
    if isinstance(width[1], str) and isinstance(expected[1], str):
        return width[0] == expected[0] and expected[1] in width[1]
    return width == expected


def test_widths(name: str) -> None:
    _, small = compiled(name)
    widths: dict[str, Width] = {
        row.name: (row.before, row.after if row.after < row.before else row.why)
        for row in small.report.spaces
    }
    expected = IDIOMS[name].widths
    assert widths.keys() == expected.keys()
    wrong = {k: (widths[k], expected[k]) for k in widths if not agrees(widths[k], expected[k])}
    assert not wrong


def test_the_name_of_a_space_means_that_one_alone(name: str) -> None:
    whole = fxsvd.analyze(_compiled(name)[1])
    for deps in (whole, whole.growing):
        for i, space in enumerate(deps.spaces):
            assert spaces_named(deps, space.name) == {i}


def test_equals_silenced_original(name: str) -> None:
    """Against the original class with zeros in its weights, at another batch size, in float64."""
    if not IDIOMS[name].masked:
        return  # statistics in the network's own code count silent channels; verify covers these
    original, small = compiled(name)
    inputs = to_double(IDIOMS[name].inputs(3))
    masked = fxsvd.mask(original, small.report.plan).double()
    with torch.no_grad():
        expected = call(masked, inputs)
        full = call(copy.deepcopy(original).double(), inputs)
        assert_close(call(small.double(), inputs), expected)
    narrowed = any(row.after < row.before for row in small.report.spaces)
    differs = any(
        not torch.equal(a, b) for a, b in zip(leaves(full), leaves(expected), strict=True)
    )
    assert differs == narrowed


def test_runs_at_another_batch_size(name: str) -> None:
    """Samples do not see each other: a part of a batch gives a part of the result."""
    _, small = compiled(name)
    inputs = to_double(IDIOMS[name].inputs(5))
    with torch.no_grad():
        whole = call(small.double(), inputs)
        part = call(small, first(inputs, 2))
    assert_close(part, first(tuple(leaves(whole)), 2))


def first(value: Any, count: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value[:count]
    if isinstance(value, dict):
        return {k: first(v, count) for k, v in value.items()}
    return tuple(first(v, count) for v in value)


def test_trains(name: str) -> None:
    """One step on every parameter that has an influence; the loss goes down."""
    _, small = compiled(name)
    inputs = IDIOMS[name].inputs(4)
    small.train()
    optimizer = torch.optim.SGD(small.parameters(), lr=1e-4)
    torch.manual_seed(1)
    loss = squares(call(small, inputs))
    loss.backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in small.parameters())
    optimizer.step()
    torch.manual_seed(1)
    with torch.no_grad():
        assert squares(call(small, inputs)) < loss


def squares(outputs: Any) -> torch.Tensor:
    return sum((t.square().mean() for t in leaves(outputs)), torch.zeros(()))


def test_copies_and_pickles(name: str) -> None:
    _, small = compiled(name)
    inputs = IDIOMS[name].inputs(2)
    with torch.no_grad():
        expected = call(small, inputs)
        for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
            assert twin.state_dict().keys() == small.state_dict().keys()
            assert_close(call(twin, inputs), expected, 0)


@pytest.mark.parametrize("name", EXPORTED)
def test_exports(name: str) -> None:
    _, small = compiled(name)
    inputs = IDIOMS[name].inputs(2)
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    program = torch.export.export(small, args, kwargs, strict=False)
    with torch.no_grad():
        assert_close(program.module()(*args, **kwargs), call(small, inputs), 1e-6)


@pytest.mark.parametrize("name", EXPORTED)
def test_compiles(name: str) -> None:
    _, small = compiled(name)
    torch.compiler.reset()
    inputs = IDIOMS[name].inputs(2)
    with torch.no_grad():
        assert_close(call(torch.compile(small, backend="eager"), inputs), call(small, inputs), 1e-6)


HEADS = [n for n, i in IDIOMS.items() if i.build.__module__.endswith("nets.attention")]
GROUPS = ["grouped_convolution", "resnext_block", "group_norm_per_channel_pair", "gru_both_ways"]


@pytest.mark.parametrize("name", [*HEADS, *GROUPS])
def test_whole_heads(name: str) -> None:
    """Verified, and never more than asked for; what is no head is narrowed as always."""
    original, _ = compiled(name)
    heads = fxsvd.compile(original, IDIOMS[name].inputs(2), passes=[Prune(0.5, heads=True)])
    widths = {row.name: (row.before, row.after) for row in heads.report.spaces}
    expected = {k: (w, w if isinstance(a, str) else a) for k, (w, a) in IDIOMS[name].widths.items()}
    assert widths.keys() == expected.keys()
    assert all(widths[k][1] >= expected[k][1] for k in widths)
    inputs = IDIOMS[name].inputs(3)
    assert [t.shape for t in leaves(call(heads, inputs))] == [
        t.shape for t in leaves(call(original, inputs))
    ]


@pytest.mark.parametrize("name", ["attention_by_hand", "attention_fused", "packed_qkv_as_in_timm"])
def test_a_head_goes_with_all_its_features(name: str) -> None:
    original, _ = compiled(name)
    small = fxsvd.compile(original, IDIOMS[name].inputs(2), passes=[Prune(0.5, heads=True)])
    kept = [edit.keep for edit in small.report.plan.edits if edit.space != "a"]
    assert kept in ([(0, 1, 2, 3)] * 2, [(4, 5, 6, 7)] * 2)


def test_narrowing_twice() -> None:
    """The result of a compilation is a network like any other."""
    original, small = compiled("residual_network")
    twice = fxsvd.compile(small, IDIOMS["residual_network"].inputs(2), passes=[Prune(0.5)])
    widths = {row.name: (row.before, row.after) for row in twice.report.spaces}
    assert widths == {"a.0": (4, 2), "b.0": (3, 1), "d": (6, 3), "e.0": (5, 2), "head.2": (3, 3)}
    assert twice.report.after.parameters < small.report.after.parameters
    assert small.report.after.parameters < sum(p.numel() for p in original.parameters())


def test_two_passes_in_one_plan() -> None:
    idiom = IDIOMS["linear_chain"]
    original = randomized(idiom.build())
    passes = [Prune(0.5, only=("a",)), Prune({"b": 0.25})]
    small = fxsvd.compile(original, idiom.inputs(2), passes=passes)
    assert small.get_submodule("a").out_features == 4
    assert small.get_submodule("b").out_features == 9
    inputs = idiom.inputs(3)
    with torch.no_grad():
        assert_close(fxsvd.apply(original, small.report.plan)(inputs), small(inputs), 0)
