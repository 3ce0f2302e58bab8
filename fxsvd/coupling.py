"""How many channels may go together: equal counts per group, head or gate.

Constraints ask that rows of atoms keep equally many. Channels that occur equally often in every row
of every constraint form *cells*; cells that share a constraint form a *group*. A group shrinks in
steps: with g the greatest common divisor of its cells' sizes, a step takes size/g channels from
every cell, whichever they are, so that every row loses the same share and all stay equally long.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fxsvd.relations import Atoms, Channels, Relations

Hashes = npt.NDArray[np.uint64]
Scores = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Cell:
    """Interchangeable channels of one space; ``step`` of them go at a time."""

    channels: Atoms
    step: int


@dataclass(frozen=True, eq=False)
class Group:
    """Cells that shrink together, in ``steps`` equal steps (one of which always stays)."""

    cells: tuple[Cell, ...]
    why: str = ""

    @property
    def steps(self) -> int:
        """How many steps there are to the empty group."""
        cell = self.cells[0]
        return len(cell.channels) // cell.step

    @property
    def channels(self) -> Atoms:
        """All channels of the group."""
        return np.concatenate([cell.channels for cell in self.cells])

    def ranked(self, scores: Scores) -> list[Atoms]:
        """The channels of each step, lowest scores first (of every cell the next lowest)."""
        parts = []
        for cell in self.cells:
            order = np.argsort(scores[cell.channels], kind="stable")
            parts.append(cell.channels[order].reshape(self.steps, cell.step))
        return list(np.concatenate(parts, axis=1))


def couple(relations: Relations, channels: Channels, signature: Hashes) -> list[Group]:
    """Group all channels.

    Args:
        relations: holds the equal-row constraints.
        channels: the solved classes.
        signature: one hash per channel; channels of different signature are never interchanged.
    """
    rng = np.random.default_rng(0)
    cell_hash = signature.copy()
    rows = [([channels.of[row] for row in constraint], why) for constraint, why in relations.rows]
    names = _random(rng, channels.count)
    rows = [(sets, why) for sets, why in rows if not _trivial(sets, names)]
    for sets, _ in rows:
        for channel_set in sets:
            np.add.at(cell_hash, channel_set, _random(rng, 1))
    for _, children in relations.nests:
        row = channels.of[children]
        several = row[(row != row[:, :1]).any(axis=1)]
        # Something stays of each row.
        np.add.at(cell_hash, several, _random(rng, len(several))[:, None])
    _, cell_of = np.unique(cell_hash, return_inverse=True)
    count = int(cell_of.max()) + 1 if len(cell_of) else 0
    component, reason = _components(count, cell_of, rows)
    return _groups(cell_of.astype(np.int64), component, reason)


def _random(rng: np.random.Generator, size: int) -> Hashes:
    return rng.integers(1, 1 << 63, size=size, dtype=np.uint64)


def _trivial(sets: Iterable[Atoms], names: Hashes) -> bool:
    """Whether all rows hold the same channels equally often: any choice keeps them equal."""
    return len({int(names[row].sum(dtype=np.uint64)) for row in sets}) == 1


def _components(
    count: int, cell_of: Atoms, rows: list[tuple[list[Atoms], str]]
) -> tuple[Atoms, dict[int, str]]:
    parent = np.arange(count)

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = int(parent[i])
        return i

    reason: dict[int, str] = {}
    for sets, why in rows:
        cells = np.unique(np.concatenate([cell_of[row] for row in sets])).tolist()
        first = root(cells[0])
        for cell in cells[1:]:
            parent[root(cell)] = first
        reason[first] = why
    component = np.array([root(i) for i in range(count)], dtype=np.int64)
    return component, {root(c): why for c, why in reason.items()}


def _groups(cell_of: Atoms, component: Atoms, reason: dict[int, str]) -> list[Group]:
    order = np.argsort(cell_of, kind="stable")
    edges = np.flatnonzero(np.diff(cell_of[order])) + 1
    members = np.split(order, edges)
    by_component: dict[int, list[Atoms]] = {}
    for cell, channels in enumerate(members):
        if len(channels):
            by_component.setdefault(int(component[cell]), []).append(channels)
    out = []
    for name, cells in by_component.items():
        divisor = int(np.gcd.reduce([len(c) for c in cells]))
        parts = sorted(cells, key=lambda c: int(c[0]))
        out.append(Group(tuple(Cell(c, len(c) // divisor) for c in parts), reason.get(name, "")))
    return sorted(out, key=lambda g: int(g.cells[0].channels[0]))
