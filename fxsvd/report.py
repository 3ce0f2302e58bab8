"""What happened: sizes before and after, a row per space and per layer, and what stayed and why."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from fxsvd.cost import Cost, metric
from fxsvd.edits import Plan
from fxsvd.measure import Site


@dataclass(frozen=True)
class SpaceRow:
    """One space: its width before and after, or why it stays."""

    name: str
    before: int
    after: int
    producers: tuple[str, ...]
    why: str = ""


@dataclass(frozen=True)
class LayerRow:
    """One layer: its weight's shape and its parameters before and after.

    Of a layer that others replaced, ``parts`` are the shapes of theirs and ``after`` is empty, as
    it is where a layer is gone.
    """

    name: str
    kind: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    parameters_before: int
    parameters_after: int
    parts: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Report:
    """The account of one compilation.

    Attributes:
        before: cost of the original.
        after: cost of the result.
        spaces: a row per channel space.
        layers: a row per layer with parameters.
        plan: what was applied.
        error: the largest relative difference that verification met; None where it was off.
        sites: for layers with a predicted error, that and the measured one.
        change: ‖f(x) − f̂(x)‖² / ‖f(x)‖² of the outputs, on the data that was given; else None.
        notes: what a user should know (a graph without a train mode, ops without a rule).
    """

    before: Cost
    after: Cost
    spaces: tuple[SpaceRow, ...]
    layers: tuple[LayerRow, ...]
    plan: Plan
    error: float | None = None
    sites: tuple[Site, ...] = ()
    change: float | None = None
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        """The report as a table."""
        tables = (self._totals(), self._space_lines(), self._site_lines())
        parts = (*tables, self._frozen_lines(), self._left_lines())
        return "\n\n".join("\n".join(lines) for lines in parts if lines)

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(asdict(self), indent=1, default=_described)

    def _totals(self) -> list[str]:
        pairs = [
            ("parameters", self.before.parameters, self.after.parameters),
            ("MACs", self.before.macs, self.after.macs),
            ("bytes", self.before.bytes, self.after.bytes),
            ("activation bytes", self.before.activation_bytes, self.after.activation_bytes),
        ]
        lines = [f"{'':<18}{'before':>10}{'after':>10}{'kept':>8}"]
        lines += [
            f"{name:<18}{metric(a):>10}{metric(b):>10}{b / a if a else 1:>8.1%}"
            for name, a, b in pairs
        ]
        if self.error is not None:
            what = "original" if self.plan.widens else "silenced original"
            lines.append(f"verified: equals the {what} to {self.error:.1e} (float64)")
        if self.change is not None:
            lines.append(f"outputs on the data given: {self.change:.1e} of their energy changed")
        return lines + [f"note: {note}" for note in self.notes]

    def _space_lines(self) -> list[str]:
        rows = [r for r in self.spaces if r.after != r.before]
        width = max(map(len, ("space", *(r.name for r in rows))))
        head = [f"{'space':<{width}}  {'before':>6}  {'after':>6}  written by"] if rows else []
        return head + [
            f"{r.name:<{width}}  {r.before:>6}  {r.after:>6}  {_some(r.producers)}" for r in rows
        ]

    def _frozen_lines(self) -> list[str]:
        rows = [r for r in self.spaces if r.after == r.before and r.why]
        lines = [f"  {r.name} ({r.before}): {r.why}" for r in rows]
        return [f"not {'widened' if self.plan.widens else 'narrowed'}:", *lines] if rows else []

    def _left_lines(self) -> list[str]:
        lines, stage = [], self.plan
        while True:
            lines += [f"  {left.layer}: {left.why}" for left in stage.left]
            if stage.then is None:
                return ["layers left as they are:", *dict.fromkeys(lines)] if lines else []
            stage = stage.then

    def _site_lines(self) -> list[str]:
        width = max(map(len, ("layer", *(s.layer for s in self.sites))))
        head = [f"{'layer':<{width}}  {'edit':<9}  lost of its variance: predicted  measured"]
        rows = [
            f"{s.layer:<{width}}  {s.edit:<9}  {s.predicted:>31.2e}  {s.measured:>8.2e}"
            for s in self.sites
        ]
        return head + rows if rows else []


def _some(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" +{len(names) - most}" if len(names) > most else "")


def layer_rows(before: fx.GraphModule, after: fx.GraphModule) -> tuple[LayerRow, ...]:
    """A row per layer that holds parameters of its own."""
    twins = dict(after.named_modules())
    return tuple(
        _layer_row(name, module, twins.get(name))
        for name, module in before.named_modules()
        if _own(module)
    )


def _layer_row(name: str, before: nn.Module, after: nn.Module | None) -> LayerRow:
    kind = type(before).__name__
    same = after is not None and _own(after) > 0
    parts = (
        () if same or after is None else tuple(map(_weight_shape, filter(_own, after.modules())))
    )
    return LayerRow(
        name or kind,
        kind,
        _weight_shape(before),
        _weight_shape(after) if after is not None and same else (),
        _own(before),
        sum(p.numel() for p in after.parameters(recurse=not same)) if after is not None else 0,
        parts,
    )


def _described(value: Any) -> Any:
    """A tensor of the plan by its shape: ``report.plan.to_json()`` has the numbers."""
    if isinstance(value, Tensor):
        return {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    raise TypeError(f"{type(value).__name__} has no place in a report")


def _own(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters(recurse=False))


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    first = next(module.parameters(recurse=False))
    weight = getattr(module, "weight", None)
    return tuple(weight.shape if isinstance(weight, nn.Parameter) else first.shape)
