"""The numbers that parameters get when spaces grow, such that the network computes what it did."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fxsvd.analysis import Parameter
from fxsvd.axes import Block
from fxsvd.dependency import Dependencies
from fxsvd.edits import Assign
from fxsvd.growing.marks import Mark, filled
from fxsvd.growing.pairs import barred, given, norms_behind
from fxsvd.growing.rows import Length, orthogonal_rows, shares
from fxsvd.narrowing import Mask
from fxsvd.relations import Atoms
from fxsvd.widening import Layout, Widening

Init = Literal["orthogonal", "split", "gradient"]


@dataclass(frozen=True, eq=False)
class Growth:
    """How parameters grow.

    What reads new channels (consumers) gives them nothing, or a share of what the original had.
    Where two activations are multiplied over the channels (queries and keys), no column can do
    that: there, all writers but one write zeros, or the batch norms behind them do.

    Attributes:
        deps: the analysis.
        widening: how often each channel is there.
        paired: channels that activations are multiplied over.
        init: what copies start with.
        generator: of what is drawn.
        length: of rows that are orthogonal to those that are there.
        marks: what becomes of axes along which streams that norms run over are held.
    """

    deps: Dependencies
    widening: Widening
    paired: Mask
    init: Init
    generator: torch.Generator
    length: Length = "typical"
    marks: Mapping[tuple[str, int], Mark] = field(default_factory=dict)

    def assigns(self) -> Iterator[Assign]:
        """The parameters for which copies alone would not do, in their new shapes."""
        for known in self.deps.analysis.parameters.values():
            if self.widening.touches(known.type):
                with torch.no_grad():
                    marked = any(name == known.names[0] for name, _ in self.marks)
                    value = known.value.detach()
                    copied = self.widening.spread(value.double() if marked else value, known.type)
                    value = self._grown(known, copied)
                if value is not copied:
                    yield Assign(known.names[0], value, f"grows ({self.init})")

    def _grown(self, known: Parameter, value: Tensor) -> Tensor:
        axes = [(self._role(known, block), block) for block in known.type.blocks]
        for role, block in sorted(axes, key=lambda axis: axis[0] != "consumer"):
            layout = self.widening.layout(known.type, block)
            if not layout.rank.any():
                continue
            mark = self.marks.get((known.names[0], block.dims[-1]))
            if mark is not None:
                value = self._marked(layout, mark, value)
            elif role != "follower":
                grow = self._read if role == "consumer" else self._written
                value = grow(known, layout, value)
            elif known.names[0] in self._silent:
                value = self._zeroed(known, layout, value, self._again(known.names[0], layout))
        return value

    def _role(self, known: Parameter, block: Block) -> str:
        """As the site says; the bias of a producer is one, too."""
        site = self.deps.analysis.site_of(block.atoms)
        own = _weight_of(known.names[0]) in self._repeated
        if own and len(known.type.shape) == 1:
            return "producer"
        return "follower" if site is None else site.role

    def _read(self, known: Parameter, layout: Layout, value: Tensor) -> Tensor:
        """Columns: the new ones get nothing, or a share."""
        rank = self.widening.marked(known.type, layout, layout.rank).to(value.device)
        if self.init == "orthogonal":
            return value.masked_fill(rank > 0, 0)
        times = self.widening.marked(known.type, layout, self.widening.counts[layout.channels])
        return shares(value, rank, times.to(value.device), self.generator)

    def _written(self, known: Parameter, layout: Layout, value: Tensor) -> Tensor:
        """Rows: copies, or something new; zeros where a factor has to be."""
        new, bias = layout.rank > 0, value.dim() == 1
        silent = self._again(known.names[0], layout)
        if self.init == "orthogonal" and bias:
            silent = new
        elif self.init == "orthogonal" and len(layout.dims) == 1:
            value = self._fresh(value, layout.dims[0], new & ~silent)
        return self._zeroed(known, layout, value, silent)

    def _zeroed(self, known: Parameter, layout: Layout, value: Tensor, silent: Mask) -> Tensor:
        shown = self.widening.marked(known.type, layout, silent).to(value.device)
        return value.masked_fill(shown, 0) if silent.any() else value

    def _marked(self, layout: Layout, mark: Mark, value: Tensor) -> Tensor:
        """What a walk along a stream says."""
        new, gain = layout.rank > 0, None
        if mark.gain:
            known = self.deps.analysis.by_name(mark.gain)
            numbers = known.value.detach().double().flatten()
            (block,) = (b for b in known.type.blocks if b.atoms.size == len(numbers))
            by_channel = numbers.new_zeros(self.deps.channels.count)
            by_channel[torch.from_numpy(self.deps.channels.of[block.atoms].ravel())] = numbers
            gain = by_channel[torch.from_numpy(layout.channels[~new])]
        return filled(value, layout.dims[0], new, mark, gain, self._rows)

    def _again(self, name: str, layout: Layout) -> Mask:
        """Which new entries have to be zeros."""
        again = self._silent.get(name, self._silent.get(_weight_of(name)))
        return (layout.rank > 0) & (False if again is None else again[layout.source])

    def _fresh(self, value: Tensor, dim: int, new: Mask) -> Tensor:
        """Rows along a dimension that are orthogonal to those that were there."""
        index = torch.from_numpy(np.flatnonzero(new)).to(value.device)
        if not len(index):
            return value
        turned = value.movedim(dim, 0)
        old = torch.from_numpy(np.flatnonzero(~new)).to(value.device)
        rows = self._rows(turned[old].flatten(1), len(index))
        fresh: Tensor = turned.index_copy(0, index, rows.reshape(-1, *turned.shape[1:]))
        return fresh.movedim(0, dim)

    def _rows(self, present: Tensor, count: int) -> Tensor:
        return orthogonal_rows(present, count, self.generator, self.length)

    @cached_property
    def _repeated(self) -> dict[str, Mask]:
        """By producing parameter: the rows of paired channels that are not the first to write.

        What no parameter writes is there before any; what has to be zeros is never the first.
        """
        of, seen = self.deps.channels.of, given(self.deps)
        zeros = barred(self.deps)
        return {
            site.tensor: _repeats(of[site.atoms].ravel(), self.paired, zeros[site.atoms], seen)
            for site in self.deps.analysis.sites
            if site.role == "producer"
        }

    @cached_property
    def _silent(self) -> dict[str, Mask]:
        """These rows by what makes them zero: a norm's scale and shift, or the weight itself."""
        again = {name: rows for name, rows in self._repeated.items() if rows.any()}
        norms, out = norms_behind(self.deps) if again else {}, dict[str, Mask]()
        for name, rows in again.items():
            out[name] = rows.copy()
            for norm, seen in norms.get(name, ()):
                out[f"{norm}.weight"] = out[f"{norm}.bias"] = rows[seen]
                out[name][seen] = False
        return out


def _weight_of(name: str) -> str:
    """The weight beside a parameter of a layer: ``fc.bias`` → ``fc.weight``."""
    head, _, tail = name.rpartition(".")
    return f"{head}.{tail.replace('bias', 'weight', 1)}" if head else tail.replace("bias", "weight")


def _repeats(channels: Atoms, paired: Mask, zeros: Mask, seen: set[int]) -> Mask:
    """Which entries write a paired channel that one before them writes, or that has to be zeros."""
    out = paired[channels] & zeros.ravel()
    for i in np.flatnonzero(paired[channels] & ~out).tolist():
        out[i] = int(channels[i]) in seen
        seen.add(int(channels[i]))
    return out
