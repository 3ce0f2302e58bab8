"""Statistics of what layers see: one streaming pass over data, second moments per layer.

Convolution patches are never made for a whole batch: a sample of their positions is, seeded, so
that multiplying them costs about as much as the layer itself.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fxsvd.batches import batches, samples
from fxsvd.cost import evaluating
from fxsvd.dependency import Dependencies
from fxsvd.errors import FxsvdError
from fxsvd.moments import Moment
from fxsvd.progress import Say, quiet
from fxsvd.readers import Reader, input_rows, positions, readers

Positions = Literal["auto", "all"] | int
SHARE = 2.0
"""With positions="auto": multiply-adds for a layer's moments, relative to those of the layer."""
LEAST = 4
"""With positions="auto": rows of every sample, at least."""


def calibrate(
    deps: Dependencies,
    data: Iterable[Any],
    *,
    layers: Iterable[str] | None = None,
    positions: Positions = "auto",
    seed: int = 0,
    accuracy: float = 0.0,
    say: Say = quiet,
) -> dict[str, Moment]:
    """Mean and second moment of the input rows of linear layers and convolutions.

    Under ``torch.distributed`` every rank gives its own share of the data, and all ranks get the
    moments of the whole.

    Args:
        deps: what ``fxsvd.analyze`` found; its graph runs in eval mode.
        data: batches, see ``fxsvd.batches``.
        layers: paths of the layers; all that can be refitted where None.
        positions: rows per sample of a layer: a number, all, or as many as cost about twice what
            the layer itself costs.
        seed: of the choice of rows.
        accuracy: stop early once the relative standard error of every second moment is below this.
        say: is told how far it is.

    Returns:
        A moment per layer. Memory is 8·row² bytes per layer and group; ``fxsvd.readers`` says what
        a row is.

    Raises:
        FxsvdError: there is no batch, or a layer sees numbers that are not finite.

    >>> from fxsvd.capture import capture
    >>> from fxsvd.dependency import analyze
    >>> graph = capture(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.zeros(2, 3))
    >>> moments = calibrate(analyze(graph), [torch.randn(5, 3)])
    >>> {name: (m.count, tuple(m.second.shape)) for name, m in moments.items()}
    {'0': (5, (1, 3, 3)), '1': (5, (1, 4, 4))}
    """
    found = readers(deps)
    wanted = {name: found[name] for name in (found if layers is None else layers)}
    collector = _Collector(wanted, positions, seed)
    graph = deps.analysis.graph
    seen = 0
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(evaluating(graph))
        for reader in wanted.values():
            hook = collector.hook(reader)
            stack.callback(reader.module.register_forward_pre_hook(hook).remove)
        for number, (args, kwargs) in enumerate(batches(data, graph)):
            collector.batch = number
            graph(*args, **kwargs)
            seen += samples((args, kwargs))
            say(f"calibrating: {seen} samples")
            if accuracy and _agreed(collector.accuracy <= accuracy):
                break
    return checked({name: moment.reduced() for name, moment in collector.moments.items()})


class _Collector:
    """Adds up the moments of layers while a graph runs."""

    def __init__(self, wanted: Mapping[str, Reader], positions: Positions, seed: int) -> None:
        self.moments = {name: Moment() for name in wanted}
        self.positions, self.seed, self.batch = positions, seed, 0

    @property
    def accuracy(self) -> float:
        return max((m.accuracy for m in self.moments.values()), default=0.0)

    def hook(self, reader: Reader) -> Any:
        def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            where = chosen_rows(reader, args[0], self.positions, (self.seed, self.batch))
            self.moments[reader.layer].add(input_rows(module, args[0], where))

        return see


def chosen_rows(reader: Reader, x: Tensor, wanted: Positions, seed: tuple[int, int]) -> Tensor:
    """Numbers of rows of an input, equally many of every sample, the same for the same seed."""
    every = positions(reader.module, x)
    count = min(every, max(1, _rows_per_sample(reader, every, wanted)))
    if count == every:
        return torch.arange(len(x) * every, device=x.device)
    name = zlib.crc32(reader.layer.encode())
    generator = torch.Generator().manual_seed(hash((seed, name)) & 0x7FFFFFFF)
    picked = torch.rand(len(x), every, generator=generator).topk(count, dim=1).indices
    start = torch.arange(len(x)).unsqueeze(1) * every
    return (start + picked).flatten().to(x.device)


def _rows_per_sample(reader: Reader, every: int, wanted: Positions) -> int:
    if wanted == "all":
        return every
    if isinstance(wanted, int):
        return wanted
    weight = reader.weight.value
    out, row = len(weight) // reader.groups, weight[0].numel()
    return max(LEAST, math.ceil(SHARE * every * out / row))


def _agreed(stop: bool) -> bool:
    """Whether all ranks may stop."""
    if not (dist.is_available() and dist.is_initialized()):
        return stop
    flag = torch.tensor(int(stop))
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def checked(moments: dict[str, Moment]) -> dict[str, Moment]:
    """The moments themselves.

    Raises:
        FxsvdError: there are none, or they are not finite.
    """
    for name, moment in moments.items():
        if moment.count == 0 or moment.scatter is None:
            raise FxsvdError("the data has no batch: nothing can be calibrated")
        if not bool(moment.scatter.isfinite().all()):
            raise FxsvdError(f"{name} sees numbers that are not finite: check the data")
    return moments
