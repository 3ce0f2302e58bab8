"""How wide the spaces get: a goal by name, equal shares or a global ranking, multiples, a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fxsvd.coupling import Group
from fxsvd.dependency import Dependencies
from fxsvd.edits import Plan, Remap, Skip
from fxsvd.errors import PlanError
from fxsvd.importance import Scores
from fxsvd.naming import Names, by_name, listed, spaces_named
from fxsvd.relations import Atoms

Ratio = float | Mapping[str, float]
Widths = int | Mapping[str, int]
BOUNDS = {
    "ratio": "the fraction removed, in [0, 1)",
    "width": "the number of channels kept, 1 or more",
    "penalty": "relative to the least that empties a space, in [0, 1]",
    "error": "the share of an output's variance that may be lost, in [0, 1)",
}


@dataclass(frozen=True)
class WidthGoal:
    """How wide spaces get, said in one way.

    Attributes:
        by: ``"ratio"``, ``"width"``, ``"penalty"`` or ``"error"``, see ``BOUNDS``.
        value: a number, or a mapping from name patterns to numbers.

    Raises:
        PlanError: a number is out of bounds.
    """

    by: str
    value: float | Mapping[str, float]

    @classmethod
    def of(cls, **options: float | Mapping[str, float] | None) -> WidthGoal:
        """The one option that is given.

        Raises:
            PlanError: none is, or several are, or its numbers are out of bounds.

        >>> WidthGoal.of(ratio=None, width=12)
        WidthGoal(by='width', value=12)
        """
        given = [(by, value) for by, value in options.items() if value is not None]
        if len(given) != 1:
            found = " and ".join(by for by, _ in given) or "none"
            raise PlanError(f"give exactly one of {', '.join(options)}: {found} was given")
        return cls(*given[0])

    def __post_init__(self) -> None:
        numbers = self.value.values() if isinstance(self.value, Mapping) else (self.value,)
        for number in numbers:
            if not self._fits(number):
                raise PlanError(f"{self.by} is {BOUNDS[self.by]}; got {number}")

    def _fits(self, number: float) -> bool:
        if self.by == "width":
            return number >= 1 and float(number).is_integer()
        return 0 <= number < 1 or (self.by == "penalty" and number == 1)

    def per_space(
        self, deps: Dependencies, only: Names, ignore: Names
    ) -> tuple[Scores, dict[int, str]]:
        """A number per space (0 where it stays; of a width the ratio), and why it is 0."""
        numbers, why = wanted_numbers(deps, self.value, only, ignore, self.by)
        if self.by != "width":
            return numbers, why
        have = np.array([space.width for space in deps.spaces] + [1])
        ratios: Scores = np.where(numbers > 0, 1 - numbers / have, 0.0).clip(min=0)
        wide = np.flatnonzero((numbers > 0) & (ratios == 0))
        return ratios, why | {int(i): "it is no wider than `width`" for i in wide}


def require_ratio(ratio: Ratio) -> None:
    """Raise unless every ratio is in [0, 1).

    Raises:
        PlanError: one is not.
    """
    WidthGoal("ratio", ratio)


def require_multiple(round_to: int) -> None:
    """Raise unless widths can be multiples of this.

    Raises:
        PlanError: it is not positive.
    """
    if round_to < 1:
        raise PlanError(f"round_to is a positive number of channels; got {round_to}")


def wanted_ratios(
    deps: Dependencies, ratio: Ratio, only: Names, ignore: Names
) -> tuple[Scores, dict[int, str]]:
    """A ratio per space, and why it is 0 where it is."""
    return wanted_numbers(deps, ratio, only, ignore, "ratio")


def anything(ratio: Ratio) -> Ratio:
    """Ratios with which every space that some pattern means counts, whatever its number is.

    >>> anything({"fc": 0.0}), anything(0.0)
    ({'fc': 0.5}, 0.5)
    """
    return dict.fromkeys(ratio, 0.5) if isinstance(ratio, Mapping) else 0.5


def wanted_numbers(
    deps: Dependencies,
    value: float | Mapping[str, float],
    only: Names,
    ignore: Names,
    option: str,
) -> tuple[Scores, dict[int, str]]:
    """A number per space, given for all or by name as an option, and why it is 0 where it is."""
    numbers: Scores = np.zeros(len(deps.spaces) + 1)
    if isinstance(value, Mapping):
        wanted: dict[int, float] = by_name(deps, value)
        why = f"no pattern of `{option}` matches it"
    else:
        wanted, why = dict.fromkeys(range(len(deps.spaces)), float(value)), f"{option} is 0"
    if listed(only):
        named = spaces_named(deps, only)
        wanted, why = {i: n for i, n in wanted.items() if i in named}, "not in `only`"
    ignored = spaces_named(deps, ignore)
    for i, number in wanted.items():
        numbers[i] = 0 if i in ignored else number
    stay = (i for i in range(len(deps.spaces)) if numbers[i] == 0)
    return numbers, {i: "in `ignore`" if i in ignored else why for i in stay}


def local_counts(ranked: list[list[Atoms]], ratios: list[float]) -> list[int]:
    """Every group takes its share of its steps, to the nearest."""
    return [
        min(int(ratio * len(steps) + 0.5), len(steps) - 1)
        for steps, ratio in zip(ranked, ratios, strict=True)
    ]


def global_counts(ranked: list[list[Atoms]], ratios: list[float], scores: Scores) -> list[int]:
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


def rounded(steps: list[Atoms], multiple: int, deps: Dependencies) -> int:
    """How many of the steps to take, so that every width is a multiple (or none)."""
    if multiple == 1 or not steps:
        return len(steps)
    touched, place = np.unique(deps.space_of[np.concatenate(steps)], return_inverse=True)
    gone = np.zeros((len(steps), len(touched)), dtype=np.int64)
    np.add.at(gone, (np.repeat(np.arange(len(steps)), [len(step) for step in steps]), place), 1)
    left = np.array([deps.spaces[i].width for i in touched]) - gone.cumsum(axis=0)
    fits = np.flatnonzero((left % multiple == 0).all(axis=1))
    return int(fits[-1]) + 1 if fits.size else 0


def lose_share(
    deps: Dependencies,
    kept: npt.NDArray[np.bool_],
    group: Group,
    scores: Scores,
    ratio: float,
    round_to: int,
) -> None:
    """Let a group lose its share of channels, those of the lowest scores.

    Args:
        deps: the analysis.
        kept: a bool per channel; changed in place.
        group: what loses channels, step by step.
        scores: a number per channel.
        ratio: the share.
        round_to: the widths that are left are multiples of this.
    """
    ranked = group.ranked(scores)
    steps = ranked[: local_counts([ranked], [ratio])[0]]
    for channels in steps[: rounded(steps, round_to, deps)]:
        kept[channels] = False


def as_plan(
    deps: Dependencies, counts: npt.NDArray[np.bool_ | np.int64], why: dict[int, str], left: str
) -> Plan:
    """A plan that keeps some channels of every space, or copies some.

    Args:
        deps: the analysis.
        counts: per channel, whether it stays, or how often it is there afterwards. (What counts
            rows is frozen, and follows these.)
        why: by a space's number, why it stays.
        left: why any other space that loses and gets nothing stays.
    """
    edits, skips = [], []
    for i, space in enumerate(deps.spaces):
        times = counts[space.channels].astype(np.int64)
        if not space.frozen and (times != 1).any():
            keep = np.repeat(np.arange(space.width), times)
            edits.append(Remap(space.name, space.width, tuple(keep.tolist())))
            continue
        reason = space.frozen or why.get(i) or left
        skips.append(Skip(space.name, space.width, reason))
    return Plan(tuple(edits), tuple(skips))
