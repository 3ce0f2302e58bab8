"""Policies: what to do to a network in training, and when. They decide; the ``Evolver`` does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor, fx

from fxsvd.compile import Pass
from fxsvd.dependency import Dependencies, analyze
from fxsvd.errors import PlanError
from fxsvd.evolving.spectra import spectrum
from fxsvd.naming import Names, spaces_named
from fxsvd.passes import Shrink, Widen
from fxsvd.spaces import Space


def require_passes(asked: Any) -> Sequence[Pass]:
    """What a policy asked for, if it is passes.

    Raises:
        PlanError: it is something else.

    >>> require_passes([Shrink(0.5)])[0].ratio
    0.5
    >>> require_passes(Shrink(0.5))
    Traceback (most recent call last):
    fxsvd.errors.PlanError: a policy returns a sequence of passes, such as (Shrink(0.5),), or () ...
    """
    if not isinstance(asked, Sequence) or isinstance(asked, str):
        raise PlanError(
            "a policy returns a sequence of passes, such as (Shrink(0.5),), or () where there is "
            f"nothing to do; it returned {asked!r}"
        )
    for options in asked:
        if isinstance(options, type) or not callable(getattr(options, "propose", None)):
            raise PlanError(
                f"{options!r} is no pass: give an instance of one of fxsvd.passes, such as "
                "Shrink(0.5), or of a class that has its `propose`"
            )
    return asked


@dataclass(frozen=True)
class Schedule:
    """Says beforehand what to do when.

    Attributes:
        passes: by the number of a step.

    Raises:
        PlanError: under some step there is something else than a sequence of passes.

    >>> Schedule({10: (Shrink(ratio=0.25),)})(None, 10)
    (Shrink(ratio=0.25, round_to=1, only=(), ignore=()),)
    """

    passes: dict[int, Sequence[Pass]]

    def __post_init__(self) -> None:
        for asked in self.passes.values():
            require_passes(asked)

    def __call__(self, network: fx.GraphModule | None, step: int) -> Sequence[Pass]:
        """What to do at a step."""
        return self.passes.get(step, ())


@dataclass(frozen=True)
class Spectral:
    """Widths follow the spectra of the weights (J. Dejaegher, *SVD evolutive CNN*, 2021).

    A space whose writers have small singular values loses as many channels: the largest i such that
    the i smallest add up to less than ``prune_below`` of all. One whose smallest is above
    ``grow_above`` of all gets more.

    Attributes:
        prune_below: relative to the sum of the singular values.
        grow_above: likewise; infinity: never.
        scale: ``"energy"``: as said; ``"width"``: both thresholds are relative to the mean singular
            value instead (the source's criterion for CIFAR-10).
        grow_by: how many channels come, relative to those that are there; at least one.
        most: of a space's channels go at a time.
        only: spaces that may change; all where there is none.
        ignore: spaces that stay.

    Raises:
        PlanError: a number is out of range.

    >>> Spectral(prune_below=5e-3, grow_above=1e-2).scale
    'energy'
    """

    prune_below: float = 5e-3
    grow_above: float = float("inf")
    scale: Literal["energy", "width"] = "energy"
    grow_by: float = 0.05
    most: float = 0.5
    only: Names = ()
    ignore: Names = ()

    def __post_init__(self) -> None:
        if not 0 <= self.prune_below <= self.grow_above:
            raise PlanError("prune_below is at most grow_above, and neither is negative")
        if not 0 <= self.most < 1 or self.grow_by < 0:
            raise PlanError("`most` is in [0, 1), `grow_by` 0 or more")

    def __call__(self, network: fx.GraphModule, step: int) -> Sequence[Pass]:
        """What the spectra ask for now."""
        deps = analyze(network)
        told, grown = list(self._told(deps)), deps.growing
        apart = told if grown is deps else self._told(grown)
        fewer = {s.name: n for s, values in told if (n := self._fewer(s, values))}
        shrinks = np.array([space.name in fewer for space in deps.spaces] + [False])
        going = shrinks[deps.space_of[grown.within(deps)]]  # -1, no space: the last, which stays
        more = {
            s.name: s.width + max(1, int(self.grow_by * s.width))
            for s, values in apart
            if not going[s.channels].any() and self._full(s, values)
        }
        out: list[Pass] = [Shrink(ratio=fewer, only=self.only)] if fewer else []
        return [*out, Widen(to=more, only=self.only, length="smallest")] if more else out

    def _told(self, deps: Dependencies) -> Iterator[tuple[Space, Tensor]]:
        """Spaces that may change, and their singular values."""
        ignored = spaces_named(deps, self.ignore)
        for i, space in enumerate(deps.spaces):
            if space.frozen is None and i not in ignored:
                values = spectrum(deps, space)
                if len(values) and not bool(values.isnan().any()):
                    yield space, values

    def _fewer(self, space: Space, values: Tensor) -> float:
        """The share of channels that say little."""
        missing = space.width - len(values)  # directions that the writers do not even have
        weak = values.flip(0).cumsum(0) < self.prune_below * self._whole(space, values)
        small = int(weak.sum()) + missing
        return min(small, int(self.most * space.width)) / space.width

    def _full(self, space: Space, values: Tensor) -> bool:
        """Whether no direction is missing, and even the weakest says much."""
        least = self.grow_above * self._whole(space, values)
        return len(values) == space.width and float(values[-1]) > least

    def _whole(self, space: Space, values: Tensor) -> float:
        return float(values.sum()) / (space.width if self.scale == "width" else 1)
