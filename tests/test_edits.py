"""Plans as data: text and back, bit by bit."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fxsvd.edits import (
    Assign,
    Estimate,
    Part,
    Plan,
    Remap,
    Skip,
    Substitute,
    chain,
    describe_inputs,
    make_inputs,
)
from fxsvd.errors import PlanError


def part(**options: object) -> Part:
    return Part("Linear", {"in_features": 3, **options}, {"weight": torch.randn(2, 3)})


def full() -> Plan:
    torch.manual_seed(0)
    return Plan(
        edits=(Remap("a", 4, (0, 2)),),
        skips=(Skip("b", 7, "it is the network's output"),),
        inputs=describe_inputs((torch.zeros(2, 3), 5)),
        values=(Assign("a.bias", torch.randn(4, dtype=torch.float64), "refit"),),
        substitutes=(Substitute("fc", (part(), part(bias=False)), "factorized to rank 2"),),
        estimates=(Estimate("fc", "factorize", 0.1),),
        exact=True,
    )


def test_a_plan_and_its_further_stages_survive_json() -> None:
    plan = chain([full(), replace(full(), exact=False), Plan()])
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.inputs == plan.inputs
    assert again.then is not None
    assert again.then.then == Plan()
    assert again.to_json() == plan.to_json()


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([0.1, 1e-310, -0.0, math.pi], dtype=torch.float64),
        torch.tensor([[0.1], [-3.0]], dtype=torch.bfloat16),
        torch.tensor([0.1, 1e-42, -0.0]),
        torch.randn(3).half(),
        torch.randn(2, 3).T,
        torch.arange(4),
        torch.tensor([True, False]),
        torch.zeros(0, 3),
        torch.tensor(2.5),
    ],
    ids=lambda t: f"{t.dtype} {list(t.shape)}",
)
def test_tensors_survive_json_bit_by_bit(value: torch.Tensor) -> None:
    again = Plan.from_json(Plan(values=(Assign("a", value, ""),)).to_json()).values[0].value
    assert (again.dtype, again.shape) == (value.dtype, value.shape)
    raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (again, value)]
    assert torch.equal(*raw)


def test_assignments_are_equal_where_their_numbers_are() -> None:
    one, other = (Assign("a", torch.tensor([1.0, x]), "refit") for x in (2.0, 3.0))
    same = Assign("a", torch.tensor([1.0, 2.0]), "refit")
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert one != Assign("a", torch.tensor([1.0, 2.0]).double(), "refit")
    assert one != "a"


def test_parts_are_equal_where_options_and_tensors_are() -> None:
    torch.manual_seed(0)
    one = part()
    assert one == Part("Linear", {"in_features": 3}, {"weight": one.tensors["weight"].clone()})
    assert one != Part("Linear", {"in_features": 4}, one.tensors)
    assert one != Part("Linear", one.options, {"weight": one.tensors["weight"] + 1})
    assert hash(one) == hash(part())


def test_a_plan_reads_well() -> None:
    plan = chain([replace(full(), inputs=None), Plan((Remap("c", 3, (1,)),))])
    assert str(plan) == (
        "a: 4 -> 2\nfc: factorized to rank 2\na.bias: refit\n"
        "b: 7 stays (it is the network's output)\nthen:\nc: 3 -> 1"
    )


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "nonsense", '{"edits": [{"space": "a"}]}', '{"edits": 3, "skips": []}']
)
def test_other_text_is_no_plan(text: str) -> None:
    with pytest.raises(PlanError, match=r"no plan written by Plan\.to_json"):
        Plan.from_json(text)


def test_what_is_no_data_cannot_be_written() -> None:
    with pytest.raises(TypeError, match="cannot be part of a plan"):
        Plan(substitutes=(Substitute("fc", (part(norm=object()),), ""),)).to_json()


def test_inputs_are_made_of_their_description() -> None:
    given = {"x": torch.ones(2, 3), "rest": (torch.ones(4, dtype=torch.int64), None, True)}
    made = make_inputs(describe_inputs(given))
    assert made.keys() == given.keys()
    assert (made["x"].shape, made["x"].dtype) == ((2, 3), torch.float32)
    assert (made["rest"][0].shape, made["rest"][0].dtype) == ((4,), torch.int64)
    assert made["rest"][1:] == (None, True)
    assert not made["x"].any()
