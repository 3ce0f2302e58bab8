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

    Attributes:
        count: how many atoms there are.
        equal: atoms that live and die together, pair by pair.
        frozen: atoms that stay, and why.
        lengths: rows that keep equal shares, and why.
        rows: those of them that matter; see ``solve``.
        nests: see ``nest``.
        given: see ``found``.
        growing: whether channels only come: then copies may have other fates than their originals.
        copies: see ``copied``.

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
    lengths: list[tuple[tuple[Atoms, ...] | Atoms, str]] = field(default_factory=list)
    rows: list[tuple[tuple[Atoms, ...], str]] = field(default_factory=list)
    nests: list[tuple[Atoms, Atoms]] = field(default_factory=list)
    given: list[Atoms] = field(default_factory=list)
    growing: bool = False
    copies: list[tuple[Atoms, Atoms]] = field(default_factory=list)

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

    def found(self, *shape: int) -> Atoms:
        """New atoms for values that are there and that no parameter writes."""
        new = self.fresh(*shape)
        self.given.append(new)
        return new

    def copied(self, atoms: Atoms) -> Atoms:
        """New atoms for a vector that is gathered from others.

        They live and die with those; but they need not grow with them, since an index can go on
        reading what it read, and read it twice. So where the store is for growth, they do not.

        >>> relations = Relations()
        >>> a = relations.fresh(2)
        >>> b = relations.copied(a[[0, 1, 0]])
        >>> relations.solve().of[b].tolist(), relations.originals(b).tolist()
        ([0, 1, 0], [0, 1, 0])
        """
        new = self.fresh(*atoms.shape)
        self.copies.append((new, atoms))
        if not self.growing:
            self.unify(new, atoms)
        return new

    def originals(self, atoms: Atoms) -> Atoms:
        """What atoms are copies of, copies of copies followed to the end; others themselves."""
        for new, old in reversed(self.copies):
            inside = (atoms >= new[0]) & (atoms <= new[-1])
            atoms = np.where(inside, old[np.where(inside, atoms - new[0], 0)], atoms)
        return atoms

    def freeze(self, atoms: Atoms, reason: str) -> None:
        """None of the atoms may go, for a reason in words."""
        self.frozen.append((atoms.ravel(), reason))

    def equal_rows(self, rows: tuple[Atoms, ...] | Atoms, reason: str) -> None:
        """The rows keep equal shares of their atoms, each counted as often as it occurs.

        An array has one row per combination of its leading indices. Where every row turns out to be
        a single channel, rows go whole: then those one level up keep equal shares.
        """
        self.lengths.append((rows, reason))

    def nest(self, parents: Atoms, children: Atoms) -> None:
        """``parents[i]`` lives exactly while any atom of ``children[i]`` does."""
        self.nests.append((parents.ravel(), children.reshape(parents.size, -1)))

    def solve(self) -> Channels:
        """Merge the equalities into channels and spread the reasons over them.

        A row that is a single channel is the same channel as what lives exactly while it does.
        ``rows`` are then the ``lengths`` that matter: where rows go whole, one level up.
        """
        channels = self._merged()
        while self._join_single_rows(channels):
            channels = self._merged()
        self.rows = [(rows, why) for r, why in self.lengths if (rows := _rows(r, channels.of))]
        return channels

    def _join_single_rows(self, channels: Channels) -> bool:
        """Unify parents with their only child; whether there were any."""
        before = len(self.equal)
        for parents, children in self.nests:
            above, below = channels.of[parents], channels.of[children]
            single = (below == below[:, :1]).all(axis=1) & (above != below[:, 0])
            if single.any():
                self.unify(parents[single], children[single, 0])
        return len(self.equal) > before

    def _merged(self) -> Channels:
        labels = _components(self.count, self.equal)
        smallest = labels == np.arange(self.count)  # it names its component
        number = np.cumsum(smallest) - 1
        of = number[labels]
        count = int(number[-1]) + 1 if self.count else 0
        return Channels(count, of, self._reasons(count, of))

    def _reasons(self, count: int, of: Atoms) -> dict[int, str]:
        """The first reason given for each frozen channel."""
        first = np.full(count, -1)
        for place in reversed(range(len(self.frozen))):
            first[of[self.frozen[place][0]]] = place
        frozen = np.flatnonzero(first >= 0)
        places = zip(frozen.tolist(), first[frozen].tolist(), strict=True)
        return {channel: self.frozen[place][1] for channel, place in places}


@dataclass(frozen=True, eq=False)
class Channels:
    """The solution: ``of[atom]`` is the atom's channel, in order of first appearance."""

    count: int
    of: Atoms
    reasons: dict[int, str]


def runs(entries: Atoms, channels: Atoms) -> tuple[Atoms, Atoms, Atoms]:
    """Where each channel stands among entries.

    Returns:
        ``(order, first, times)``: ``order`` sorts the entries, equal ones as they come; channel
        ``i`` stands ``times[i]`` times there, at ``order[first[i] : first[i] + times[i]]``.

    >>> runs(np.array([7, 5, 5]), np.array([7, 6, 5]))
    (array([1, 2, 0]), array([2, 2, 0]), array([1, 0, 2]))
    """
    order = np.argsort(entries, kind="stable")
    first, end = (np.searchsorted(entries[order], channels, side) for side in ("left", "right"))
    return order, first, end - first


def _rows(rows: tuple[Atoms, ...] | Atoms, of: Atoms) -> tuple[Atoms, ...]:
    """The rows whose lengths matter: without axes along which all is one channel."""
    if isinstance(rows, tuple):
        return rows
    while rows.ndim > 1 and bool((of[rows] == of[rows[..., :1]]).all()):
        rows = rows[..., 0]
    return tuple(rows.reshape(-1, rows.shape[-1])) if rows.ndim > 1 else ()


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
