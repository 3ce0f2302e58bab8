"""Whole rows that can go: attention heads, and groups of channels that are read row by row.

A row of a tensor ``[heads, features]`` lives while any of its features does
(``Relations.nest``). All rows that hang on one index, in queries, keys, values and biases alike,
form a *head*; heads of one tensor form a family.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fxsvd.coupling import Group, Scores
from fxsvd.dependency import Dependencies
from fxsvd.relations import Atoms


@dataclass(frozen=True, eq=False)
class HeadGroup:
    """Heads that can go one by one; at least one stays."""

    heads: tuple[Atoms, ...]

    @property
    def steps(self) -> int:
        """The number of heads."""
        return len(self.heads)

    @property
    def channels(self) -> Atoms:
        """All channels of all heads."""
        return np.concatenate(self.heads)

    def ranked(self, scores: Scores) -> list[Atoms]:
        """The channels of each head, the head with the lowest sum of scores first."""
        return sorted(self.heads, key=lambda head: float(scores[head].sum()))


def by_heads(deps: Dependencies) -> list[Group | HeadGroup]:
    """The groups of a network, heads in place of the features inside them where they can go."""
    families = _families(deps)
    taken = np.zeros(deps.channels.count, dtype=bool)
    for family in families:
        taken[family.channels] = True
    rest = [group for group in deps.groups if not taken[group.channels].any()]
    return [*families, *rest]


def _families(deps: Dependencies) -> list[HeadGroup]:
    live = np.zeros(deps.channels.count, dtype=bool)
    for group in deps.groups:
        live[group.channels] = True
    rows: dict[int, set[int]] = {}
    family: dict[int, int] = {}
    for number, (parents, children) in enumerate(deps.analysis.relations.nests):
        above, below = deps.channels.of[parents], deps.channels.of[children]
        if len(parents) > 1 and not any(int(p) in deps.channels.reasons for p in above):
            for parent, row in zip(above.tolist(), below, strict=True):
                rows.setdefault(parent, set()).update(row.tolist())
                family.setdefault(parent, number)
    merged = _merge(rows)
    heads: dict[int, dict[frozenset[int], Atoms]] = {}
    for parent, members in merged.items():
        head = np.array(sorted(members), dtype=np.int64)
        if live[head].all() and _whole(deps, head):
            heads.setdefault(family[parent], {})[frozenset(members)] = head
    return _disjoint(heads)


def _merge(rows: dict[int, set[int]]) -> dict[int, set[int]]:
    """Rows that share a channel are one head."""
    owner: dict[int, int] = {}
    merged = {parent: set(row) for parent, row in rows.items()}
    alias = {parent: parent for parent in rows}

    def root(parent: int) -> int:
        while alias[parent] != parent:
            parent = alias[parent]
        return parent

    for parent, row in rows.items():
        for channel in row:
            other = root(owner.setdefault(channel, parent))
            mine = root(parent)
            if other != mine:
                merged[other] |= merged.pop(mine)
                alias[mine] = other
    return {parent: merged[root(parent)] for parent in rows}


def _whole(deps: Dependencies, head: Atoms) -> bool:
    """Whether every row that must stay as long as others goes whole, or not at all.

    A row whose number is frozen (a group of a convolution, say) must not go whole.
    """
    gone, frozen = np.zeros((2, deps.channels.count), dtype=bool)
    gone[head] = True
    frozen[list(deps.channels.reasons)] = True
    for parents, children in deps.analysis.relations.nests:
        if (frozen[deps.channels.of[parents]] & gone[deps.channels.of[children]].all(axis=1)).any():
            return False
    for rows, _ in deps.analysis.relations.rows:
        for row in rows:
            hit = gone[deps.channels.of[row]]
            if hit.any() and not hit.all():
                return False
    return True


def _disjoint(heads: dict[int, dict[frozenset[int], Atoms]]) -> list[HeadGroup]:
    """Each head once, in the first family that has it; a family of one head stays."""
    seen: set[frozenset[int]] = set()
    out = []
    for family in heads.values():
        own = {key: head for key, head in family.items() if key not in seen}
        seen |= own.keys()
        if len(own) > 1:
            out.append(HeadGroup(tuple(own.values())))
    return out
