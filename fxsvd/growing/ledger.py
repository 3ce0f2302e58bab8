"""What a walk along a stream has found out: the marks of parameters, and choices that follow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import fx

from fxsvd.analysis import Parameter
from fxsvd.dependency import Dependencies
from fxsvd.growing.marks import Mark

Axis = tuple[str, int]


@dataclass(frozen=True)
class Held:
    """A value with the stream's channels.

    Attributes:
        power: it is what it was, times s to this power.
        new: what new channels hold: the ``mean`` of the others, ``zero``, or anything (``free``).
        norms: those that it comes from.
        writers: axes of parameters that alone wrote it, where nothing else saw it since.
        stored: the parameter's axis, where it is a parameter as it is.
    """

    power: int
    new: Literal["mean", "zero", "free"]
    norms: frozenset[fx.Node] = frozenset()
    writers: frozenset[tuple[str, int]] = frozenset()
    stored: tuple[str, int] | None = None


class Stays(Exception):  # noqa: N818  # an answer, not an error
    """A stream cannot grow; the message says why."""


class Again(Exception):  # noqa: N818  # an answer, not an error
    """A choice has to be made otherwise, and the walk begun anew."""


class Ledger:
    """Marks by parameter and axis, and the choices that a walk makes.

    Attributes:
        mode: what new channels of the stream are; ``mean`` once a norm subtracts it.
        tied: norms whose readers are writers as well (embeddings that are heads).
        bent: norms with a bias and something that is not linear behind.
        norms: of the stream, or the means of squares in them.
        biased: norms with a bias.
        marks: what becomes of each axis.
    """

    def __init__(self, deps: Dependencies, number: int) -> None:
        self.mode: Literal["mean", "zero"] = "zero"
        self.tied: set[fx.Node] = set()
        self.bent: set[fx.Node] = set()
        self.norms: set[fx.Node] = set()
        self.biased: set[fx.Node] = set()
        self.marks: dict[Axis, Mark] = {}
        self._deps, self._number = deps, number
        self._by_name = {n: p for p in deps.analysis.parameters.values() for n in p.names}
        self._readers: dict[Axis, frozenset[fx.Node]] = {}
        self._writers: set[Axis] = set()

    def begin(self) -> None:
        """Forget the marks, not the choices."""
        self.marks, self._readers, self._writers = {}, {}, set()
        self.biased = set()

    def has(self, name: str) -> bool:
        """Whether the network uses a parameter of that name."""
        return name in self._by_name

    def first(self, name: str) -> str:
        """The first name of a parameter."""
        return self._by_name[name].names[0]

    def target(self, *norms: fx.Node) -> int:
        """The power of s that is left behind norms: none, or what a tied head needs."""
        return -1 if self.tied.issuperset(norms) else 0

    def axis(self, name: str, number: int) -> Axis:
        """The one axis of a parameter that holds a space's channels (-1 for a matrix of it)."""
        of, space_of = self._deps.channels.of, self._deps.space_of
        blocks = [
            b for b in self._by_name[name].type.blocks if (space_of[of[b.atoms]] == number).any()
        ]
        return self.first(name), blocks[0].dims[0] if len(blocks) == 1 else -1

    def write(self, name: str, dim: int) -> Axis:
        """A parameter writes the stream along an axis.

        Raises:
            Stays: it does not write each channel once, or is used otherwise as well.
        """
        known, key = self._by_name[name], (self.first(name), dim)
        self._writers.add(key)
        channels = self._channels(known, dim)
        if not np.array_equal(np.sort(channels), np.sort(self._own)):
            raise Stays(f"`{name}` does not write each of its channels once")
        self.mark(key, Mark(1, self.mode))
        return key

    def read(self, name: str, dim: int, mark: Mark, norms: frozenset[fx.Node]) -> None:
        """A parameter reads the stream along an axis, behind norms.

        Raises:
            Stays: it reads something else with it, or is used otherwise as well.
            Again: it is a writer, too.
        """
        known, key = self._by_name[name], (self.first(name), dim)
        if not np.isin(self._channels(known, dim), self._own).all():
            raise Stays(f"`{name}` does not read each of its channels")
        self._readers[key] = self._readers.get(key, frozenset()) | norms
        there = self.marks.get(key)
        if there is not None and key not in self._writers and there.power == mark.power:
            mark = there if there.fill == "zero" else mark
            self.marks[key] = mark
        self.mark(key, mark)

    @property
    def _own(self) -> np.ndarray:
        return self._deps.spaces[self._number].channels

    def _channels(self, known: Parameter, dim: int) -> np.ndarray:
        atoms = known.type.vector(dim) if dim >= 0 else None
        if atoms is None:
            raise Stays(f"`{known.names[0]}` holds its channels along several axes")
        return self._deps.channels.of[atoms]

    def mark(self, key: Axis, mark: Mark) -> None:
        """Note what becomes of an axis.

        Raises:
            Stays: something else has to become of it as well.
            Again: a norm can give what an axis needs that writes and reads.
        """
        there = self.marks.setdefault(key, mark)
        if there == mark:
            return
        if key not in self._writers or key not in self._readers:
            raise Stays(f"`{key[0]}` is used in two ways")
        norms = self._readers[key]
        written, read = (
            (there, mark) if there.power == 1 and there.fill == self.mode else (mark, there)
        )
        if written.power != read.power:
            if not norms or self.tied >= norms:
                raise Stays(f"`{key[0]}` is used in two places")
            self.tied |= norms
            raise Again
        if read.fill == "zero" and written.fill != "zero":
            raise Stays(f"`{key[0]}` is used in two places")
        self.marks[key] = written

    def weigh(self, writers: Iterable[Axis], gain: Axis) -> None:
        """What writers write is multiplied by a number for each channel.

        Raises:
            Stays: they write it without that elsewhere, or it is no number for each channel.
        """
        known = self._by_name[gain[0]]
        if known.value.numel() != len(self._own):
            raise Stays(f"`{gain[0]}` is more than a number for each channel")
        for key in writers:
            if self.marks[key].gain:
                raise Stays(f"`{key[0]}` is multiplied by several numbers for each channel")
            self.marks[key] = Mark(1, "mean", gain[0])
        self.mark(gain, Mark(0, "level"))

    def bend(self, norms: Iterable[fx.Node]) -> None:
        """Something that is not linear stands behind norms: a rectifier is flat at zero.

        There new channels get a constant instead, from the norm's bias, and readers zeros.

        Raises:
            Again: that was not known before.
        """
        new = (self.biased & set(norms)) - self.bent
        if new:
            self.bent |= new
            raise Again

    def unmarked(self) -> str:
        """An axis with the stream's channels that nothing was said of; empty if there is none."""
        space = self._deps.spaces[self._number]
        for site in (*space.producers, *space.consumers, *space.followers):
            if (site.tensor, site.dim) not in self.marks:
                return site.tensor
        return ""
