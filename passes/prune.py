"""Prune: drop channels, keep every surviving value bit-identical.

The edit of each space is (E, D) = (Cᵀ, C) with a selector C, which commutes with everything that
acts per channel; see ``fxsvd.edits.Remap``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from fxsvd import importance
from fxsvd.coupling import Group
from fxsvd.data.batches import Data
from fxsvd.data.gradients import gradients
from fxsvd.dead import Dead, dead_channels
from fxsvd.dependency import Dependencies
from fxsvd.edits import Plan
from fxsvd.errors import PlanError
from fxsvd.heads import HeadGroup, by_heads
from fxsvd.importance import Scores
from fxsvd.naming import Names
from fxsvd.progress import Say, quiet
from fxsvd.relations import Atoms
from fxsvd.widths import (
    Ratio,
    as_plan,
    global_counts,
    local_counts,
    require_multiple,
    require_ratio,
    rounded,
    wanted_ratios,
)

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

    ratio: Ratio = 0.5
    criterion: str = "l2"
    scope: Literal["local", "global"] = "local"
    round_to: int = 1
    only: Names = ()
    ignore: Names = ()
    loss: Any = None
    data: Iterable[Any] | None = field(default=None, compare=False)
    seed: int = 0
    heads: bool = False

    def __post_init__(self) -> None:
        require_ratio(self.ratio)
        if self.criterion not in CRITERIA:
            raise PlanError(f"unknown criterion {self.criterion!r}; there are {CRITERIA}")
        if self.scope not in ("local", "global"):
            raise PlanError(f"scope is 'local' or 'global', not {self.scope!r}")
        require_multiple(self.round_to)

    def propose(self, deps: Dependencies, data: Data = None, say: Say = quiet) -> Plan:
        """The plan; nothing is touched.

        Args:
            deps: what ``fxsvd.analyze`` found.
            data: not needed (``"taylor"`` has labelled data of its own).
            say: not needed.

        Raises:
            PlanError: a name means nothing, a weight is not finite, or the criterion lacks data.
        """
        ratios, why = wanted_ratios(deps, self.ratio, self.only, self.ignore)
        kept = np.ones(deps.channels.count, dtype=bool)
        if self.criterion != "random":
            importance.require_numbers(deps)
        dead = dead_channels(deps) if self.criterion == "dead" else None
        groups = by_heads(deps) if self.heads else list(deps.groups)
        priced = [(g, float(ratios[deps.space_of[g.channels]].min())) for g in groups]
        live = [(g, ratio) for g, ratio in priced if ratio > 0]
        if live:
            for steps in self._choose(deps, live, dead):
                for channels in steps[: rounded(steps, self.round_to, deps)]:
                    kept[channels] = False
        left = "no dead channels" if dead else "rounding or coupling leaves nothing to remove"
        plan = as_plan(deps, kept, why, left)
        return replace(plan, values=dead.shifts(deps, ~kept)) if dead else plan

    def _choose(self, deps: Dependencies, live: Live, dead: Dead | None) -> list[list[Atoms]]:
        """The channels of the steps that each group takes, the first to go first."""
        if dead is not None:
            ranked = [g.ranked((~dead.channels).astype(np.float64)) for g, _ in live]
            return [[step for step in steps[:-1] if dead.channels[step].all()] for steps in ranked]
        scores = self._score(deps)
        ranked = [g.ranked(scores) for g, _ in live]
        ratios = [ratio for _, ratio in live]
        local = self.scope == "local"
        counts = local_counts(ranked, ratios) if local else global_counts(ranked, ratios, scores)
        return [steps[:count] for steps, count in zip(ranked, counts, strict=True)]

    def _score(self, deps: Dependencies) -> Scores:
        if self.criterion == "bn":
            return importance.norm_scale(deps)
        if self.criterion == "taylor":
            return self._taylor(deps)
        if self.criterion == "random":
            return importance.random(deps, self.seed)
        return importance.magnitude(deps, 1 if self.criterion == "l1" else 2)

    def _taylor(self, deps: Dependencies) -> Scores:
        if self.loss is None or self.data is None:
            raise PlanError(
                "criterion='taylor' needs loss=(output, target) -> scalar and data=batches"
            )
        graph = deps.analysis.graph
        wanted = [p for p in graph.parameters() if p.requires_grad]
        found = gradients(graph, wanted, self.loss, self.data)
        return importance.taylor(deps, dict(zip(map(id, wanted), found, strict=True)))
