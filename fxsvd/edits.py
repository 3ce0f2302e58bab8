"""Plans as data: what a pass proposes, before anything is touched."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fxsvd.errors import PlanError


@dataclass(frozen=True)
class Remap:
    """A space keeps some of its channels, bit-identical, in their order, or gets copies of some.

    Attributes:
        space: the space's name.
        width: how many channels it has.
        keep: which of them stay, ascending; one that is there twice gets a copy beside it.
    """

    space: str
    width: int
    keep: tuple[int, ...]

    def __str__(self) -> str:
        """``layer1.0.conv1: 64 -> 32``."""
        return f"{self.space}: {self.width} -> {len(self.keep)}"


@dataclass(frozen=True, eq=False)
class Assign:
    """A parameter gets new numbers: a refit, or a bias that takes over a constant channel.

    Attributes:
        parameter: its name; ``LAYER.bias`` of a linear layer or convolution without one adds it.
        value: the numbers, in the shape that the parameter has before anything is narrowed (or,
            where channels get copies, in the shape that it has afterwards).
        why: what they are.
        turned: whether they are in another basis, where no number is the old one's successor.
    """

    parameter: str
    value: Tensor
    why: str
    turned: bool = False

    def __str__(self) -> str:
        """``fc.bias: takes over constant channels``."""
        return f"{self.parameter}: {self.why}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Assign) and _same(vars(self), vars(other))

    def __hash__(self) -> int:
        return hash((self.parameter, self.why))


@dataclass(frozen=True, eq=False)
class Part:
    """A layer as data.

    Attributes:
        kind: its class in ``torch.nn``: ``Linear``, ``Conv1d``, ``Conv2d`` or ``Conv3d``.
        options: the arguments of its constructor.
        tensors: its parameters by name.
    """

    kind: str
    options: dict[str, Any]
    tensors: dict[str, Tensor]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Part) and _same(vars(self), vars(other))

    def __hash__(self) -> int:
        return hash((self.kind, *self.tensors))


@dataclass(frozen=True)
class Substitute:
    """A layer is replaced by others, one after the other; by none, it goes.

    Attributes:
        layer: its path.
        parts: what takes its place.
        why: what was done, in words.
    """

    layer: str
    parts: tuple[Part, ...]
    why: str

    def __str__(self) -> str:
        """``fc1: factorized to rank 24``."""
        return f"{self.layer}: {self.why}"


@dataclass(frozen=True)
class Estimate:
    """What an edit is expected to cost: the variance of a layer's output that it loses.

    Attributes:
        layer: the layer whose output it changes.
        edit: what is done: ``select``, ``rotate``, ``factorize``.
        error: E‖y − ŷ‖² / E‖y − E y‖² over the data that the edit was fitted to.
    """

    layer: str
    edit: str
    error: float


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
class Left:
    """A layer that stays as it is, and why."""

    layer: str
    why: str

    def __str__(self) -> str:
        """``fc: left (it is the network's last layer)``."""
        return f"{self.layer}: left ({self.why})"


@dataclass(frozen=True)
class Plan:
    """What to do to a network, as data: printable, comparable, JSON-able.

    Attributes:
        edits: spaces and the channels they keep.
        skips: spaces that stay, with the reason.
        inputs: shapes and types of the example inputs, to capture the model again.
        then: a further plan for the result of this one.
        values: parameters that get new numbers.
        substitutes: layers that are replaced.
        estimates: what the edits are expected to cost.
        exact: the result computes what the original does, in eval mode.
        left: layers that stay, with the reason.

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
    values: tuple[Assign, ...] = ()
    substitutes: tuple[Substitute, ...] = ()
    estimates: tuple[Estimate, ...] = ()
    exact: bool = False
    left: tuple[Left, ...] = ()

    @property
    def widens(self) -> bool:
        """Whether any space gets copies of channels."""
        return any(len(set(edit.keep)) < len(edit.keep) for edit in self.edits)

    def __str__(self) -> str:
        """One line per edit, and per space or layer that stays."""
        items = (*self.edits, *self.substitutes, *self.values, *self.skips, *self.left)
        lines = [str(item) for item in items]
        return "\n".join([*lines, *([f"then:\n{self.then}"] if self.then else [])])

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(asdict(self), indent=1, default=_encoded)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that ``to_json`` wrote.

        Raises:
            PlanError: the text is no plan.
        """
        try:
            return _plan(json.loads(text, object_hook=_decoded))
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"this is no plan written by Plan.to_json ({error})") from error


def _plan(data: dict[str, Any]) -> Plan:
    return Plan(
        tuple(Remap(e["space"], e["width"], tuple(e["keep"])) for e in data["edits"]),
        tuple(Skip(**s) for s in data["skips"]),
        data["inputs"],
        _plan(data["then"]) if data["then"] else None,
        tuple(Assign(**v) for v in data["values"]),
        tuple(
            Substitute(s["layer"], tuple(map(_part, s["parts"])), s["why"])
            for s in data["substitutes"]
        ),
        tuple(Estimate(**e) for e in data["estimates"]),
        data["exact"],
        tuple(Left(**e) for e in data.get("left", ())),
    )


def _part(data: dict[str, Any]) -> Part:
    """A part, with the tuples that JSON made lists of."""
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in data["options"].items()}
    return Part(data["kind"], options, data["tensors"])


def _same(a: Any, b: Any) -> bool:
    """Whether two nests of tensors and plain values are equal, bit by bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return bool(a == b)


def _encoded(value: Any) -> Any:
    """A tensor as text: its bytes in base64."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{type(value).__name__} cannot be part of a plan")
    numbers = value.detach().cpu().contiguous()
    raw = numbers.reshape(-1).view(torch.uint8).numpy().tobytes()  # NumPy knows no bfloat16
    text = base64.b64encode(raw).decode("ascii")
    return {"base64": text, "dtype": str(numbers.dtype)[6:], "shape": list(numbers.shape)}


def _decoded(data: dict[str, Any]) -> Any:
    if "base64" not in data:
        return data
    dtype = getattr(torch, data["dtype"])
    numbers = bytearray(base64.b64decode(data["base64"]))
    flat = torch.frombuffer(numbers, dtype=dtype) if numbers else torch.empty(0, dtype=dtype)
    return flat.reshape(data["shape"])


def chain(plans: Iterable[Plan]) -> Plan:
    """One plan that applies several, one after the other."""
    first, *rest = plans
    return replace(first, then=chain(rest) if rest else None)


def describe_inputs(value: Any) -> Any:
    """A JSON-able description of example inputs.

    >>> describe_inputs((torch.zeros(2, 3), 5))
    {'tuple': [{'tensor': [2, 3], 'dtype': 'float32'}, {'value': 5}]}
    """
    if isinstance(value, Tensor):
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
