"""Select: keep the channels that best reconstruct what their readers compute, and refit these.

The edit of each space is (E, D) = (Cᵀ, P): a selector C, and per reader the least-squares map P on
the kept inputs. Selectors commute with everything that acts per channel, so no gradient step is
needed (D. A. R. Robin, S. Jain, *Linear Neural Reconstruction*, 2019).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fxsvd.batches import Data
from fxsvd.calibrate import Positions, calibrate
from fxsvd.chained import alive, refit_chained
from fxsvd.coupling import Group
from fxsvd.dependency import Dependencies
from fxsvd.edits import Plan
from fxsvd.errors import PlanError
from fxsvd.fit import Fit, fit, own_output
from fxsvd.importance import require_numbers
from fxsvd.moments import Moment
from fxsvd.naming import Name
from fxsvd.narrowing import Narrowing
from fxsvd.progress import Say, quiet
from fxsvd.readers import Reader, readers
from fxsvd.selection import METHODS, Selection
from fxsvd.widths import (
    Ratio,
    as_plan,
    local_counts,
    require_multiple,
    require_ratio,
    rounded,
    wanted_ratios,
)

CHAININGS = ("parallel", "top-down", "bottom-up", "bottom-up+refit")


@dataclass(frozen=True)
class Select:
    """Keep the channels that reconstruct best, and refit their readers by least squares.

    Attributes:
        ratio: the fraction of channels removed, in [0, 1); or a mapping from name patterns to
            fractions (the first that matches a producer counts, other spaces stay).
        method: ``"backward"`` eliminates channels by their exact cost, ``"forward"`` adds them by
            their exact gain, ``"lasso"`` takes the support of a group lasso.
        chaining: ``"parallel"``: every layer is fitted to the original's inputs; ``"top-down"``: to
            the inputs that the compressed network gives it; ``"bottom-up"``: channels are chosen to
            reconstruct only the outputs that stay; ``"bottom-up+refit"``: chosen bottom-up, fitted
            top-down.
        debias: refit after the choice; without it the readers keep what their weights were (for
            the lasso: the shrunken coefficients).
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

    ratio: Ratio = 0.5
    method: Literal["backward", "forward", "lasso"] = "backward"
    chaining: Literal["parallel", "top-down", "bottom-up", "bottom-up+refit"] = "bottom-up+refit"
    debias: bool = True
    round_to: int = 1
    only: tuple[Name, ...] = ()
    ignore: tuple[Name, ...] = ()
    everywhere: bool = True
    positions: Positions = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        require_ratio(self.ratio)
        require_multiple(self.round_to)
        for value, known in ((self.method, tuple(METHODS)), (self.chaining, CHAININGS)):
            if value not in known:
                raise PlanError(f"there is no {value!r}; there are {known}")

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
        ratios, why = wanted_ratios(deps, self.ratio, self.only, self.ignore)
        found = {name: r for name, r in readers(deps).items() if not r.depthwise}
        live = [
            (g, share)
            for g in deps.groups
            if (share := float(ratios[deps.space_of[g.channels]].min())) > 0
        ]
        live, unread = _readable(deps, live, found)
        why |= unread
        touched = np.zeros(deps.channels.count + 1, dtype=bool)
        for group, _ in live:
            touched[group.channels] = True
        reading = {name: r for name, r in found.items() if touched[r.channels].any()}
        moments = calibrate(
            deps, data, layers=reading, positions=self.positions, seed=self.seed, say=say
        )
        kept = self._choose(deps, live, Selection(deps, reading, moments, self._bottom_up), say)
        plan = as_plan(deps, kept, why, "rounding or coupling leaves nothing to remove")
        fits = self._refit(deps, plan, found, moments, data, say) if self.debias else []
        return replace(
            plan,
            values=tuple(a for f in fits for a in f.assigns(deps.analysis.graph)),
            estimates=tuple(f.estimate("select") for f in fits),
        )

    @property
    def _bottom_up(self) -> bool:
        return self.chaining.startswith("bottom-up")

    def _choose(
        self,
        deps: Dependencies,
        live: list[tuple[Group, float]],
        selection: Selection,
        say: Say,
    ) -> np.ndarray:
        """Which channels stay, decided group by group."""
        for group, ratio in reversed(live) if self._bottom_up else live:
            say(f"selecting {deps.spaces[deps.space_of[group.channels[0]]].name}")
            scores = METHODS[self.method](selection, group, 1 - ratio)
            ranked = group.ranked(scores)
            steps = ranked[: local_counts([ranked], [ratio])[0]]
            for channels in steps[: rounded(steps, self.round_to, deps)]:
                selection.kept[channels] = False
        return selection.kept[:-1]

    def _refit(
        self,
        deps: Dependencies,
        plan: Plan,
        found: dict[str, Reader],
        moments: dict[str, Moment],
        data: Data,
        say: Say,
    ) -> list[Fit]:
        assert data is not None  # checked
        narrowing = Narrowing.of(deps, plan)
        loses = {n: r for n, r in found.items() if not alive(r, deps, narrowing).all()}
        if self.chaining in ("parallel", "bottom-up"):
            return [
                fit(r, own_output(r, moments[n]), alive(r, deps, narrowing))
                for n, r in loses.items()
            ]
        wanted = _downstream(deps, found, loses) if self.everywhere else loses
        return list(
            refit_chained(
                deps, narrowing, wanted, data, positions=self.positions, seed=self.seed, say=say
            )
        )


def _downstream(
    deps: Dependencies, found: dict[str, Reader], loses: dict[str, Reader]
) -> dict[str, Reader]:
    """The layers from the first that loses an input on, called once each."""
    first = {r.calls[0] for r in loses.values()}
    changed = set()
    for node in deps.analysis.graph.graph.nodes:
        if node in first or any(n in changed for n in node.all_input_nodes):
            changed.add(node)
    return {
        n: r
        for n, r in found.items()
        if n in loses or (len(r.calls) == 1 and r.calls[0] in changed)
    }


def _readable(
    deps: Dependencies, live: list[tuple[Group, float]], found: dict[str, Reader]
) -> tuple[list[tuple[Group, float]], dict[int, str]]:
    """Groups all of whose spaces some reader contracts; why the others stay."""
    read = np.zeros(deps.channels.count + 1, dtype=bool)
    for reader in found.values():
        read[reader.channels] = True
    read[-1] = False
    good = [(g, ratio) for g, ratio in live if read[g.channels].all()]
    bad = {
        int(i)
        for g, _ in live
        if not read[g.channels].all()
        for i in np.unique(deps.space_of[g.channels])
    }
    return good, dict.fromkeys(bad, "no layer that could be refitted reads it")
