"""Plans as data: what a pass proposes, before anything is touched."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from fxsvd.errors import PlanError


@dataclass(frozen=True)
class Remap:
    """A space keeps some of its channels, bit-identical, in their order.

    Attributes:
        space: the space's name.
        width: how many channels it has.
        keep: which of them stay, ascending.
    """

    space: str
    width: int
    keep: tuple[int, ...]

    def __str__(self) -> str:
        """``layer1.0.conv1: 64 -> 32``."""
        return f"{self.space}: {self.width} -> {len(self.keep)}"


@dataclass(frozen=True)
class Shift:
    """A bias takes over what a constant channel contributed before it went.

    Attributes:
        parameter: the bias's name.
        values: what is added, in the original width.
    """

    parameter: str
    values: tuple[float, ...]

    def __str__(self) -> str:
        """``fc.bias: takes over constant channels``."""
        return f"{self.parameter}: takes over constant channels"


@dataclass(frozen=True)
class Skip:
    """A space that stays as it is, and why."""

    space: str
    width: int
    why: str

    def __str__(self) -> str:
        """``fc: 1000 stays (it is the network's output)``."""
        return f"{self.space}: {self.width} stays ({self.why})"


@dataclass(frozen=True)
class Plan:
    """What to do to a network, as data: printable, comparable, JSON-able.

    Attributes:
        edits: spaces and the channels they keep.
        skips: spaces that stay, with the reason.
        inputs: shapes and types of the example inputs, to capture the model again.
        then: a further plan for the result of this one.
        shifts: biases that take over the contribution of constant channels.

    >>> plan = Plan((Remap("conv1", 4, (0, 2)),))
    >>> print(plan)
    conv1: 4 -> 2
    >>> Plan.from_json(plan.to_json()) == plan
    True
    """

    edits: tuple[Remap, ...] = ()
    skips: tuple[Skip, ...] = ()
    inputs: Any = field(default=None, compare=False)
    then: Plan | None = None
    shifts: tuple[Shift, ...] = ()

    def __str__(self) -> str:
        """One line per edit and per skip."""
        lines = [str(item) for item in (*self.edits, *self.shifts, *self.skips)]
        return "\n".join([*lines, *([f"then:\n{self.then}"] if self.then else [])])

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that ``to_json`` wrote.

        Raises:
            PlanError: the text is no plan.
        """
        try:
            return _plan(json.loads(text))
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"this is no plan written by Plan.to_json ({error})") from error


def _plan(data: dict[str, Any]) -> Plan:
    return Plan(
        tuple(Remap(e["space"], e["width"], tuple(e["keep"])) for e in data["edits"]),
        tuple(Skip(**s) for s in data["skips"]),
        data["inputs"],
        _plan(data["then"]) if data["then"] else None,
        tuple(Shift(s["parameter"], tuple(s["values"])) for s in data["shifts"]),
    )


def chain(plans: Iterable[Plan]) -> Plan:
    """One plan that applies several, one after the other."""
    first, *rest = plans
    return replace(first, then=chain(rest) if rest else None)


def describe_inputs(value: Any) -> Any:
    """A JSON-able description of example inputs.

    >>> describe_inputs((torch.zeros(2, 3), 5))
    {'tuple': [{'tensor': [2, 3], 'dtype': 'float32'}, {'value': 5}]}
    """
    if isinstance(value, torch.Tensor):
        return {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, dict):
        return {"dict": {k: describe_inputs(v) for k, v in value.items()}}
    if isinstance(value, (tuple, list)):
        return {"tuple": [describe_inputs(v) for v in value]}
    return {"value": value}


def make_inputs(description: Any) -> Any:
    """Zeros that fit a description (nothing but shapes and types matters to a capture)."""
    if "tensor" in description:
        return torch.zeros(description["tensor"], dtype=getattr(torch, description["dtype"]))
    if "dict" in description:
        return {k: make_inputs(v) for k, v in description["dict"].items()}
    if "tuple" in description:
        return tuple(make_inputs(v) for v in description["tuple"])
    return description["value"]
