"""Prune: drop channels, keep every surviving value bit-identical.

The edit of each space is (E, D) = (Cᵀ, C) with a selector C, which commutes with everything that
acts per channel; see ``fxsvd.edits.Remap``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fxsvd import importance
from fxsvd.coupling import Cell, Group
from fxsvd.dead import dead_channels
from fxsvd.dependency import Dependencies
from fxsvd.edits import Plan, Remap, Skip
from fxsvd.errors import PlanError
from fxsvd.importance import Scores
from fxsvd.naming import Name, by_name, spaces_named

CRITERIA = ("l1", "l2", "bn", "taylor", "random", "dead")


@dataclass(frozen=True)
class Prune:
    """Drop the least important channels of every space.

    Attributes:
        ratio: the fraction of channels removed, in [0, 1); or a mapping from name patterns to
            fractions (the first that matches a producer counts, other spaces stay).
        criterion: ``"l1"``, ``"l2"`` (over all coupled tensors), ``"bn"`` (norm scales),
            ``"taylor"`` (needs ``loss`` and ``data``), ``"random"``, or ``"dead"`` (exactly
            removable channels, whatever the ratio).
        scope: ``"local"``: every space loses the ratio; ``"global"``: the least important channels
            of the whole network go.
        round_to: widths become multiples of this.
        only: names, glob patterns or modules; a space is meant by any of its producers.
        ignore: likewise, spaces that stay.
        loss: for ``"taylor"``: ``loss(output, target)``.
        data: for ``"taylor"``: batches ``(inputs, target)``.
        seed: for ``"random"``.

    Raises:
        PlanError: an option is out of range.

    >>> Prune(ratio=0.25, criterion="l1").ratio
    0.25
    """

    ratio: float | Mapping[str, float] = 0.5
    criterion: str = "l2"
    scope: Literal["local", "global"] = "local"
    round_to: int = 1
    only: tuple[Name, ...] = ()
    ignore: tuple[Name, ...] = ()
    loss: Any = None
    data: Iterable[Any] | None = field(default=None, compare=False)
    seed: int = 0

    def __post_init__(self) -> None:
        ratios = self.ratio.values() if isinstance(self.ratio, Mapping) else (self.ratio,)
        for ratio in ratios:
            if not 0 <= ratio < 1:
                raise PlanError(f"ratio is the fraction removed, in [0, 1); got {ratio}")
        if self.criterion not in CRITERIA:
            raise PlanError(f"unknown criterion {self.criterion!r}; there are {CRITERIA}")
        if self.scope not in ("local", "global"):
            raise PlanError(f"scope is 'local' or 'global', not {self.scope!r}")
        if self.round_to < 1:
            raise PlanError(f"round_to is a positive number of channels; got {self.round_to}")

    def propose(self, deps: Dependencies) -> Plan:
        """The plan; nothing is touched.

        Args:
            deps: what ``fxsvd.analyze`` found.

        Raises:
            PlanError: a name means nothing, a weight is not finite, or the criterion lacks data.
        """
        ratios, why = self._ratios(deps)
        kept = np.ones(deps.channels.count, dtype=bool)
        groups = [(g, float(ratios[deps.space_of[g.channels]].min())) for g in deps.groups]
        live = [(g, ratio) for g, ratio in groups if ratio > 0]
        if live:
            scores, counts = self._choose(deps, live)
            for (group, _), count in zip(live, counts, strict=True):
                _drop(kept, group, scores, _rounded(group, count, self.round_to, deps))
        return _as_plan(deps, kept, why)

    def _ratios(self, deps: Dependencies) -> tuple[Scores, dict[int, str]]:
        """A ratio per space, and why it is 0 where it is."""
        ratios: Scores = np.zeros(len(deps.spaces) + 1)
        if isinstance(self.ratio, Mapping):
            wanted: dict[int, float] = by_name(deps, self.ratio)
            why = "no pattern of `ratio` matches it"
        else:
            wanted, why = dict.fromkeys(range(len(deps.spaces)), float(self.ratio)), "ratio is 0"
        if self.only:
            named = spaces_named(deps, self.only)
            wanted, why = {i: r for i, r in wanted.items() if i in named}, "not in `only`"
        ignored = spaces_named(deps, self.ignore)
        for i, ratio in wanted.items():
            ratios[i] = 0 if i in ignored else ratio
        stay = (i for i in range(len(deps.spaces)) if ratios[i] == 0)
        return ratios, {i: "in `ignore`" if i in ignored else why for i in stay}

    def _choose(
        self, deps: Dependencies, live: list[tuple[Group, float]]
    ) -> tuple[Scores, list[int]]:
        """Scores per channel (low goes first) and how many steps each group takes."""
        if self.criterion == "dead":
            dead = dead_channels(deps)
            return (~dead).astype(np.float64), [_all_dead(group, dead) for group, _ in live]
        scores = self._score(deps)
        if self.scope == "global":
            return scores, _global(live, scores)
        return scores, [min(int(ratio * g.steps + 0.5), g.steps - 1) for g, ratio in live]

    def _score(self, deps: Dependencies) -> Scores:
        if self.criterion == "bn":
            return importance.norm_scale(deps)
        if self.criterion == "taylor":
            return importance.taylor(deps, self.loss, self.data)
        if self.criterion == "random":
            return importance.random(deps, self.seed)
        return importance.magnitude(deps, 1 if self.criterion == "l1" else 2)


def _all_dead(group: Group, dead: npt.NDArray[np.bool_]) -> int:
    counts = [int(dead[cell.channels].sum()) // cell.step for cell in group.cells]
    return min(*counts, group.steps - 1) if counts else 0


def _global(live: list[tuple[Group, float]], scores: Scores) -> list[int]:
    """Steps in ascending order of their mean score, relative to their group's, until enough go."""
    order = []
    wanted = 0.0
    for i, (group, ratio) in enumerate(live):
        wanted += ratio * len(group.channels)
        price = np.mean([_step_scores(cell, scores) for cell in group.cells], axis=0)
        price = price / max(float(price.mean()), 1e-30)
        weight = len(group.channels) // group.steps
        order += [(float(p), i, weight) for p in price[:-1]]
    counts = [0] * len(live)
    for _, i, weight in sorted(order):
        if wanted < weight:
            break
        counts[i] += 1
        wanted -= weight
    return counts


def _step_scores(cell: Cell, scores: Scores) -> Scores:
    ranked = np.sort(scores[cell.channels])
    means: Scores = ranked.reshape(-1, cell.step).mean(axis=1)
    return means


def _rounded(group: Group, count: int, multiple: int, deps: Dependencies) -> int:
    """The largest number of steps up to ``count`` that leaves every width a multiple."""
    widths: dict[int, tuple[int, int]] = {}
    for cell in group.cells:
        space = int(deps.space_of[cell.channels[0]])
        width, step = widths.get(space, (0, 0))
        widths[space] = width + len(cell.channels), step + cell.step
    fits = (
        n
        for n in range(count, 0, -1)
        if all((width - n * step) % multiple == 0 for width, step in widths.values())
    )
    return next(fits, 0)


def _drop(kept: npt.NDArray[np.bool_], group: Group, scores: Scores, count: int) -> None:
    for cell in group.cells:
        worst = np.argsort(scores[cell.channels], kind="stable")[: count * cell.step]
        kept[cell.channels[worst]] = False


def _as_plan(deps: Dependencies, kept: npt.NDArray[np.bool_], why: dict[int, str]) -> Plan:
    edits, skips = [], []
    for i, space in enumerate(deps.spaces):
        keep = np.flatnonzero(kept[space.channels])
        if len(keep) < space.width:
            edits.append(Remap(space.name, space.width, tuple(keep.tolist())))
            continue
        reason = space.frozen or why.get(i) or "rounding or coupling leaves nothing to remove"
        skips.append(Skip(space.name, space.width, reason))
    return Plan(tuple(edits), tuple(skips))
