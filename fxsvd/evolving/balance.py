"""Balance: a policy that moves channels to where they say more, within a budget.

Like is compared with like: for what they add to the network (parameters, or MACs), channels that
are there by what the loss would be without them, and new ones by how much it falls as they learn,
both in units of the loss (``fxsvd.evolving.prices``, ``fxsvd.growing.gradients``).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import fx

from fxsvd.compile import Pass
from fxsvd.data.batches import require_batches
from fxsvd.dependency import Dependencies, analyze
from fxsvd.errors import PlanError
from fxsvd.evolving.moves import (
    MEASURES,
    Drop,
    Fill,
    Promise,
    Step,
    size_of,
    traded,
    widened,
    without,
)
from fxsvd.evolving.prices import mean_loss, prices
from fxsvd.growing.gradients import Prospects, prospects
from fxsvd.naming import Names, listed, spaces_named
from fxsvd.rewrite import rewrite

SIGNIFICANT = 1e-12
"""Of the most that a space's new channels promise; what is less is rounding."""


@dataclass(frozen=True)
class Balance:
    """Lets channels go where they are worth least, and come where they promise most.

    Above the budget, the channels go that are worth least for what they cost, until the network is
    within it. Within, new channels come (``Widen(init="gradient")``) while there is room, those
    that promise most for what they cost first; and while they promise more than channels that are
    there are worth, these make room for them, if the loss, measured without them, bears that out.
    So the network is within the budget afterwards, exactly (unless it was above, and the
    ``Evolver`` undoes what would bring it down).

    Spaces can grow that ``Widen(init="gradient")`` widens, and shrink that nothing but linear
    layers and convolutions read; others stay. Every call runs over the data once, and once more in
    a wider network for each space that can grow: a few batches will do.

    Attributes:
        budget: how many parameters, or MACs for one sample.
        loss: ``loss(output, target)``, a mean over samples.
        data: batches ``(inputs, target)``.
        measure: ``"parameters"`` or ``"macs"``.
        rate: what turns a squared gradient into a decrease of the loss: the learning rate times
            the number of steps until the policy is asked again.
        most: how many of a space's channels come or go at a time within the budget, relative to
            those that are there; at least one.
        only: spaces that may change; all where there is none.
        ignore: spaces that stay.
        seed: of what is drawn.

    Raises:
        PlanError: an option is out of range.

    >>> Balance(budget=12_500, loss=None, data=[]).measure
    'parameters'
    """

    budget: int
    loss: Any
    data: Iterable[Any] = field(compare=False, repr=False)
    measure: Literal["parameters", "macs"] = "parameters"
    rate: float = 1.0
    most: float = 0.1
    only: Names = ()
    ignore: Names = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise PlanError(f"there is no measure {self.measure!r}; there are {MEASURES}")
        if self.budget < 1 or self.rate <= 0 or not 0 <= self.most < 1:
            raise PlanError("budget and rate are above 0, `most` is in [0, 1)")
        require_batches(self.data)

    def __call__(self, network: fx.GraphModule, step: int) -> Sequence[Pass]:
        """What goes and comes now.

        Raises:
            PlanError: there is no batch, the loss is not finite, or the network cannot become as
                small as the budget.
        """
        deps = analyze(network)
        there = self._there(deps)
        room = self.budget - size_of(deps, self.measure)
        if room < 0:
            return (self._within(deps, there),)
        gone, come = self._worthwhile(deps, room, self._movable(there), self._promised(deps))
        out: list[Pass] = [Drop.of(deps, gone)] if gone else []
        spaces = tuple(promise.space for promise in come)
        fill = Fill(spaces, self.budget, self.measure, self.loss, self.data, self.seed)
        return [*out, fill] if come else out

    def _worthwhile(
        self, deps: Dependencies, room: int, there: list[Step], promises: list[Promise]
    ) -> tuple[list[Step], list[Promise]]:
        """A trade that pays: the loss, measured without what goes, rises by less than is promised.

        Where gradients vanish, so do estimates by gradients; what a channel says does not.
        """
        graph, count = deps.analysis.graph, len(promises)
        now = mean_loss(graph, self.loss, self.data)
        while count:
            gone, come = traded(room, there, promises[:count])
            if not gone:
                break
            small = rewrite(deps, Drop.of(deps, gone).propose(deps))
            rise = mean_loss(small, self.loss, self.data) - now
            if rise <= sum(promise.worth for promise in come):
                return gone, come
            count //= 2
        return traded(room, (), promises)

    def _there(self, deps: Dependencies) -> list[list[Step]]:
        """By group, its channels as they would go, step by step, those worth least first."""
        scores = prices(deps, self.loss, self.data, self.rate)
        may, now = self._may(deps), size_of(deps, self.measure)
        out = []
        for group in deps.groups:
            may_go = may[deps.space_of[group.channels]].all()
            if may_go and not np.isnan(scores[group.channels]).any():
                steps = group.ranked(scores)
                first = [Step(0.0, 0, steps[0])]
                saved = now - size_of(deps, self.measure, without(deps, first))
                out.append([Step(float(scores[s].sum()), saved, s) for s in steps])
        return out

    def _movable(self, there: list[list[Step]]) -> list[Step]:
        """Those that may go at a time; two of a group stay, for a single channel cannot grow."""
        few = [steps[:-2][: _share(self.most, len(steps))] for steps in there]
        return sorted((step for steps in few for step in steps), key=lambda step: step.density)

    def _within(self, deps: Dependencies, there: list[list[Step]]) -> Drop:
        """As many as have to go for the network to come within the budget."""
        order = sorted((s for steps in there for s in steps[:-1]), key=lambda step: step.density)

        def fits(count: int) -> bool:
            return size_of(deps, self.measure, without(deps, order[:count])) <= self.budget

        needed = bisect_left(range(len(order) + 1), True, key=fits)
        if needed > len(order):
            least = size_of(deps, self.measure, without(deps, order))
            raise PlanError(
                f"the network cannot become smaller than {least} {self.measure}, and the budget is "
                f"{self.budget}: spaces that are frozen, ignored, or read by other than linear "
                "layers and convolutions stay"
            )
        return Drop.of(deps, order[:needed])

    def _promised(self, deps: Dependencies) -> list[Promise]:
        """New channels, the most promising first."""
        deps = deps.growing
        may, now = self._may(deps), size_of(deps, self.measure)
        out = []
        for i, space in enumerate(deps.spaces):
            alone = space.frozen is None and may[i] and spaces_named(deps, space.name) == {i}
            found = prospects(deps, space, self.loss, self.data) if alone else ""
            if isinstance(found, Prospects):
                size = size_of(deps, self.measure, widened(deps, [space.name])) - now
                gains = self.rate * found.gradients[: _share(self.most, space.width)].square()
                real = gains[gains > SIGNIFICANT * gains[0]].tolist()
                out += [Promise(gain, size, space.name) for gain in real]
        return sorted(out, key=lambda promise: -promise.density)

    def _may(self, deps: Dependencies) -> np.ndarray:
        """By space, whether it may change (and, as the last, of none)."""
        may = np.ones(len(deps.spaces) + 1, dtype=bool)
        if listed(self.only):
            may[:] = False
            may[list(spaces_named(deps, self.only))] = True
        may[list(spaces_named(deps, self.ignore))] = False
        return may


def _share(most: float, width: int) -> int:
    return max(1, int(most * width))
