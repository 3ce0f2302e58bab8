"""Sizes computed from the batch size, as nodes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxsvd.capture.fakes import Fakes
from fxsvd.capture.origins import Origins
from fxsvd.capture.writer import Writer
from fxsvd.errors import CaptureError

_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "Add": operator.add,
    "Mul": operator.mul,
    "Pow": operator.pow,
    "PowByNatural": operator.pow,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "IntTrueDiv": operator.truediv,
    "FloatTrueDiv": operator.truediv,
    "Max": torch.sym_max,
    "Min": torch.sym_min,
    "ToFloat": torch.sym_float,
    "TruncToInt": torch.sym_int,
}
"""What the symbolic expressions of sizes become in the graph, by sympy class name."""


class Sizes:
    """Writes symbolic sizes as arithmetic on the batch size, each once.

    Args:
        fakes: Holds the symbol of the batch size.
        origins: Knows the input to read the batch size from.
        writer: Gets the nodes.
    """

    def __init__(self, fakes: Fakes, origins: Origins, writer: Writer) -> None:
        self._fakes = fakes
        self._origins = origins
        self._writer = writer
        self._known: dict[Any, Any] = {}

    def value_of(self, expr: Any) -> Any:
        """Rebuilds a size from the batch size, as readable arithmetic."""
        if expr.is_Integer or expr.is_Boolean:
            return bool(expr) if expr.is_Boolean else int(expr)
        if expr.is_number:
            return float(expr)
        if expr not in self._known:
            if expr.is_Symbol:
                self._known[expr] = self._batch_node(expr)
            else:
                self._known[expr] = self._arithmetic(expr)
        return self._known[expr]

    def _batch_node(self, symbol: Any) -> fx.Node:
        if symbol != self._fakes.symbol or self._origins.batch is None:
            raise CaptureError(f"a size depends on data, not only on the batch size: {symbol}")
        # Right after the input: a later torch call may reshape the input in place.
        node, path = self._origins.batch
        for key in path:
            node = self._after(node, "call_function", operator.getitem, key, node.meta["val"][key])
        return self._after(node, "call_method", "size", 0, self._fakes.batch)

    def _after(self, node: fx.Node, op: str, target: Any, key: Any, value: Any) -> fx.Node:
        with self._writer.graph.inserting_after(node):
            read: fx.Node = self._writer.graph.create_node(op, target, (node, key))
        self._writer.describe(read, value, "")
        return read

    def _arithmetic(self, expr: Any) -> fx.Node:
        kind = type(expr).__name__
        if kind not in _ARITHMETIC:
            raise CaptureError(f"size arithmetic with {kind} is not supported: {expr}")
        function = _ARITHMETIC[kind]
        # Sympy sorts numbers first; `batch * 196` reads better than `196 * batch`.
        parts = list(expr.args)
        if kind in ("Add", "Mul"):
            parts.sort(key=lambda part: bool(part.is_number))
        first, *others = [self.value_of(part) for part in parts]
        if not others:
            return self._sized(function, (first,))
        node = self._sized(function, (first, others[0]))
        for other in others[1:]:
            node = self._sized(function, (node, other))
        return node

    def _sized(self, function: Any, args: tuple[Any, ...]) -> fx.Node:
        name = self._writer.scoped(function.__name__)
        node: fx.Node = self._writer.graph.create_node("call_function", function, args, {}, name)
        values = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args]
        self._writer.describe(node, function(*values))
        return node
