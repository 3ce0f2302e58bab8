"""Slice: a narrower residual stream, rotated so that little of what its norms read is lost.

The norms' gains are folded into the maps behind them first; ``fxsvd.rotating.turning`` has the
mathematics, ``fxsvd.rotating.streams`` says what a stream is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from fxsvd.data.batches import Data
from fxsvd.dependency import Dependencies
from fxsvd.edits import Assign, Plan
from fxsvd.errors import PlanError
from fxsvd.importance import Scores, require_numbers
from fxsvd.naming import Names
from fxsvd.progress import Say, quiet
from fxsvd.rotating.streams import Stream, streams
from fxsvd.rotating.turning import encoder, second_moments, turn
from fxsvd.selecting.fit import Mask
from fxsvd.widths import (
    Ratio,
    anything,
    as_plan,
    lose_share,
    require_multiple,
    require_ratio,
    wanted_ratios,
)

WHY = "in the stream's new basis"


@dataclass(frozen=True)
class Slice:
    """Narrow every residual stream of pre-norm blocks (transformers) by a rotation.

    Attributes:
        ratio: the fraction of channels removed, in [0, 1); or a mapping from name patterns to
            fractions. With 0 the gains are folded and the stream is rotated: nothing is lost.
        round_to: widths become multiples of this.
        only: names, glob patterns or modules; a stream is meant by any of its producers.
        ignore: likewise, streams that stay.

    Raises:
        PlanError: an option is out of range.

    >>> Slice(ratio=0.25).round_to
    1
    """

    ratio: Ratio = 0.25
    round_to: int = 1
    only: Names = ()
    ignore: Names = ()

    def __post_init__(self) -> None:
        require_ratio(self.ratio)
        require_multiple(self.round_to)

    def propose(self, deps: Dependencies, data: Data = None, say: Say = quiet) -> Plan:
        """The plan; nothing is touched.

        Args:
            deps: what ``fxsvd.analyze`` found.
            data: batches of inputs, read once.
            say: is told how far it is.

        Raises:
            PlanError: there is no data, or a name means nothing.
        """
        if data is None:
            raise PlanError("Slice looks at activations: give compile(…, data=batches)")
        require_numbers(deps)
        found, kept, why = self._choose(deps)
        plan = as_plan(deps, kept, why, "rotated, with all its channels")
        say("watching norms")
        seen = second_moments(deps, found, data)
        values: dict[str, Tensor] = {}
        for stream, second in zip(found, seen, strict=True):
            width = int(kept[stream.space.channels].sum())
            turn(deps, stream, encoder(second, width, centred=stream.centred), width, values)
        return replace(
            plan,
            values=tuple(Assign(name, value, WHY, turned=True) for name, value in values.items()),
            exact=bool(found) and not plan.edits,
        )

    def _choose(self, deps: Dependencies) -> tuple[list[Stream], Mask, dict[int, str]]:
        every, reasons = streams(deps)
        numbers = {space.name: i for i, space in enumerate(deps.spaces)}
        _, unwanted = wanted_ratios(deps, anything(self.ratio), self.only, self.ignore)
        ratios, _ = wanted_ratios(deps, self.ratio, self.only, self.ignore)
        why = {numbers[name]: reason for name, reason in reasons.items()} | unwanted
        kept = np.ones(deps.channels.count, dtype=bool)
        found = [s for s in every if numbers[s.space.name] not in why]
        for stream in found:
            channels = stream.space.channels
            group = next(g for g in deps.groups if channels[0] in g.channels)
            scores: Scores = np.zeros(deps.channels.count)
            scores[channels] = np.arange(len(channels), 0, -1)
            ratio = float(ratios[numbers[stream.space.name]])
            lose_share(deps, kept, group, scores, ratio, self.round_to)
        return found, kept, why
