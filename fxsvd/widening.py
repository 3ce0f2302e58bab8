"""What copies of channels make of shapes and tensors: the counterpart of ``fxsvd.narrowing``.

A copy lies beside its original. In a dimension where a channel has several neighbouring indices
(all pixels of it, behind a flatten), the copy of them all lies behind them all. By the invariant of
``fxsvd.axes`` (what narrows keeps its order, or was tied), every op between two tensors then sees
them laid out alike.

A head that is copied whole counts as one channel: its features lie side by side wherever it does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fxsvd.analysis import Parameter
from fxsvd.axes import Block, Shape, TensorType
from fxsvd.dependency import Dependencies
from fxsvd.edits import Plan
from fxsvd.errors import PlanError
from fxsvd.heads import HeadGroup, by_heads
from fxsvd.narrowing import Mask, Narrowing, meant
from fxsvd.relations import Atoms

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Layout:
    """The dimension of a block that grows, in every row of the dimensions before it.

    Attributes:
        dims: of the tensor: those of the rows, and last the one that grows. (Dimensions behind it,
            along which nothing but one channel is found, are left out.)
        source: the index that each new one is a copy of, ``[*rows, new]``.
        rank: 0 for an original, 1 for its first copy, and so on, ``[*rows, new]``.
        channels: the channel of each, ``[*rows, new]``.
    """

    dims: tuple[int, ...]
    source: Atoms
    rank: Atoms
    channels: Atoms


@dataclass(frozen=True, eq=False)
class Widening:
    """How often each channel is there, and the parameters that get new numbers.

    Attributes:
        of: the channel of each atom (of those in a head that grows whole, its first).
        counts: how often each channel is there afterwards, at least once.
        values: new numbers by the parameter's first name, in its shape before or afterwards.
        biases: none; as in ``Narrowing``.
    """

    of: Atoms
    counts: Counts
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    biases: dict[str, tuple[torch.Tensor, Mask]] = field(default_factory=dict)

    @classmethod
    def by(cls, deps: Dependencies, plan: Plan) -> Widening:
        """What a plan makes wider. Its spaces are those of ``deps.growing``.

        Raises:
            PlanError: the plan does not fit the network, or narrows some space as well.
        """
        deps = deps.growing
        counts = np.ones(deps.channels.count, dtype=np.int64)
        rows = np.zeros(deps.channels.count, dtype=bool)
        spaces = {space.name: space for space in deps.spaces}
        for edit in plan.edits:
            space = meant(edit, spaces)
            counts[space.channels] = np.bincount(edit.keep, minlength=space.width)
            rows[space.channels] = list(edit.keep) != sorted(edit.keep)
            if not counts[space.channels].all():
                raise PlanError(f"a plan narrows or widens: make two stages of it for {edit.space}")
        whole = whole_heads(deps, rows)
        told = [space.channels for space in deps.spaces if not space.frozen]
        if any((counts[channels] != counts[whole[channels]]).any() for channels in told):
            raise PlanError("the plan copies a part of a head: copy all of it, or features of each")
        out = cls(whole[deps.channels.of], counts, {v.parameter: v.value for v in plan.values})
        known = {p.names[0]: p for p in deps.analysis.parameters.values()}
        for name, value in out.values.items():
            there = known.get(name)
            fits = there is not None and tuple(value.shape) in (
                tuple(there.value.shape),
                out.shape(there.type),
            )
            if not fits:
                raise PlanError(f"the plan's {name!r} of {list(value.shape)} has no place in it")
        return out

    def layout(self, t: TensorType, block: Block) -> Layout:
        """Where the copies of a block's channels come.

        Raises:
            PlanError: the rows of a tensor would get unequally many.
        """
        channels, dims = self.of[block.atoms], block.dims
        while len(dims) > 1 and (channels == channels[..., :1]).all():
            channels, dims = channels[..., 0], dims[:-1]
        for axis, dim in enumerate(dims[:-1]):  # rows that are channels themselves
            for other in t.touches((dim,)):
                if other.dims == (dim,):
                    channels = channels.take(self.layout(t, other).source, axis=axis)
        rows = [self._row(row) for row in channels.reshape(-1, channels.shape[-1])]
        if len({len(row) for row, _ in rows}) > 1:
            raise PlanError("the plan leaves rows of one tensor with unequal numbers of channels")
        shape = (*channels.shape[:-1], -1)
        source, rank = (np.stack(part).reshape(shape) for part in zip(*rows, strict=True))
        return Layout(dims, source, rank, np.take_along_axis(channels, source, axis=-1))

    def _row(self, channels: Atoms) -> tuple[Atoms, Atoms]:
        """The new order of a row, and which copy each is."""
        starts = np.flatnonzero(np.append(True, channels[1:] != channels[:-1]))
        lengths = np.diff(np.append(starts, len(channels)))
        sizes = lengths * self.counts[channels[starts]]
        run = np.repeat(np.arange(len(starts)), sizes)
        within = np.arange(len(run)) - (sizes.cumsum() - sizes)[run]
        return starts[run] + within % lengths[run], within // lengths[run]

    def along(self, t: TensorType, dim: int) -> Counts:
        """How often each index of a dimension is there (in the first row, where rows differ)."""
        return np.bincount(self.order(t, dim), minlength=t.shape[dim])

    def order(self, t: TensorType, dim: int) -> Atoms:
        """Which index each of a dimension is a copy of (in the first row, where rows differ)."""
        order = np.arange(t.shape[dim])
        for block in t.touches((dim,)):
            layout = self.layout(t, block) if self._copies(block) else None
            if layout is not None and layout.dims[-1] == dim:
                order = layout.source.reshape(-1, layout.source.shape[-1])[0]
        return order

    def shape(self, t: TensorType) -> Shape:
        """The tensor's shape afterwards."""
        return tuple(int(self.along(t, d).sum()) for d in range(len(t.shape)))

    def touches(self, t: TensorType) -> bool:
        """Whether anything of the tensor gets a copy."""
        return any(self._copies(block) for block in t.blocks)

    def changes(self, known: Parameter) -> bool:
        """Whether a parameter gets copies or other numbers."""
        return known.names[0] in self.values or self.touches(known.type)

    def after(self, known: Parameter, value: torch.Tensor) -> torch.Tensor:
        """A parameter afterwards: its new numbers if it has any, else with its copies."""
        new = self.values.get(known.names[0])
        if new is None:
            return self.spread(value, known.type)
        new = new.to(value.device, value.dtype, copy=True)
        return new if tuple(new.shape) == self.shape(known.type) else self.spread(new, known.type)

    def spread(self, value: torch.Tensor, t: TensorType) -> torch.Tensor:
        """The tensor with a copy beside every index that gets one."""
        for block in sorted(t.blocks, key=lambda b: len(b.dims)):
            if self._copies(block):
                value = _picked(value, self.layout(t, block))
        return value

    def marked(self, t: TensorType, layout: Layout, marks: npt.NDArray[Any]) -> torch.Tensor:
        """What is said of a layout (``[*rows, new]``), to broadcast against the wide tensor."""
        order = np.argsort(layout.dims)
        shape = [n if d in layout.dims else 1 for d, n in enumerate(self.shape(t))]
        return torch.from_numpy(np.ascontiguousarray(marks.transpose(order))).reshape(shape)

    def _copies(self, block: Block) -> bool:
        return bool((self.counts[self.of[block.atoms]] > 1).any())


def whole_heads(deps: Dependencies, rows: Mask) -> Atoms:
    """By channel, itself; of heads that are copied whole, the first of all that they consist of.

    Args:
        deps: what ``fxsvd.analyze`` found.
        rows: channels; a head is copied whole where any of its own is among them.

    >>> from torch import nn
    >>> from fxsvd.capture import capture
    >>> from fxsvd.dependency import analyze
    >>> net, x = nn.MultiheadAttention(4, 2, batch_first=True), torch.zeros(2, 3, 4)
    >>> deps = analyze(capture(net, {"query": x, "key": x, "value": x, "need_weights": False}))
    >>> whole = whole_heads(deps, np.full(deps.channels.count, True))
    >>> whole[deps.spaces[0].channels]
    array([0, 0, 2, 2])
    """
    out = np.arange(deps.channels.count)
    inside = np.zeros(deps.channels.count, dtype=bool)
    groups = by_heads(deps) if rows.any() else []
    for head in (h for group in groups if isinstance(group, HeadGroup) for h in group.heads):
        if rows[head].any():
            out[head], inside[head] = head[0], True
    before = -1
    while inside.sum() != before:  # what counts the rows of heads, and what counts those
        before = inside.sum()
        for parents, children in deps.analysis.relations.nests:
            below = deps.channels.of[children]
            one = inside[below].all(axis=1) & (out[below] == out[below[:, :1]]).all(axis=1)
            above = deps.channels.of[parents[one]]
            out[above], inside[above] = out[below[one, 0]], True
    return out


Resizing = Narrowing | Widening


def resizing(deps: Dependencies, plan: Plan) -> Resizing:
    """What one stage of a plan does to shapes and tensors.

    Raises:
        PlanError: the plan does not fit the network.
    """
    return Widening.by(deps, plan) if plan.widens else Narrowing.of(deps, plan)


def _picked(value: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Along the dimension that grows, every row picks indices of its own."""
    index, dims = torch.from_numpy(layout.source).to(value.device), layout.dims
    if index.dim() == 1:
        return value.index_select(dims[0], index)
    last = list(range(-len(dims), 0))
    turned = value.movedim(dims, last)
    index = index.expand(*turned.shape[: -len(dims)], *index.shape)
    return turned.gather(-1, index).movedim(last, dims)
