"""Which channels of a group go: ranked by a method, as many as a goal asks for.

An elimination or an addition nests its choices, so that one ranking answers for every width, and
one Cholesky factor gives the errors at all of them. The supports of a lasso need not nest: each
width is a problem of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from fxsvd.coupling import Group
from fxsvd.dependency import Dependencies
from fxsvd.importance import Scores
from fxsvd.linalg.elimination import backward_elimination, forward_selection
from fxsvd.linalg.lasso import group_lasso, largest_penalty, norms, support_of_width
from fxsvd.linalg.nested import errors_without
from fxsvd.linalg.reconstruction import Reconstruction
from fxsvd.relations import Atoms
from fxsvd.selecting.selection import Selection, stacked
from fxsvd.widths import local_counts

KKT = 1e-5
"""To what relative residual the lasso is solved where its penalty is given."""
Order = Callable[[list[Reconstruction], int], torch.Tensor]


def leaving(
    selection: Selection, group: Group, *, method: str, by: str, number: float
) -> list[Atoms]:
    """The steps of a group that go, the first to go first; one stays at least.

    Args:
        selection: what was chosen so far.
        group: the channels to choose from.
        method: a key of ``METHODS``.
        by: what the number is: ``"ratio"``, the share of steps that go; ``"penalty"``, relative to
            the least with which the lasso keeps nothing; ``"error"``, the largest relative error
            that any layer that reads the channels may have, refitted.
        number: see there.
    """
    if by == "penalty":
        return _without_weight(group, at_penalty(selection, group, number))
    if by == "error" and method == "lasso":
        return _bisected(selection, group, number)
    if by == "error":
        steps = group.ranked(METHODS[method](selection, group, 0.0))
        return steps[: _allowed(selection, steps, number)]
    steps = group.ranked(METHODS[method](selection, group, 1 - number))
    return steps[: local_counts([steps], [number])[0]]


def by_elimination(selection: Selection, group: Group, share: float) -> Scores:
    """Channels that go later score higher (those of the share that stays are not told apart)."""

    def order(problems: list[Reconstruction], width: int) -> torch.Tensor:
        return backward_elimination(problems, stop=max(1, int(share * width) - 1)).order

    return _ranked(selection, group, order)


def by_addition(selection: Selection, group: Group, share: float) -> Scores:
    """Channels that come earlier score higher."""
    return _ranked(
        selection, group, lambda problems, width: forward_selection(problems, width).flip(0)
    )


def _ranked(selection: Selection, group: Group, order: Order) -> Scores:
    scores: Scores = np.zeros(selection.deps.channels.count)
    for channels in _by_space(selection.deps, group):
        problems = selection.problems(channels)
        ranks = order(problems, len(channels)).cpu().numpy()
        scores[channels[ranks]] = np.arange(len(ranks))
    return scores


def by_lasso(selection: Selection, group: Group, share: float) -> Scores:
    """Channels of the support at the wanted width score 1, others 0."""
    scores: Scores = np.zeros(selection.deps.channels.count)
    for channels in _by_space(selection.deps, group):
        problem = stacked(selection.problems(channels))
        width = max(1, round(share * len(channels)))
        scores[channels] = support_of_width(problem, width).cpu().numpy()
    return scores


METHODS: dict[str, Callable[[Selection, Group, float], Scores]] = {
    "backward": by_elimination,
    "forward": by_addition,
    "lasso": by_lasso,
}


def at_penalty(selection: Selection, group: Group, share: float) -> Scores:
    """Norms of the lasso's coefficients, which the selection remembers.

    Args:
        selection: what was chosen so far.
        group: the channels to choose from.
        share: the penalty, relative to the least that empties a space.
    """
    scores: Scores = np.zeros(selection.deps.channels.count)
    for channels in _by_space(selection.deps, group):
        posed = selection.posed(channels)
        problem = stacked([part.problem for part in posed])
        penalty = share * largest_penalty(problem)
        m = group_lasso(problem, penalty, tolerance=KKT).m
        scores[channels] = norms(problem, m).cpu().numpy()
        selection.remember(posed, m)
    return scores


def _without_weight(group: Group, scores: Scores) -> list[Atoms]:
    """The steps none of whose channels scores."""
    steps = group.ranked(scores)
    return [step for step in steps[:-1] if not scores[step].any()]


def _bisected(selection: Selection, group: Group, limit: float) -> list[Atoms]:
    """As many steps as the lasso can spare within a limit on the error."""
    few, many = 0, group.steps - 1
    steps: list[Atoms] = []
    while few < many:
        count = (few + many + 1) // 2
        trial = group.ranked(by_lasso(selection, group, 1 - count / group.steps))
        if _allowed(selection, trial, limit) >= count:
            few, steps = count, trial[:count]
        else:
            many = count - 1
    return steps


def _allowed(selection: Selection, steps: list[Atoms], limit: float) -> int:
    """How many of the steps may go, the first first, before a reader's error passes the limit."""
    allowed = len(steps) - 1
    order = np.concatenate(steps)
    step_of = np.repeat(np.arange(len(steps)), [len(step) for step in steps])
    space = selection.deps.space_of[order]
    for s in np.unique(space):
        for problem in selection.problems(order[space == s]):
            over = np.flatnonzero(errors_without(problem).cpu().numpy() > limit)
            allowed = min(allowed, *step_of[space == s][over[:1]].tolist(), len(steps))
    return allowed


def _by_space(deps: Dependencies, group: Group) -> list[Atoms]:
    channels = group.channels
    space = deps.space_of[channels]
    return [channels[space == s] for s in np.unique(space)]
