"""What was resized when: as a table, as CSV, as a plot over time, as TensorBoard scalars."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from fxsvd.cost import metric
from fxsvd.dependency import Dependencies
from fxsvd.edits import Plan
from fxsvd.evolving.drawing import draw
from fxsvd.evolving.spectra import effective_rank, smallest_share, spectrum

COLUMNS = (
    *("step", "space", "before", "after", "smallest", "rank"),
    *("parameters", "macs", "loss_before", "loss_after", "undone"),
)


@dataclass(frozen=True)
class Width:
    """One space at a resize.

    Attributes:
        space: its name.
        before: how many channels it had.
        after: how many it has now; as before where the resize was undone.
        smallest: before, the smallest singular value of what writes it, relative to the sum of all;
            None where no matrix writes it.
        rank: before, the effective rank of what writes it, likewise.
    """

    space: str
    before: int
    after: int
    smallest: float | None = None
    rank: float | None = None


@dataclass(frozen=True)
class Event:
    """One resize.

    Attributes:
        step: when it was.
        plan: what was done, without the numbers.
        parameters: how many the network has now.
        before: the loss before, where there is one.
        after: the loss after.
        undone: whether it cost more than was allowed, and the network is as before.
        macs: multiply-accumulates of one sample now.
        widths: of every space, frozen ones too.
        advice: what the spectra of residual branches said before, where that was asked for.
    """

    step: int
    plan: Plan
    parameters: int
    before: float | None
    after: float | None
    undone: bool
    macs: int | None = None
    widths: tuple[Width, ...] = ()
    advice: tuple[str, ...] = ()

    def __str__(self) -> str:
        """``step 3: 1234 parameters, loss 0.21 -> 0.22``."""
        loss = self._loss()
        end = " (undone)" if self.undone else ""
        return f"step {self.step}: {self.parameters} parameters{loss and ', loss ' + loss}{end}"

    def _loss(self) -> str:
        return "" if self.after is None else f"{self.before:.4g} -> {self.after:.4g}"

    def _row(self) -> tuple[str, ...]:
        changed = [f"{w.space} {w.before} -> {w.after}" for w in self.widths if w.before != w.after]
        other = [str(edit) for edit in self.plan.substitutes]
        done = "undone" if self.undone else ", ".join([*changed, *other]) or "new numbers"
        macs = "" if self.macs is None else metric(self.macs).strip()
        return str(self.step), str(self.parameters), macs, self._loss(), done


class Writer(Protocol):
    """What takes scalars: ``torch.utils.tensorboard.SummaryWriter`` does."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Note a number."""


class History(list[Event]):
    """The resizes so far, a list.

    >>> event = Event(3, Plan(), 86, 0.5, 0.25, False, 76, (Width("0", 8, 12, 0.05, 3.5),))
    >>> print(History([event]).table())
    | step | parameters | MACs | loss | what was done |
    |---:|---:|---:|---|---|
    | 3 | 86 | 76 | 0.5 -> 0.25 | 0 8 -> 12 |
    """

    def table(self) -> str:
        """A row per resize, in Markdown; below, the advice of the last one, if there is any."""
        head = ("step", "parameters", "MACs", "loss", "what was done")
        rows = [head, *(event._row() for event in self)]
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        lines.insert(1, "|---:|---:|---:|---|---|")
        advice = self[-1].advice if self else ()
        return "\n".join([*lines, *(["", *advice] if advice else [])])

    def csv(self) -> str:
        """A row per resize and space, the columns in the first line.

        >>> print(History([Event(1, Plan(), 9, None, None, False, 8, (Width("a", 4, 3),))]).csv())
        step,space,before,after,smallest,rank,parameters,macs,loss_before,loss_after,undone
        1,a,4,3,,,9,8,,,False
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for event in self:
            whole = event.parameters, event.macs, event.before, event.after, event.undone
            for w in event.widths:
                writer.writerow((event.step, *asdict(w).values(), *whole))
        return text.getvalue()

    def to_tensorboard(self, writer: Writer, prefix: str = "fxsvd") -> None:
        """Note every resize as scalars: size, loss, and of every space the width and spectrum.

        Args:
            writer: a ``torch.utils.tensorboard.SummaryWriter``, or what has its ``add_scalar``.
            prefix: of all tags.

        >>> class Printer:
        ...     def add_scalar(self, tag, scalar_value, global_step):
        ...         print(global_step, tag, scalar_value)
        >>> History([Event(1, Plan(), 9, None, None, False)]).to_tensorboard(Printer())
        1 fxsvd/parameters 9
        1 fxsvd/undone 0
        """
        for event in self:
            for tag, number in _scalars(event):
                if number is not None:
                    writer.add_scalar(f"{prefix}/{tag}", number, event.step)

    def plot(self, path: str | Path) -> None:
        """Draw widths, parameters and loss over the steps.

        Args:
            path: of the picture; its ending says which kind (``.png``, ``.svg``, ``.pdf``).

        Raises:
            FxsvdError: nothing was resized yet, or matplotlib is not installed.

        >>> History().plot("widths.png")
        Traceback (most recent call last):
        fxsvd.errors.FxsvdError: nothing was resized yet: there is nothing to plot
        """
        draw(self, path)


def _scalars(event: Event) -> Iterator[tuple[str, float | None]]:
    yield "parameters", event.parameters
    yield "macs", event.macs
    yield "loss/before", event.before
    yield "loss/after", event.after
    yield "undone", int(event.undone)
    for w in event.widths:
        yield f"width/{w.space}", w.after
        yield f"smallest/{w.space}", w.smallest
        yield f"rank/{w.space}", w.rank


def widths_of(deps: Dependencies, plan: Plan, undone: bool) -> tuple[Width, ...]:
    """Every space before and after a plan.

    Args:
        deps: the analysis of the network before.
        plan: what was done to it.
        undone: whether it was undone.

    >>> import torch
    >>> from fxsvd.capture import capture
    >>> from fxsvd.dependency import analyze
    >>> from fxsvd.edits import Remap
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    >>> deps = analyze(capture(net, torch.zeros(2, 4)))
    >>> [(w.space, w.before, w.after) for w in widths_of(deps, Plan((Remap("0", 3, (1,)),)), False)]
    [('0', 3, 1), ('1', 2, 2)]
    """
    kept = {} if undone else {edit.space: len(edit.keep) for edit in plan.edits}
    out = []
    deps = deps.growing if plan.widens else deps
    for space in deps.spaces:
        values = spectrum(deps, space)
        smallest = smallest_share(values, space.width) if len(values) else None
        rank = effective_rank(values) if len(values) else None
        after = kept.get(space.name, space.width)
        out.append(Width(space.name, space.width, after, smallest, rank))
    return tuple(out)


def without_numbers(plan: Plan, deps: Dependencies) -> Plan:
    """What a plan does to shapes: of its numbers, only biases that are new.

    Args:
        plan: one stage.
        deps: the analysis of the network that it is for.

    >>> import torch
    >>> from fxsvd.capture import capture
    >>> from fxsvd.dependency import analyze
    >>> from fxsvd.edits import Assign
    >>> deps = analyze(capture(torch.nn.Linear(4, 3, bias=False), torch.zeros(2, 4)))
    >>> plan = Plan(values=(Assign("weight", torch.ones(3, 4), "fitted"),))
    >>> without_numbers(plan, deps).values
    ()
    """
    names = {name for known in deps.analysis.parameters.values() for name in known.names}
    return replace(plan, values=tuple(v for v in plan.values if v.parameter not in names))


def stored(event: Event) -> dict[str, Any]:
    """An event as plain values, for ``torch.save``.

    >>> stored(Event(1, Plan(), 9, None, None, False))["parameters"]
    9
    """
    widths = [asdict(w) for w in event.widths]
    return vars(event) | {"plan": event.plan.to_json(), "widths": widths}


def restored(data: Mapping[str, Any]) -> Event:
    """The event that was stored; one from before there were widths has none.

    >>> event = Event(1, Plan(), 9, None, None, False, 8, (Width("a", 4, 3),), ("wide",))
    >>> restored(stored(event)) == event
    True
    """
    widths = tuple(Width(**w) for w in data.get("widths", ()))
    return Event(**{**data, "plan": Plan.from_json(data["plan"]), "widths": widths})
