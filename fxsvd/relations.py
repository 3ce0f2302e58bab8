"""Relations between atoms: who lives and dies together, who stays, which rows are equally long.

An *atom* is an integer that stands for one index of one axis. Rules only append relations, in
vectorised form; ``solve`` merges the equalities into classes (*channels*) once, at the end.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Atoms = npt.NDArray[np.int64]


@dataclass(eq=False)
class Relations:
    """A store of relations between atoms, filled by the rules.

    >>> relations = Relations()
    >>> a, b = relations.fresh(3), relations.fresh(3)
    >>> relations.unify(a, b)
    >>> relations.freeze(a[:1], "network output")
    >>> channels = relations.solve()
    >>> channels.of[b].tolist(), channels.reasons
    ([0, 1, 2], {0: 'network output'})
    """

    count: int = 0
    equal: list[tuple[Atoms, Atoms]] = field(default_factory=list)
    frozen: list[tuple[Atoms, str]] = field(default_factory=list)
    rows: list[tuple[tuple[Atoms, ...], str]] = field(default_factory=list)
    nests: list[tuple[Atoms, Atoms]] = field(default_factory=list)

    def fresh(self, *shape: int) -> Atoms:
        """New atoms, unrelated to any other, in an array of the given shape."""
        size = int(np.prod(shape))
        start, self.count = self.count, self.count + size
        return np.arange(start, self.count, dtype=np.int64).reshape(shape)

    def unify(self, a: Atoms, b: Atoms) -> None:
        """Index by index, ``a`` and ``b`` (broadcast together) live and die together."""
        if a is b:
            return
        a, b = np.broadcast_arrays(a, b)
        self.equal.append((a.ravel(), b.ravel()))

    def freeze(self, atoms: Atoms, reason: str) -> None:
        """None of the atoms may go, for a reason in words."""
        self.frozen.append((atoms.ravel(), reason))

    def equal_rows(self, rows: tuple[Atoms, ...] | Atoms, reason: str) -> None:
        """The rows keep equal shares of their atoms, each counted as often as it occurs."""
        self.rows.append((tuple(row.ravel() for row in rows), reason))

    def nest(self, parents: Atoms, children: Atoms) -> None:
        """``parents[i]`` lives exactly while any atom of ``children[i]`` does."""
        self.nests.append((parents.ravel(), children.reshape(parents.size, -1)))

    def solve(self) -> Channels:
        """Merge the equalities into channels and spread the reasons over them."""
        labels = _components(self.count, self.equal)
        roots, of = np.unique(labels, return_inverse=True)
        of = of.astype(np.int64)
        reasons: dict[int, str] = {}
        for atoms, reason in self.frozen:
            for channel in np.unique(of[atoms]).tolist():
                reasons.setdefault(channel, reason)
        return Channels(len(roots), of, reasons)


@dataclass(frozen=True, eq=False)
class Channels:
    """The solution: ``of[atom]`` is the atom's channel, in order of first appearance."""

    count: int
    of: Atoms
    reasons: dict[int, str]


def _components(count: int, edges: list[tuple[Atoms, Atoms]]) -> Atoms:
    """Smallest atom of each atom's connected component (hooking and pointer jumping)."""
    label = np.arange(count, dtype=np.int64)
    if not edges:
        return label
    a = np.concatenate([pair[0] for pair in edges])
    b = np.concatenate([pair[1] for pair in edges])
    while a.size:
        low, high = np.minimum(label[a], label[b]), np.maximum(label[a], label[b])
        open_edges = low != high
        a, b, low, high = a[open_edges], b[open_edges], low[open_edges], high[open_edges]
        np.minimum.at(label, high, low)
        label = _jump(label)
    return label


def _jump(label: Atoms) -> Atoms:
    while True:
        above = label[label]
        if np.array_equal(above, label):
            return label
        label = above
