"""Widen: more channels, and the same outputs at that moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from fxsvd.data.batches import Data
from fxsvd.dependency import Dependencies
from fxsvd.edits import Plan
from fxsvd.errors import PlanError
from fxsvd.growing.obstacles import obstacles
from fxsvd.growing.pairs import paired
from fxsvd.growing.values import Growth, Init
from fxsvd.importance import magnitude, require_numbers
from fxsvd.naming import Names
from fxsvd.narrowing import Mask
from fxsvd.progress import Say, quiet
from fxsvd.widening import Counts, Widening
from fxsvd.widths import Ratio, Widths, as_plan, wanted_numbers

INITS = ("orthogonal", "split")


@dataclass(frozen=True)
class Widen:
    """Give spaces more channels without changing what the network computes, to train it further.

    Every channel is copied at most as often as another one, those of large weights first; a copy
    lies beside its original. Spaces that a norm or statistic runs over (layer norm, group norm)
    can only be split, and only all of them as often.

    Args:
        ratio: how many channels come, relative to those that are there: 0.5 adds half again. For
            all spaces, or by name pattern, the first that matches counts.
        to: the width instead, likewise.
        init: ``"orthogonal"``: new rows orthogonal to those that are there, read by nobody yet
            (J. Dejaegher, *SVD evolutive CNN*, 2021, corrected to change nothing); ``"split"``:
            copies that share out what reads their original (Net2Net, Chen et al. 2016).
        only: names, glob patterns or modules; a space is meant by any of its producers.
        ignore: likewise, spaces that stay.
        seed: of what is drawn.

    Raises:
        PlanError: an option is out of range.

    >>> Widen(ratio=0.5).init
    'orthogonal'
    """

    ratio: Ratio | None = None
    to: Widths | None = None
    init: Init = "orthogonal"
    only: Names = ()
    ignore: Names = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.to is None):
            raise PlanError("give Widen either ratio= or to=")
        if self.init not in INITS:
            raise PlanError(f"there is no init {self.init!r}; there are {INITS}")
        given = self._given
        for number in given.values() if isinstance(given, Mapping) else (given,):
            if not number >= 0 or (self.to is not None and number != int(number)):
                raise PlanError(f"ratio is 0 or more, `to` a number of channels; got {number}")

    @property
    def _given(self) -> float | Mapping[str, float]:
        given = self.ratio if self.ratio is not None else self.to
        assert given is not None  # see __post_init__
        return given

    def propose(self, deps: Dependencies, data: Data = None, say: Say = quiet) -> Plan:
        """The plan; nothing is touched.

        Args:
            deps: what ``fxsvd.analyze`` found.
            data: not needed.
            say: not needed.

        Raises:
            PlanError: a name means nothing, or a weight is not finite.
        """
        require_numbers(deps)
        option = "ratio" if self.to is None else "to"
        numbers, why = wanted_numbers(deps, self._given, self.only, self.ignore, option)
        pairs = paired(deps)
        counts = self._counts(deps, numbers)
        why |= _settle(deps, counts, pairs, ~pairs & (self.init == "split"))
        plan = as_plan(deps, counts, why, "its goal or coupling adds nothing")
        generator = torch.Generator().manual_seed(self.seed)
        growth = Growth(deps, Widening(deps.channels.of, counts), pairs, self.init, generator)
        return replace(plan, values=tuple(growth.assigns()), exact=True)

    def _counts(self, deps: Dependencies, numbers: np.ndarray) -> Counts:
        """How often each channel is to be there."""
        counts = np.ones(deps.channels.count, dtype=np.int64)
        have = np.array([space.width for space in deps.spaces] + [1])
        more = numbers if self.to is None else np.maximum(numbers / have - 1, 0) * (numbers > 0)
        scores = -magnitude(deps, 2)
        for group in deps.groups:
            steps = group.ranked(scores)
            extra = int(float(more[deps.space_of[group.channels]].min()) * len(steps) + 0.5)
            counts[group.channels] += extra // len(steps)
            for channels in steps[: extra % len(steps)]:
                counts[channels] += 1
        return counts


def _settle(deps: Dependencies, counts: Counts, pairs: Mask, alike: Mask) -> dict[int, str]:
    """Let groups stay whose copies something would notice; by space, what it is."""
    why: dict[int, str] = {}
    unread = _unread(deps, pairs)
    while met := {
        channel: reason
        for channel, reason in (unread | obstacles(deps, counts, alike)).items()
        if counts[channel] > 1
    }:
        for group in deps.groups:
            reason = next((met[c] for c in group.channels.tolist() if c in met), None)
            if reason is not None:
                counts[group.channels] = 1
                why |= dict.fromkeys(deps.space_of[group.channels].tolist(), reason)
    return why


def _unread(deps: Dependencies, pairs: Mask) -> dict[int, str]:
    """Channels whose copies nothing could leave out of account."""
    read = np.zeros(len(pairs), dtype=bool)
    for space in deps.spaces:
        read[space.channels] = bool(space.consumers)
    nobody = "nothing that could leave copies out of account reads it"
    both = "its channels are factors of a product, and are read by a layer as well"
    out = dict.fromkeys(np.flatnonzero(~read & ~pairs).tolist(), nobody)
    return out | dict.fromkeys(np.flatnonzero(read & pairs).tolist(), both)
