"""Widen: more channels, and the same outputs at that moment."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import numpy as np
import torch

from fxsvd.coupling import Scores
from fxsvd.data.batches import Data
from fxsvd.dependency import Dependencies
from fxsvd.edits import Plan
from fxsvd.errors import PlanError
from fxsvd.growing.ends import opened
from fxsvd.growing.gradients import Prospects, prospects
from fxsvd.growing.inrows import in_heads, in_rows
from fxsvd.growing.ledger import Axis
from fxsvd.growing.marks import Mark
from fxsvd.growing.obstacles import obstacles, passable
from fxsvd.growing.pairs import paired
from fxsvd.growing.rows import Length
from fxsvd.growing.streams import Marks, normed_streams
from fxsvd.growing.values import Growth, Init
from fxsvd.heads import by_heads
from fxsvd.importance import magnitude, require_numbers
from fxsvd.naming import Names
from fxsvd.narrowing import Mask
from fxsvd.progress import Say, quiet
from fxsvd.relations import Atoms
from fxsvd.widening import Counts, Widening, whole_heads
from fxsvd.widths import Ratio, Widths, as_plan, wanted_numbers

INITS, LENGTHS = get_args(Init), get_args(Length)


@dataclass(frozen=True)
class Widen:
    """Give spaces more channels without changing what the network computes, to train it further.

    Every channel is copied at most as often as another one, those of large weights first; a copy
    lies beside its original. Streams that are tiles of each other (``repeat``) grow one by one; the
    tile becomes an index then. Where layer or RMS norms run over a residual stream, all that writes
    it is scaled such that they see the variance that they saw (``fxsvd.growing.streams``). Other
    spaces that a norm or statistic runs over can only be split, and only all of them as often.

    Args:
        ratio: how many channels come, relative to those that are there: 0.5 adds half again. For
            all spaces, or by name pattern, the first that matches counts.
        to: the width instead, likewise.
        init: ``"orthogonal"``: new rows orthogonal to those that are there, read by nobody yet
            (J. Dejaegher, *SVD evolutive CNN*, 2021, corrected to change nothing); ``"split"``:
            copies that share out what reads their original (Net2Net, Chen et al. 2016);
            ``"gradient"``: new channels that write zeros, read such that the gradient in them is
            largest (GradMax, Evci et al. 2022; see ``fxsvd.growing.gradients``), where nothing but
            what makes zeros of zeros lies between linear layers or convolutions.
        only: names, glob patterns or modules; a space is meant by any of its producers.
        ignore: likewise, spaces that stay.
        seed: of what is drawn.
        heads: copy whole attention heads instead of features inside every head.
        loss: for ``"gradient"``: ``loss(output, target)``.
        data: for ``"gradient"``: batches ``(inputs, target)``, the more the better.
        length: of new rows of ``"orthogonal"``: ``"typical"``, as those that are there (root mean
            square); ``"smallest"``, half their smallest singular value, the source's.

    Raises:
        PlanError: an option is out of range, or ``"gradient"`` lacks its loss or data.

    >>> Widen(ratio=0.5).init
    'orthogonal'
    """

    ratio: Ratio | None = None
    to: Widths | None = None
    init: Init = "orthogonal"
    only: Names = ()
    ignore: Names = ()
    seed: int = 0
    heads: bool = False
    loss: Any = None
    data: Iterable[Any] | None = field(default=None, compare=False)
    length: Length = "typical"

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.to is None):
            raise PlanError("give Widen either ratio= or to=")
        for name, known in (("init", INITS), ("length", LENGTHS)):
            if getattr(self, name) not in known:
                raise PlanError(f"there is no {name} {getattr(self, name)!r}; there are {known}")
        if self.init == "gradient" and (self.loss is None or self.data is None):
            raise PlanError("init='gradient' needs loss=(output, target) and data=batches")
        if self.init == "gradient" and self.heads:
            raise PlanError("init='gradient' grows features, not heads")
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
            data: not needed (``"gradient"`` has labelled data of its own).
            say: not needed.

        Raises:
            PlanError: a name means nothing, a weight is not finite, or there is no batch.
        """
        whole, deps = deps, deps.growing
        option = "ratio" if self.to is None else "to"
        numbers, why = wanted_numbers(deps, self._given, self.only, self.ignore, option)
        # Streams that are tiles of each other prefer the same channels: new ones run through them.
        scores = -magnitude(whole, 2)[deps.within(whole)]
        return self.copying(deps, self._counts(deps, numbers, scores), why)

    def copying(self, deps: Dependencies, counts: Counts, why: dict[int, str]) -> Plan:
        """The plan that copies each channel so often, as far as nothing notices.

        Args:
            deps: what ``fxsvd.analyze`` found, for growth (``deps.growing``).
            counts: by channel, how often it is to be there.
            why: by index of a space, why it stays, as far as that is known.

        Raises:
            PlanError: a weight is not finite, or there is no batch.
        """
        require_numbers(deps)
        whole = self._whole(deps)
        counts, why = counts[whole], dict(why)
        pairs = paired(deps) & ~in_heads(whole)  # the product over a copied head is its own
        marks = self._settle(deps, counts, pairs, whole, why)
        found = self._prospects(deps, counts, why) if self.init == "gradient" else None
        plan = as_plan(deps, counts, why, "its goal or coupling adds nothing")
        generator = torch.Generator().manual_seed(self.seed)
        plan = replace(plan, edits=tuple(in_rows(deps, edit, whole) for edit in plan.edits))
        widening = Widening(whole[deps.channels.of], counts)
        if found is not None:
            given = [(p.ends, p.first(_more(counts, p), generator)) for p in found]
            return replace(plan, values=tuple(opened(widening, given)), exact=True)
        growth = Growth(deps, widening, pairs, self.init, generator, self.length, marks)
        return replace(plan, values=tuple(growth.assigns()), exact=True)

    def _settle(
        self, deps: Dependencies, counts: Counts, pairs: Mask, whole: Atoms, why: dict[int, str]
    ) -> dict[Axis, Mark]:
        """Let stay what cannot grow; what becomes of the streams that norms run over."""
        alike = ~pairs & (self.init == "split")
        streams: dict[int, Marks] = {}
        refused: dict[int, str] = {}
        if self.init == "orthogonal":
            streams, refused = normed_streams(deps, passable(deps, counts, alike))
        why |= _settle(deps, counts, pairs, alike, streams, whole)
        why |= {i: f"{why[i]}; {reason}" for i, reason in refused.items() if i in why}
        return {axis: mark for marks in streams.values() for axis, mark in marks.items()}

    def _prospects(
        self, deps: Dependencies, counts: Counts, why: dict[int, str]
    ) -> list[Prospects]:
        """Of the spaces that grow; let others stay that would if they were known."""
        out = []
        for i, space in enumerate(deps.spaces):
            if (counts[space.channels] > 1).any():
                found = prospects(deps, space, self.loss, self.data or ())
                if isinstance(found, Prospects):
                    out.append(found)
                else:
                    why[i] = found
                    counts[space.channels] = 1
        return out

    def _whole(self, deps: Dependencies) -> Atoms:
        """By channel, itself, or the first of a head that is copied whole."""
        return whole_heads(deps, np.full(deps.channels.count, self.heads))

    def _counts(self, deps: Dependencies, numbers: Scores, scores: Scores) -> Counts:
        """How often each channel is to be there."""
        counts = np.ones(deps.channels.count, dtype=np.int64)
        have = np.array([space.width for space in deps.spaces] + [1])
        more = numbers if self.to is None else np.maximum(numbers / have - 1, 0) * (numbers > 0)
        for group in by_heads(deps) if self.heads else deps.groups:
            steps = group.ranked(scores)
            extra = int(float(more[deps.space_of[group.channels]].min()) * len(steps) + 0.5)
            counts[group.channels] += extra // len(steps)
            for channels in steps[: extra % len(steps)]:
                counts[channels] += 1
        return counts


def _more(counts: Counts, found: Prospects) -> int:
    """How many channels a space gets."""
    return int((counts[found.ends.space.channels] - 1).sum())


def _settle(
    deps: Dependencies,
    counts: Counts,
    pairs: Mask,
    alike: Mask,
    streams: Collection[int],
    whole: Atoms,
) -> dict[int, str]:
    """Let groups stay whose copies something would notice; by space, what it is."""
    why: dict[int, str] = {}
    rows = in_heads(whole)
    groups = by_heads(deps) if rows.any() else deps.groups
    unread = {c: reason for c, reason in _unread(deps, pairs).items() if not rows[c]}
    while met := {
        int(whole[channel]): reason
        for channel, reason in (unread | obstacles(deps, counts, alike, streams)).items()
        if counts[channel] > 1
    }:
        for group in groups:
            reason = next((met[c] for c in whole[group.channels].tolist() if c in met), None)
            if reason is not None:
                counts[group.channels] = 1
                counts[:] = counts[whole]
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
