"""Moves of channels within a budget: which go, which come, and the passes that do it."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fxsvd import cost
from fxsvd.data.batches import Data
from fxsvd.dependency import Dependencies
from fxsvd.edits import Plan
from fxsvd.passes import Widen
from fxsvd.progress import Say, quiet
from fxsvd.relations import Atoms
from fxsvd.rewrite import rewrite
from fxsvd.widening import Counts
from fxsvd.widths import as_plan

MEASURES = ("parameters", "macs")


@dataclass(frozen=True, eq=False)
class Priced:
    """Channels that may come or go.

    Attributes:
        worth: what they say, in units of the loss.
        size: how many parameters (or MACs) they cost.
    """

    worth: float
    size: int

    @property
    def density(self) -> float:
        """What they are worth for what they cost; what costs nothing is beyond price."""
        return self.worth / self.size if self.size > 0 else float("inf")


@dataclass(frozen=True, eq=False)
class Step(Priced):
    """Channels of a group, which go together, worth the loss without them less that with them.

    Attributes:
        channels: their numbers.
    """

    channels: Atoms


@dataclass(frozen=True)
class Promise(Priced):
    """A new channel of a space, worth as much as the loss falls when it learns.

    Attributes:
        space: the space's name.
    """

    space: str


def traded(
    room: int, there: Sequence[Step], promises: Iterable[Promise]
) -> tuple[list[Step], list[Promise]]:
    """What goes and what comes: while there is room, or what comes promises more than what goes.

    Args:
        room: how much the network may grow.
        there: channels that may go, those worth least first.
        promises: channels that may come, those that promise most first.

    Returns:
        What goes, and what comes.

    >>> there = [Step(worth, 4, np.array([0])) for worth in (0.4, 0.8, 2.4)]
    >>> gone, come = traded(5, there, [Promise(3.0, 6, "a"), Promise(0.9, 6, "b")])
    >>> [step.worth for step in gone], [promise.space for promise in come]
    ([0.4], ['a'])
    """
    gone: list[Step] = []
    come: list[Promise] = []
    for promise in promises:
        made, left = 0, room
        for step in there[len(gone) :]:
            if left >= promise.size or step.density >= promise.density:
                break
            made, left = made + 1, left + step.size
        if left >= promise.size:
            room = left - promise.size
            gone += there[len(gone) : len(gone) + made]
            come.append(promise)
    return gone, come


@dataclass(frozen=True)
class Drop:
    """Channels go, and nothing else changes.

    Attributes:
        keep: by space, which of its channels stay, ascending.

    >>> Drop({"fc": (0, 2)}).keep
    {'fc': (0, 2)}
    """

    keep: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, deps: Dependencies, gone: Iterable[Step]) -> Drop:
        """The pass by which steps of groups go."""
        plan = as_plan(deps, without(deps, gone), {}, "")
        return cls({edit.space: edit.keep for edit in plan.edits})

    def propose(self, deps: Dependencies, data: Data = None, say: Say = quiet) -> Plan:
        """The plan; nothing is touched.

        Args:
            deps: what ``fxsvd.analyze`` found.
            data: not needed.
            say: not needed.
        """
        counts = np.ones(deps.channels.count, dtype=np.int64)
        for space in deps.spaces:
            if space.name in self.keep:
                counts[np.delete(space.channels, self.keep[space.name])] = 0
        return as_plan(deps, counts, {}, "its channels are worth what they cost")


@dataclass(frozen=True)
class Fill:
    """Channels come as they promise (``Widen(init="gradient")``), while a budget has room for them.

    Attributes:
        spaces: a space for each channel, the most promising first.
        budget: what the network may have afterwards.
        measure: ``"parameters"`` or ``"macs"`` (for one sample).
        loss: ``loss(output, target)``.
        data: batches ``(inputs, target)``.
        seed: of what is drawn.

    >>> Fill(("fc", "fc"), budget=100, measure="macs", loss=None, data=[]).budget
    100
    """

    spaces: tuple[str, ...]
    budget: int
    measure: str
    loss: Any
    data: Iterable[Any] = field(compare=False, repr=False)
    seed: int = 0

    def propose(self, deps: Dependencies, data: Data = None, say: Say = quiet) -> Plan:
        """The plan; nothing is touched.

        Args:
            deps: what ``fxsvd.analyze`` found.
            data: not needed.
            say: not needed.
        """
        deps = deps.growing
        live = {space.name: space.width for space in deps.spaces if space.frozen is None}
        order = [name for name in self.spaces if name in live]

        def bursts(count: int) -> bool:
            return size_of(deps, self.measure, widened(deps, order[:count])) > self.budget

        fit = bisect_left(range(len(order) + 1), True, key=bursts) - 1
        come = Counter(order[: max(fit, 0)])
        if not come:
            counts = np.ones(deps.channels.count, dtype=np.int64)
            return as_plan(deps, counts, {}, "the budget has no room for it")
        to = {name: live[name] + count for name, count in come.items()}
        grow = Widen(to=to, init="gradient", loss=self.loss, data=self.data, seed=self.seed)
        return grow.propose(deps)


def size_of(deps: Dependencies, measure: str, counts: Counts | None = None) -> int:
    """How large the network is, or would be, exactly.

    Args:
        deps: what ``fxsvd.analyze`` found.
        measure: ``"parameters"`` or ``"macs"`` (for one sample).
        counts: how often each channel would be there: 0 or 1, or 1 or more; as it is now if None.

    >>> import torch
    >>> from fxsvd.capture import capture
    >>> from fxsvd.dependency import analyze
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    >>> deps = analyze(capture(net, torch.zeros(2, 4)))
    >>> size_of(deps, "parameters"), size_of(deps, "macs", widened(deps, ["0"]))
    (58, 54)
    """
    graph = deps.analysis.graph
    if counts is not None and (counts != 1).any():
        graph = rewrite(deps, as_plan(deps, counts, {}, ""))
    return cost.parameters(graph) if measure == "parameters" else cost.macs(graph)


def without(deps: Dependencies, gone: Iterable[Step]) -> Counts:
    """How often each channel is there once some are gone.

    >>> import torch
    >>> from fxsvd.capture import capture
    >>> from fxsvd.dependency import analyze
    >>> deps = analyze(capture(torch.nn.Linear(2, 3), torch.zeros(2, 2)))
    >>> without(deps, [Step(0.0, 3, deps.spaces[0].channels[1:])])[deps.spaces[0].channels]
    array([1, 0, 0])
    """
    counts: Counts = np.ones(deps.channels.count, dtype=np.int64)
    for step in gone:
        counts[step.channels] = 0
    return counts


def widened(deps: Dependencies, names: Iterable[str]) -> Counts:
    """How often each channel is there once spaces got one more, for each time they are named.

    >>> import torch
    >>> from fxsvd.capture import capture
    >>> from fxsvd.dependency import analyze
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    >>> deps = analyze(capture(net, torch.zeros(2, 4)))
    >>> widened(deps, ["0", "0"])[deps.space("0").channels]
    array([3, 1, 1])
    """
    counts: Counts = np.ones(deps.channels.count, dtype=np.int64)
    for name in names:
        counts[deps.space(name).channels[0]] += 1
    return counts
