"""One pass over data, second moments per layer.

Convolution patches are never made for a whole batch: a sample of their positions is, seeded, so
that multiplying them costs less than the layer itself.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from difflib import get_close_matches
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fxsvd.cost import evaluating
from fxsvd.data import ranks
from fxsvd.data.batches import Batch, batches, samples
from fxsvd.data.lookups import Lookup, geometry, lookup, read
from fxsvd.data.moments import Moment
from fxsvd.data.readers import Reader, positions, readers
from fxsvd.data.statistics import Statistics, warned
from fxsvd.dependency import Dependencies
from fxsvd.errors import FxsvdError
from fxsvd.importance import require_numbers
from fxsvd.progress import Say, quiet

Positions = Literal["auto", "all"] | int
SHARE = 0.75
"""With positions="auto": multiply-adds for a layer's moments, relative to those of the layer."""
LEAST = 4
"""With positions="auto": rows of every sample, at least."""
MOST = 64
"""With positions="auto": rows of every sample, at most, or a quarter of a row's entries."""
LARGEST = 2**26
"""Entries of the rows that are multiplied at a time."""


def calibrate(
    deps: Dependencies,
    data: Iterable[Any],
    *,
    layers: Iterable[str] | None = None,
    positions: Positions = "auto",
    seed: int = 0,
    accuracy: float = 0.0,
    say: Say = quiet,
) -> Statistics:
    """Mean and second moment of the input rows of linear layers and convolutions.

    A pass costs about as much as two plain forward passes. Under ``torch.distributed`` every
    rank gives its own share of the data, and all ranks get the moments of the whole: exactly those
    of one process where batches are dealt out to the ranks in turns, or with positions="all" (a
    choice of rows depends on the number of the batch).

    Args:
        deps: what ``fxsvd.analyze`` found; its graph runs in eval mode.
        data: batches: a list or a ``DataLoader``; labels behind the inputs are left out.
        layers: paths of the layers; all that can be refitted where None.
        positions: rows per sample of a layer: a number, all, or as many as cost less than the layer
            itself.
        seed: of the choice of rows.
        accuracy: stop early once the relative standard error of every second moment is below this.
        say: is told how far it is.

    Returns:
        A moment per layer. Memory is 8·row² bytes per layer and group, or the rows themselves while
        they are fewer than ``row`` (see ``Moment``); ``fxsvd.data.readers`` says what a row is.

    Raises:
        FxsvdError: there is no batch, a batch does not fit, or a layer sees numbers that are not
            finite; the message names the batch.

    Warns:
        UserWarning: a layer saw fewer rows than a row has entries: its covariance is singular.

    >>> from fxsvd.capture import capture
    >>> from fxsvd.dependency import analyze
    >>> graph = capture(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.zeros(2, 3))
    >>> print(calibrate(analyze(graph), [torch.randn(5, 3)]))
    5 samples
    0: 5 rows of 3
    1: 5 rows of 4
    """
    require_numbers(deps)
    _require_positions(positions)
    wanted = _wanted(readers(deps), layers)
    collector = _Collector(wanted, positions, seed)
    graph, seen = deps.analysis.graph, 0
    stream = enumerate(batches(data, graph))
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(evaluating(graph))
        for reader in wanted.values():
            hook = collector.hook(reader)
            stack.callback(reader.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        while True:
            number, batch = next(stream, (0, None))
            if batch is not None:
                collector.batch = number
                _run(graph, number, batch)
                seen += samples(batch)
                say(f"calibrating: {seen} samples{collector.progress if accuracy else ''}")
            reached = collector.accuracy if accuracy else math.inf
            if _over(batch is None, reached <= accuracy, votes=accuracy > 0):
                break
    found = checked({name: moment.reduced() for name, moment in collector.moments.items()})
    return warned(Statistics(found, int(ranks.gathered([seen]).sum())))


def _over(exhausted: bool, accurate: bool, votes: bool) -> bool:
    """Whether a rank may stop: with an accuracy to reach, all ranks stop together."""
    return ranks.agreed(exhausted or accurate) if votes else exhausted


def _run(graph: nn.Module, number: int, batch: Batch) -> None:
    try:
        graph(*batch[0], **batch[1])
    except RuntimeError as error:
        raise FxsvdError(f"batch {number} of the data cannot be run: {error}") from error


def _wanted(found: dict[str, Reader], layers: Iterable[str] | None) -> dict[str, Reader]:
    names = list(found if layers is None else layers)
    for name in names:
        if name not in found:
            near = get_close_matches(name, found, 3)
            raise FxsvdError(f"there is no layer {name!r} that could be refitted; near: {near}")
    return {name: found[name] for name in names}


def _require_positions(wanted: Positions) -> None:
    if wanted not in ("auto", "all") and not (isinstance(wanted, int) and wanted > 0):
        raise FxsvdError(f"positions is 'auto', 'all' or a number of rows, not {wanted!r}")


class _Collector:
    """Adds up the moments of layers while a graph runs."""

    def __init__(self, wanted: Mapping[str, Reader], positions: Positions, seed: int) -> None:
        self.moments = {name: Moment() for name in wanted}
        self.positions, self.seed, self.batch = positions, seed, 0
        self.last: tuple[Any, Lookup] | None = None

    @property
    def accuracy(self) -> float:
        return max((m.accuracy for m in self.moments.values()), default=0.0)

    @property
    def progress(self) -> str:
        return f", accuracy {self.accuracy:.2g}"

    def hook(self, reader: Reader) -> Any:
        moment = self.moments[reader.layer]

        def see(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = args[0] if args else kwargs["input"]
            for some in self._lookups(reader, x):
                moment.add(read(module, x, some))
            if not moment.finite:
                raise FxsvdError(
                    f"{reader.layer} sees numbers that are not finite in batch {self.batch} of the "
                    "data: check the data and the weights"
                )

        return see

    def _lookups(self, reader: Reader, x: Tensor) -> Iterator[Lookup]:
        """What to read off an input, kept for the next layer where that is of the same geometry."""
        count = rows_per_sample(reader, x, self.positions)
        key = (self.batch, count, *geometry(reader.module, x))
        if self.last is not None and self.last[0] == key:
            yield self.last[1]
            return
        where = chosen_rows(reader, x, self.positions, (self.seed, self.batch))
        parts = where.split(max(1, LARGEST // reader.entries().size))
        for part in parts:
            found = lookup(reader.module, x, part)
            self.last = (key, found) if len(parts) == 1 else None
            yield found


def chosen_rows(reader: Reader, x: Tensor, wanted: Positions, seed: tuple[int, int]) -> Tensor:
    """Numbers of rows of an input, equally many of every sample, the same for the same seed.

    Layers with as many positions get the same ones.

    The positions of a sample are cut into as many equal lengths as rows are wanted, and one is
    drawn from each: every position is as likely as any other.

    Args:
        reader: the layer.
        x: its input.
        wanted: rows per sample.
        seed: the seed, and the number of the batch (of this rank).
    """
    every = positions(reader.module, x)
    count = rows_per_sample(reader, x, wanted)
    if count == every:
        return torch.arange(len(x) * every, device=x.device)
    text = f"{seed[0]} {ranks.numbered(seed[1])}"
    generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
    draw = torch.rand(len(x), count, generator=generator, dtype=torch.float64)
    picked = ((torch.arange(count) + draw) * (every / count)).long().clamp(max=every - 1)
    return (picked + torch.arange(len(x)).unsqueeze(1) * every).flatten().to(x.device)


def rows_per_sample(reader: Reader, x: Tensor, wanted: Positions) -> int:
    """How many rows of every sample of a layer's input are taken.

    >>> from fxsvd.capture import capture
    >>> from fxsvd.dependency import analyze
    >>> x = torch.zeros(2, 3, 20, 20)
    >>> found = readers(analyze(capture(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)), x)))
    >>> [rows_per_sample(found["0"], x, wanted) for wanted in ("auto", "all", 7)]
    [45, 400, 7]
    """
    every = positions(reader.module, x)
    if wanted == "all":
        return every
    if isinstance(wanted, int):
        return min(every, wanted)
    weight = reader.weight.value
    out, row = len(weight) // reader.groups, weight[0].numel()
    count = max(LEAST, min(math.ceil(SHARE * every * out / row), max(MOST, row // 4)))
    return min(every, count)


def checked(moments: dict[str, Moment]) -> dict[str, Moment]:
    """The moments themselves.

    Raises:
        FxsvdError: there are none, or they are not finite.
    """
    for name, moment in moments.items():
        if moment.count == 0:
            raise FxsvdError("the data has no batch: nothing can be calibrated")
        if not moment.finite:
            raise FxsvdError(f"{name} sees numbers that are not finite: check the data")
    return moments
