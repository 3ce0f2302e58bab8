"""Select: keep the channels that best reconstruct what their readers compute, and refit these.

The edit of each space is (E, D) = (Cᵀ, P): a selector C, and per reader the least-squares map P on
the kept inputs. Selectors commute with everything that acts per channel, so no gradient step is
needed (D. A. R. Robin, S. Jain, *Linear Neural Reconstruction*, 2019).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from fxsvd.calibrate import Positions, calibrate
from fxsvd.coupling import Group
from fxsvd.data.batches import Data
from fxsvd.data.moments import Moment
from fxsvd.data.readers import Reader, readers
from fxsvd.dependency import Dependencies
from fxsvd.edits import Plan
from fxsvd.errors import PlanError
from fxsvd.importance import require_numbers
from fxsvd.naming import Names
from fxsvd.narrowing import Narrowing
from fxsvd.progress import Say, quiet
from fxsvd.selecting.chained import downstream, refit_chained
from fxsvd.selecting.choosing import METHODS, leaving
from fxsvd.selecting.fit import Fit, Mask, fit, own_output
from fxsvd.selecting.postponed import postponable
from fxsvd.selecting.selection import Selection, readable
from fxsvd.widths import Ratio, WidthGoal, Widths, as_plan, require_multiple, rounded

CHAININGS = ("parallel", "top-down", "bottom-up", "bottom-up+refit")


@dataclass(frozen=True)
class Select:
    """Keep the channels that reconstruct best, and refit their readers by least squares.

    Exactly one of ``ratio``, ``width``, ``penalty`` and ``error`` says how many: a number for all
    spaces, or a mapping from name patterns to numbers (the first that matches a producer counts,
    other spaces stay).

    Attributes:
        ratio: the fraction of channels removed, in [0, 1).
        width: the number of channels kept; spaces that have no more stay.
        penalty: of the lasso, relative to the least that empties a space, in [0, 1]: its support.
        error: as few channels as let no reader, refitted, lose a larger share of its output's
            variance, in [0, 1).
        method: ``"backward"`` eliminates channels by their exact cost, ``"forward"`` adds them by
            their exact gain, ``"lasso"`` takes the support of a group lasso.
        chaining: ``"parallel"``: every layer is fitted to the original's inputs; ``"top-down"``: to
            the inputs that the compressed network gives it; ``"bottom-up"``: channels are chosen to
            reconstruct only the outputs that stay; ``"bottom-up+refit"``: chosen bottom-up, fitted
            top-down.
        debias: refit after the choice; without it the readers keep what their weights were (with
            ``penalty``: they get the lasso's own, shrunken weights, whatever the chaining).
        round_to: widths become multiples of this.
        only: names, glob patterns or modules; a space is meant by any of its producers.
        ignore: likewise, spaces that stay.
        everywhere: refit also layers that lose no input, to make up for the errors before them
            (with the top-down chainings).
        positions: rows per sample for the statistics, see ``fxsvd.calibrate``.
        seed: of the choice of rows.

    Raises:
        PlanError: an option is out of range.

    >>> Select(ratio=0.25).chaining
    'bottom-up+refit'
    """

    ratio: Ratio | None = None
    width: Widths | None = None
    penalty: Ratio | None = None
    error: Ratio | None = None
    method: Literal["backward", "forward", "lasso"] = "backward"
    chaining: Literal["parallel", "top-down", "bottom-up", "bottom-up+refit"] = "bottom-up+refit"
    debias: bool = True
    round_to: int = 1
    only: Names = ()
    ignore: Names = ()
    everywhere: bool = True
    positions: Positions = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        goal = self._goal
        require_multiple(self.round_to)
        for value, known in ((self.method, tuple(METHODS)), (self.chaining, CHAININGS)):
            if value not in known:
                raise PlanError(f"there is no {value!r}; there are {known}")
        if goal.by == "penalty" and self.method != "lasso":
            raise PlanError("a penalty is the lasso's: give method='lasso', or ratio, width, error")

    @property
    def _goal(self) -> WidthGoal:
        return WidthGoal.of(
            ratio=self.ratio, width=self.width, penalty=self.penalty, error=self.error
        )

    def propose(self, deps: Dependencies, data: Data = None, say: Say = quiet) -> Plan:
        """The plan; nothing is touched.

        Args:
            deps: what ``fxsvd.analyze`` found.
            data: batches of inputs, read twice by the top-down chainings.
            say: is told how far it is.

        Raises:
            PlanError: there is no data, or a name means nothing.
        """
        if data is None:
            raise PlanError("Select reconstructs activations: give compile(…, data=batches)")
        require_numbers(deps)
        numbers, why = self._goal.per_space(deps, self.only, self.ignore)
        found = {name: r for name, r in readers(deps).items() if not r.depthwise}
        live = [
            (g, number)
            for g in deps.groups
            if (number := float(numbers[deps.space_of[g.channels]].min())) > 0
        ]
        live, unread = readable(deps, live, found)
        why |= unread
        chained = self.debias and self._top_down
        late = postponable(deps, [group for group, _ in live], found) if chained else {}
        now = [i for i in range(len(live)) if i not in self._chosen_only_late(late)]
        reading = _reading(deps, [live[i][0] for i in now], found)
        options: dict[str, Any] = {"positions": self.positions, "seed": self.seed, "say": say}
        moments = calibrate(deps, data, layers=reading, **options) if reading else {}
        selection = Selection(deps, reading, moments, self._bottom_up)
        work = _Work(deps, data, found, live, selection, say)
        self._choose(work, now)
        fits = self._chained(work, late) if chained else self._fits(work)
        left = "its goal, rounding or coupling leaves nothing to remove"
        plan = as_plan(deps, selection.kept[:-1], why, left)
        narrowing = Narrowing.of(deps, plan)
        return replace(
            plan,
            values=tuple(a for f in fits for a in f.assigns(deps.analysis.graph)),
            estimates=tuple(
                f.estimate("select", narrowing.along(f.reader.weight.type, 0)) for f in fits
            ),
        )

    @property
    def _bottom_up(self) -> bool:
        return self.chaining.startswith("bottom-up")

    @property
    def _top_down(self) -> bool:
        return self.chaining in ("top-down", "bottom-up+refit")

    def _choose(self, work: _Work, numbers: Sequence[int]) -> None:
        """Decide which channels stay, group by group."""
        by = "ratio" if self._goal.by == "width" else self._goal.by
        for i in reversed(numbers) if self._bottom_up else numbers:
            group, number = work.live[i]
            work.say(f"selecting {work.deps.spaces[work.deps.space_of[group.channels[0]]].name}")
            steps = leaving(work.selection, group, method=self.method, by=by, number=number)
            for channels in steps[: rounded(steps, self.round_to, work.deps)]:
                work.selection.kept[channels] = False

    def _fits(self, work: _Work) -> list[Fit]:
        """Every layer for itself, on the inputs that the original gives it."""
        loses = work.losing()
        if not self.debias:
            return work.selection.shrunken(loses)
        moments = work.selection.moments
        return [
            fit(work.found[n], own_output(work.found[n], moments[n]), mask)
            for n, mask in loses.items()
        ]

    def _chosen_only_late(self, late: dict[str, list[int]]) -> set[int]:
        """Groups for which no choice is needed before; bottom-up, layers in front look at it."""
        return set() if self._bottom_up else set(itertools.chain(*late.values()))

    def _chained(self, work: _Work, late: dict[str, list[int]]) -> list[Fit]:
        """One layer after the other; channels that one layer reads are chosen on the way."""
        wanted = {n: work.found[n] for n in work.found if n in work.losing() or n in late}
        if self.everywhere:
            wanted = downstream(work.deps, work.found, wanted)
        early = work.selection.kept[:-1].copy()
        for i in itertools.chain(*late.values()):
            early[work.live[i][0].channels] = True
        return list(
            refit_chained(
                work.deps,
                Narrowing.of(work.deps, as_plan(work.deps, early, {}, "")),
                wanted,
                work.data,
                choosing={n: partial(self._choose_late, work, late[n], n) for n in late},
                positions=self.positions,
                seed=self.seed,
                say=work.say,
            )
        )

    def _choose_late(self, work: _Work, numbers: list[int], layer: str, moment: Moment) -> Mask:
        reader, before = work.found[layer], work.selection
        now = Selection(work.deps, {layer: reader}, {layer: moment}, self._bottom_up)
        now.kept = before.kept  # shared: what goes, goes for both
        for i in numbers:
            now.kept[work.live[i][0].channels] = True
        self._choose(replace(work, selection=now), numbers)
        mask: Mask = now.kept[reader.entries()]
        return mask


@dataclass(frozen=True)
class _Work:
    """What is worked on: groups with their goal's numbers, and how far it is."""

    deps: Dependencies
    data: Iterable[Any]
    found: dict[str, Reader]
    live: list[tuple[Group, float]]
    selection: Selection
    say: Say

    def losing(self) -> dict[str, Mask]:
        """The layers that lose inputs, with the entries of their rows that stay."""
        kept = self.selection.kept
        masks = {n: kept[r.entries()] for n, r in self.found.items()}
        return {n: mask for n, mask in masks.items() if not mask.all()}


def _reading(
    deps: Dependencies, groups: Sequence[Group], found: dict[str, Reader]
) -> dict[str, Reader]:
    """The layers that read channels of some groups."""
    touched = np.zeros(deps.channels.count + 1, dtype=bool)
    for group in groups:
        touched[group.channels] = True
    return {name: r for name, r in found.items() if touched[r.channels].any()}
