"""Both ends of a space that gets channels which write zeros: what writes it, and what reads it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxsvd.analysis import Parameter
from fxsvd.axes import TensorType
from fxsvd.data.readers import Reader, readers
from fxsvd.dependency import Dependencies
from fxsvd.edits import Assign
from fxsvd.relations import Atoms, runs
from fxsvd.spaces import Space
from fxsvd.widening import Layout, Widening


@dataclass(frozen=True, eq=False)
class Ends:
    """The layers on both sides of a space.

    Attributes:
        space: the space.
        writers: its producers.
        readers: its consumers.
        times: for each reader, how many of its input features belong to one channel.
        incoming: the parameters that write it: weights, and biases where there are any.
    """

    space: Space
    writers: tuple[Reader, ...]
    readers: tuple[Reader, ...]
    times: tuple[int, ...]
    incoming: tuple[Parameter, ...]

    @classmethod
    def of(cls, deps: Dependencies, space: Space) -> Ends | str:
        """Both sides, where they are plain layers; or why they are not known well enough."""
        if space.frozen is not None:
            return space.frozen
        plain = {r.weight.names[0]: r for r in readers(deps).values() if r.groups == 1}
        writers = tuple(plain[s.tensor] for s in space.producers if s.tensor in plain)
        behind = tuple(plain[s.tensor] for s in space.consumers if s.tensor in plain)
        if not behind or len(writers) + len(behind) < len(space.producers + space.consumers):
            return "it is not between plain linear layers or convolutions alone"
        if not any(_is_all_of(group.channels, group.steps, space) for group in deps.groups):
            return "its channels change together with others"
        sides = [*((r, 1) for r in behind), *((w, 0) for w in writers)]
        times = [_times(deps, reader.weight.type, dim, space) for reader, dim in sides]
        if 0 in times:
            return "some of its channels are read or written more often than others"
        own = {f"{w.layer}.bias" for w in writers if getattr(w.module, "bias", None) is not None}
        biases = [p for p in deps.analysis.parameters.values() if p.names[0] in own]
        incoming = (*(w.weight for w in writers), *biases)
        more = [s.tensor for s in space.followers if s.tensor not in own]
        fixed = [p.names[0] for p in incoming if not p.value.requires_grad]
        if more or fixed:
            why = "acts on each of its channels" if more else "does not learn"
            return f"`{(more or fixed)[0]}` {why}"
        return cls(space, writers, behind, tuple(times[: len(behind)]), incoming)

    @property
    def parts(self) -> list[int]:
        """For each reader, how many numbers a channel has in its weight."""
        both = zip(self.readers, self.times, strict=True)
        return [len(r.weight.value) * n * r.patch for r, n in both]

    def lengths(self) -> Tensor:
        """The norm of each channel's columns over all readers, ``[width]`` in float64."""
        total = torch.zeros(self.space.width, dtype=torch.float64)
        for reader in self.readers:
            squares = reader.matrices()[0].square().sum(0).cpu()
            place = torch.from_numpy(place_in(self.space, reader.entries()[0]))
            total.index_add_(0, place[place >= 0], squares[place >= 0])
        return total.sqrt()


def place_in(space: Space, channels: Atoms) -> Atoms:
    """Where channels stand in a space; -1 for those of others.

    >>> place_in(Space("fc", np.array([4, 7]), (), (), (), None), np.array([7, 7, 5, 4])).tolist()
    [1, 1, -1, 0]
    """
    order, first, times = runs(space.channels, channels)
    found: Atoms = np.where(times > 0, order[first.clip(max=space.width - 1)], -1)
    return found


def opened(
    widening: Widening, given: Iterable[tuple[Ends, Tensor]], why: str = "grows (gradient)"
) -> Iterator[Assign]:
    """Parameters in their new shapes: new channels write zeros, and are read by what is given.

    Biases start a little above zero: there a ReLU passes gradients on. Nothing changes by so
    little, and it is far enough from the smallest normal number for products with gradients to be
    normal numbers, too: others cost a processor ten times as much.

    Args:
        widening: how often each channel is there.
        given: for spaces, the columns of their new channels, ``[numbers of a channel, new]``, in
            the order of the channels that they are copies of, and of one after the other.
        why: what the numbers are.

    >>> from torch import nn
    >>> from fxsvd.capture import capture
    >>> from fxsvd.dependency import analyze
    >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False))
    >>> deps = analyze(capture(net, torch.zeros(2, 1)))
    >>> _ = [nn.init.ones_(p) for p in net.parameters()]
    >>> counts = np.ones(deps.channels.count, dtype=np.int64)
    >>> counts[deps.spaces[0].channels[1]] = 2
    >>> edge = Ends.of(deps, deps.spaces[0]), torch.tensor([[5.0]])
    >>> [e.value.tolist() for e in opened(Widening(deps.channels.of, counts), [edge])]
    [[[1.0], [1.0], [0.0]], [[1.0, 1.0, 5.0]]]
    """
    spaces = list(given)
    known = {p.names[0]: p for ends, _ in spaces for p in ends.incoming}
    known |= {r.weight.names[0]: r.weight for ends, _ in spaces for r in ends.readers}
    values = {n: widening.spread(p.value.detach(), p.type).clone() for n, p in known.items()}
    for ends, columns in spaces:
        for reader, part in zip(ends.readers, columns.split(ends.parts), strict=True):
            _read(widening, ends.space, reader, part, values[reader.weight.names[0]])
    for ends, _ in spaces:
        for p in ends.incoming:
            value = values[p.names[0]]
            value[new(widening, p.type, 0, ends.space).flatten()] = (
                _nudge(value.dtype) if value.dim() == 1 else 0
            )
    for name, value in values.items():
        yield Assign(name, value, why)


def new(widening: Widening, t: TensorType, dim: int, space: Space) -> Tensor:
    """Where the new channels of a space stand in a dimension, ``[new, times]``.

    Args:
        widening: how often each channel is there.
        t: the type of a weight or bias.
        dim: which of its dimensions; a block of its own describes it.
        space: the space.

    >>> from torch import nn
    >>> from fxsvd.capture import capture
    >>> from fxsvd.dependency import analyze
    >>> net = nn.Sequential(nn.Conv1d(1, 2, 1), nn.Flatten(), nn.Linear(6, 1))
    >>> deps = analyze(capture(net, torch.zeros(2, 1, 3)))
    >>> counts = np.ones(deps.channels.count, dtype=np.int64)
    >>> counts[deps.spaces[0].channels[0]] = 3  # 3 pixels of each: 0 0 0, 0' 0' 0', 0" 0" 0", 1 1 1
    >>> how, reader = Widening(deps.channels.of, counts), deps.analysis.by_name("2.weight")
    >>> new(how, reader.type, 1, deps.spaces[0]).tolist()
    [[3, 4, 5], [6, 7, 8]]
    """
    layout = _layout(widening, t, dim)
    assert layout is not None  # see Ends.of
    found = np.flatnonzero((layout.rank > 0) & np.isin(layout.channels, space.channels))
    channels, rank = layout.channels[found], layout.rank[found]
    order = np.lexsort((found, rank, channels))
    count = len(np.unique(np.stack([channels, rank]), axis=1)[0])
    return torch.from_numpy(found[order].reshape(count, -1))


def _nudge(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).tiny ** 0.75)


def _read(widening: Widening, space: Space, reader: Reader, part: Tensor, value: Tensor) -> None:
    """Columns into those rows of a weight that are not new themselves."""
    layout = _layout(widening, reader.weight.type, 0)
    rank = np.zeros(len(value), dtype=np.int64) if layout is None else layout.rank
    rows = torch.from_numpy(np.flatnonzero(rank == 0))
    columns = new(widening, reader.weight.type, 1, space)
    shape = (len(rows), columns.shape[1], *value.shape[2:], len(columns))
    numbers = part.reshape(shape).movedim(-1, 1).to(value.device, value.dtype)
    value[rows[:, None, None], columns] = numbers


def _layout(widening: Widening, t: TensorType, dim: int) -> Layout | None:
    blocks = [b for b in t.blocks if b.dims == (dim,)]
    return widening.layout(t, blocks[0]) if blocks else None


def _is_all_of(channels: Atoms, steps: int, space: Space) -> bool:
    """Whether a group is a space, whose channels come and go one by one."""
    return steps == len(channels) == space.width and bool(np.isin(channels, space.channels).all())


def _times(deps: Dependencies, t: TensorType, dim: int, space: Space) -> int:
    """How often each channel stands in a dimension; 0 where that differs, or is hard to tell."""
    atoms = t.vector(dim)
    if atoms is None or any(len(block.dims) > 1 for block in t.blocks):
        return 0
    place = place_in(space, deps.channels.of[atoms])
    counts = np.bincount(place[place >= 0], minlength=space.width)
    return int(counts[0]) if (counts == counts[0]).all() else 0
