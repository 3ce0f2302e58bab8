"""The table from op to rule, and what a rule is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from fxsvd.axes import Shape, TensorType, combine, contract, einsum, fix_dims, freeze_type
from fxsvd.relations import Relations
from fxsvd.rules.reshape import reshape

Key = Callable[..., Any] | str
Rule = Callable[..., Any]


class Edit(Protocol):
    """What a literal's rule is given: a node to mend, and what is known of the resized tensors."""

    @property
    def node(self) -> Any:
        """The ``fx.Node`` of the copy (its arguments are nested too freely for a static type)."""

    @property
    def out(self) -> Any:
        """The type of the node's result."""

    def type_of(self, arg: Any) -> Any:
        """The type of an argument of the node."""

    def shape(self, t: TensorType) -> Shape:
        """A tensor's shape afterwards (batch at its hint)."""

    def alive(self, t: TensorType, dim: int) -> npt.NDArray[Any]:
        """How often each index along a dimension is there (of the first row, where rows differ)."""

    def order(self, t: TensorType, dim: int) -> npt.NDArray[np.int64]:
        """Which index each of a dimension was before, or is a copy of (of the first row)."""

    def size(self, entry: Any, before: int, after: int) -> Any:
        """A size written in the graph (a number or a node) mended from ``before`` to ``after``."""

    def constant(self, name: str, value: torch.Tensor) -> fx.Node:
        """A new constant of the graph, as a node to be used by the mended one."""

    def buffer(self, node: fx.Node, value: torch.Tensor) -> fx.Node:
        """A node for another value of the constant that a ``get_attr`` node reads."""


Literal = Callable[[Edit], None]


def stays(alive: npt.NDArray[Any]) -> bool:
    """Whether every index is there once, as before."""
    return bool((alive == 1).all())


def renumbered(alive: npt.NDArray[Any], index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """An index into a dimension, once its indices are there ``alive`` times.

    >>> renumbered(np.array([1, 0, 2]), np.array([2, 1, 0]))
    array([1, 2, 0])
    """
    counts = alive.astype(np.int64)
    starts, times = (counts.cumsum() - counts)[index], counts[index]
    within = np.arange(times.sum()) - np.repeat(times.cumsum() - times, times)
    out: npt.NDArray[np.int64] = np.repeat(starts, times) + within
    return out


RULES: dict[Key, Rule] = {}
LITERALS: dict[Key, Literal] = {}


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an op in the graph, as its rule sees it.

    Attributes:
        relations: where equalities, reasons and constraints go.
        label: the node's name, for reasons.
        out: the shape of the result with the batch at its hint (nested for several results).
        node: the graph's node (None in tests that call a rule directly).
    """

    relations: Relations
    label: str
    out: Any
    node: fx.Node | None = None
    consumed: Callable[[TensorType, Sequence[int]], None] = field(default=lambda t, d: None)
    produced: Callable[[TensorType, Sequence[int]], None] = field(default=lambda t, d: None)

    def fixed(self) -> Any:
        """The result with every dimension fixed."""
        return fixed(self.out)

    def freeze(self, t: TensorType, why: str) -> TensorType:
        """Freeze a tensor's channels; ``why`` completes "`label` …"."""
        return freeze_type(self.relations, t, f"`{self.label}` {why}")

    def fix(self, t: TensorType, dims: Iterable[int], why: str) -> TensorType:
        """Forbid narrowing some dimensions; ``why`` completes "`label` …"."""
        return fix_dims(self.relations, t, dims, f"`{self.label}` {why}")

    def combine(self, *types: TensorType, product: bool = False) -> TensorType:
        """Elementwise over tensors that broadcast together."""
        return combine(self.relations, types, self._meets(), product=product)

    def _meets(self) -> str:
        return f"`{self.label}` ties it to an axis of fixed width"

    def contract(self, t: TensorType, dims: Iterable[int]) -> TensorType:
        """Sum over dimensions."""
        return contract(self.relations, t, dims, f"`{self.label}`")

    def einsum(self, operands: Sequence[tuple[str, TensorType]], output: str) -> TensorType:
        """Contract labelled operands; notes which parameters produce and consume channels."""
        for names, t in operands:
            others = {c for n, o in operands if o is not t for c in n}
            self.consumed(t, [i for i, c in enumerate(names) if c not in output])
            self.produced(t, [i for i, c in enumerate(names) if c in output and c not in others])
        return einsum(self.relations, operands, output, self._meets())

    def reshape(self, t: TensorType, shape: Shape) -> TensorType:
        """The tensor seen with another shape."""
        return reshape(self.relations, t, shape, f"`{self.label}` keeps rows of equal length")


def fixed(shape: Any) -> Any:
    """The type of a tensor (or a nest of them) nobody may narrow."""
    if isinstance(shape, torch.Size):
        return TensorType(tuple(shape))
    if isinstance(shape, dict):
        return {key: fixed(value) for key, value in shape.items()}
    if isinstance(shape, (tuple, list)):
        return tuple(fixed(item) for item in shape)
    return shape


def spellings(*names: str) -> list[Key]:
    """Every public spelling of ops: function, in-place function, method, in-place method.

    >>> "relu_" in spellings("relu") and torch.relu in spellings("relu")
    True
    """
    keys: list[Key] = []
    for name in names:
        for variant in (name, f"{name}_"):
            for home in (torch, torch.nn.functional, torch.special, torch.linalg):
                keys += [found] if callable(found := getattr(home, variant, None)) else []
            if hasattr(torch.Tensor, variant):
                keys.append(variant)
    return list(dict.fromkeys(keys))


def rule(*keys: Key) -> Callable[[Rule], Rule]:
    """Register a rule under the given spellings; registering one twice is an error."""
    return _registrar(RULES, keys)


def register_rule(*keys: Key) -> Callable[[Rule], Rule]:
    """Teach fxsvd how an operator of your own carries axes.

    A function written in PyTorch needs no rule: ``fxsvd.capture`` sees what it calls.

    Args:
        *keys: torch functions, custom operators (also as ``torch.ops.namespace.name.default``), or
            names of tensor methods that the rule is for.

    Returns:
        A decorator for ``rule(call, *args, **kwargs)``: it is given a ``Call`` and the operator's
        own arguments, tensors replaced by their types, and returns the type of the result.

    Raises:
        ValueError: there is a rule already.

    >>> @torch.library.custom_op("fxsvd_doctest::swish", mutates_args=())
    ... def swish(x: torch.Tensor) -> torch.Tensor:
    ...     return x * torch.sigmoid(x)
    >>> @register_rule(torch.ops.fxsvd_doctest.swish.default)
    ... def _(call, x):
    ...     return x                                # elementwise, and 0 stays 0
    """
    return rule(*keys)


def literals(*keys: Key) -> Callable[[Literal], Literal]:
    """Register how an op's literal sizes follow its narrowed result."""
    return _registrar(LITERALS, keys)


def _registrar(table: dict[Key, Any], keys: Sequence[Key]) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        for key in keys:
            if key in table:
                raise ValueError(f"a rule for {key} is registered already ({table[key].__name__})")
            table[key] = function
        return function

    return register


def find(table: dict[Key, Any], node: fx.Node) -> Any | None:
    """The entry of a call_function or call_method node, or None."""
    return table.get(node.target)
