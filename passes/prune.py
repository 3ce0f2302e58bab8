"""Prune: drop channels, keep every surviving value bit-identical.

The edit of each space is (E, D) = (Cᵀ, C) with a selector C, which commutes with everything that
acts per channel; see ``fxsvd.edits.Remap``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fxsvd import importance
from fxsvd.coupling import Group
from fxsvd.dead import Dead, dead_channels
from fxsvd.dependency import Dependencies
from fxsvd.edits import Plan, Remap, Skip
from fxsvd.errors import PlanError
from fxsvd.heads import HeadGroup, by_heads
from fxsvd.importance import Scores
from fxsvd.naming import Name, by_name, spaces_named
from fxsvd.relations import Atoms

Live = list[tuple[Group | HeadGroup, float]]
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
        heads: remove whole attention heads instead of features inside every head.

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
    heads: bool = False

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
        if self.criterion != "random":
            importance.require_numbers(deps)
        dead = dead_channels(deps) if self.criterion == "dead" else None
        groups = by_heads(deps) if self.heads else list(deps.groups)
        priced = [(g, float(ratios[deps.space_of[g.channels]].min())) for g in groups]
        live = [(g, ratio) for g, ratio in priced if ratio > 0]
        if live:
            for steps in self._choose(deps, live, dead):
                for channels in steps[: _rounded(steps, self.round_to, deps)]:
                    kept[channels] = False
        left = "no dead channels" if dead else "rounding or coupling leaves nothing to remove"
        plan = _as_plan(deps, kept, why, left)
        return replace(plan, shifts=dead.shifts(deps, ~kept)) if dead else plan

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

    def _choose(self, deps: Dependencies, live: Live, dead: Dead | None) -> list[list[Atoms]]:
        """The channels of the steps that each group takes, the first to go first."""
        if dead is not None:
            ranked = [g.ranked((~dead.channels).astype(np.float64)) for g, _ in live]
            return [[step for step in steps[:-1] if dead.channels[step].all()] for steps in ranked]
        scores = self._score(deps)
        ranked = [g.ranked(scores) for g, _ in live]
        ratios = [ratio for _, ratio in live]
        local = self.scope == "local"
        counts = _local(ranked, ratios) if local else _global(ranked, ratios, scores)
        return [steps[:count] for steps, count in zip(ranked, counts, strict=True)]

    def _score(self, deps: Dependencies) -> Scores:
        if self.criterion == "bn":
            return importance.norm_scale(deps)
        if self.criterion == "taylor":
            return importance.taylor(deps, self.loss, self.data)
        if self.criterion == "random":
            return importance.random(deps, self.seed)
        return importance.magnitude(deps, 1 if self.criterion == "l1" else 2)


def _local(ranked: list[list[Atoms]], ratios: list[float]) -> list[int]:
    """Every group takes its share of its steps, to the nearest."""
    return [
        min(int(ratio * len(steps) + 0.5), len(steps) - 1)
        for steps, ratio in zip(ranked, ratios, strict=True)
    ]


def _global(ranked: list[list[Atoms]], ratios: list[float], scores: Scores) -> list[int]:
    """Steps in ascending order of their mean score, relative to their group's, until enough go."""
    order: list[tuple[float, int, int]] = []
    wanted = 0.0
    for i, (steps, ratio) in enumerate(zip(ranked, ratios, strict=True)):
        price = np.array([scores[step].mean() for step in steps])
        price = np.maximum.accumulate(price / max(float(price.mean()), 1e-30))
        wanted += ratio * sum(map(len, steps))
        order += [(float(p), i, len(step)) for p, step in zip(price[:-1], steps, strict=False)]
    counts = [0] * len(ranked)
    for _, i, size in sorted(order):
        if wanted < size / 2:
            break
        counts[i] += 1
        wanted -= size
    return counts


def _rounded(steps: list[Atoms], multiple: int, deps: Dependencies) -> int:
    """How many of the steps to take, so that every width is a multiple (or none)."""
    if multiple == 1 or not steps:
        return len(steps)
    touched, place = np.unique(deps.space_of[np.concatenate(steps)], return_inverse=True)
    gone = np.zeros((len(steps), len(touched)), dtype=np.int64)
    np.add.at(gone, (np.repeat(np.arange(len(steps)), [len(step) for step in steps]), place), 1)
    left = np.array([deps.spaces[i].width for i in touched]) - gone.cumsum(axis=0)
    fits = np.flatnonzero((left % multiple == 0).all(axis=1))
    return int(fits[-1]) + 1 if fits.size else 0


def _as_plan(
    deps: Dependencies, kept: npt.NDArray[np.bool_], why: dict[int, str], left: str
) -> Plan:
    edits, skips = [], []
    for i, space in enumerate(deps.spaces):
        keep = np.flatnonzero(kept[space.channels])
        if len(keep) < space.width:
            edits.append(Remap(space.name, space.width, tuple(keep.tolist())))
            continue
        reason = space.frozen or why.get(i) or left
        skips.append(Skip(space.name, space.width, reason))
    return Plan(tuple(edits), tuple(skips))
