"""How wide the spaces get: ratios by name, equal shares or a global ranking, multiples, a plan."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from fxsvd.dependency import Dependencies
from fxsvd.edits import Plan, Remap, Skip
from fxsvd.errors import PlanError
from fxsvd.importance import Scores
from fxsvd.naming import Name, by_name, spaces_named
from fxsvd.relations import Atoms

Ratio = float | Mapping[str, float]


def require_ratio(ratio: Ratio) -> None:
    """Raise unless every ratio is in [0, 1).

    Raises:
        PlanError: one is not.
    """
    for value in ratio.values() if isinstance(ratio, Mapping) else (ratio,):
        if not 0 <= value < 1:
            raise PlanError(f"ratio is the fraction removed, in [0, 1); got {value}")


def require_multiple(round_to: int) -> None:
    """Raise unless widths can be multiples of this.

    Raises:
        PlanError: it is not positive.
    """
    if round_to < 1:
        raise PlanError(f"round_to is a positive number of channels; got {round_to}")


def wanted_ratios(
    deps: Dependencies, ratio: Ratio, only: tuple[Name, ...], ignore: tuple[Name, ...]
) -> tuple[Scores, dict[int, str]]:
    """A ratio per space, and why it is 0 where it is."""
    ratios: Scores = np.zeros(len(deps.spaces) + 1)
    if isinstance(ratio, Mapping):
        wanted: dict[int, float] = by_name(deps, ratio)
        why = "no pattern of `ratio` matches it"
    else:
        wanted, why = dict.fromkeys(range(len(deps.spaces)), float(ratio)), "ratio is 0"
    if only:
        named = spaces_named(deps, only)
        wanted, why = {i: r for i, r in wanted.items() if i in named}, "not in `only`"
    ignored = spaces_named(deps, ignore)
    for i, share in wanted.items():
        ratios[i] = 0 if i in ignored else share
    stay = (i for i in range(len(deps.spaces)) if ratios[i] == 0)
    return ratios, {i: "in `ignore`" if i in ignored else why for i in stay}


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


def as_plan(
    deps: Dependencies, kept: npt.NDArray[np.bool_], why: dict[int, str], left: str
) -> Plan:
    """A plan that keeps some channels of every space.

    Args:
        deps: the analysis.
        kept: a bool per channel.
        why: by a space's number, why it stays.
        left: why any other space that loses nothing stays.
    """
    edits, skips = [], []
    for i, space in enumerate(deps.spaces):
        keep = np.flatnonzero(kept[space.channels])
        if len(keep) < space.width:
            edits.append(Remap(space.name, space.width, tuple(keep.tolist())))
            continue
        reason = space.frozen or why.get(i) or left
        skips.append(Skip(space.name, space.width, reason))
    return Plan(tuple(edits), tuple(skips))
