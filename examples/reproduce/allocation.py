"""How many channels each space loses: cheapest first, by measured curves and multiply-adds.

Not a command; mobilenet_v2.py uses it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fxsvd.data.readers import Reader, readers
from fxsvd.dependency import Dependencies

MOST = 0.7  # of a space's channels may go


@dataclass(frozen=True)
class Curve:
    """What the output loses when a space is narrowed alone: the divergence at some counts."""

    space: str
    width: int
    counts: tuple[int, ...]
    losses: tuple[float, ...]

    def loss(self, count: int) -> float:
        """Between the measured counts as a power of the count."""
        if count == 0:
            return 0.0
        at, values = np.log(self.counts), np.log(np.maximum.accumulate(self.losses))
        slopes = np.diff(values) / np.diff(at)
        x = np.log(count)
        if x < at[0]:
            return float(np.exp(values[0] + np.clip(slopes[0], 1.0, 2.0) * (x - at[0])))
        if x > at[-1]:
            return float(np.exp(values[-1] + max(slopes[-1], 1.5) * (x - at[-1])))
        return float(np.exp(np.interp(x, at, values)))


class Macs:
    """Multiply-adds as a function of the widths."""

    def __init__(self, deps: Dependencies) -> None:
        self.full = {s.name: s.width for s in deps.spaces}
        self.rows = [self._row(deps, r) for r in readers(deps).values()]

    def _row(self, deps: Dependencies, reader: Reader) -> tuple[int, list[str]]:
        weight = reader.weight
        size = int(np.prod([int(n) for n in reader.calls[0].meta["val"].shape[2:]]))
        atoms = weight.type.touches((0,))[0].atoms.ravel()
        ends = [int(deps.space_of[deps.channels.of[atoms[0]]])]
        if not reader.depthwise and reader.channels[0] >= 0:
            ends.append(int(deps.space_of[reader.channels[0]]))
        return size * weight.value.numel(), [deps.spaces[i].name for i in ends]

    def total(self, gone: dict[str, int]) -> float:
        """Multiply-adds when each space has lost as many channels as ``gone`` says."""
        left = {n: 1 - gone.get(n, 0) / width for n, width in self.full.items()}
        return sum(count * float(np.prod([left[n] for n in ends])) for count, ends in self.rows)


def allocate(found: Iterable[Curve], macs: Macs, target: float) -> dict[str, float]:
    """Ratios by space: the cheapest channels per multiply-add go, until the target is met."""
    by_name = {c.space: c for c in found}
    gone = dict.fromkeys(by_name, 0)
    now = macs.total(gone)
    while now > target:
        options = []
        for name, c in by_name.items():
            for steps in (1, 3, 6):  # a curve may be flat only after a while
                count = gone[name] + steps * max(1, round(0.02 * c.width))
                if count <= MOST * c.width:
                    left = macs.total(gone | {name: count})
                    price = (c.loss(count) - c.loss(gone[name])) / (now - left)
                    options.append((price, name, count, left))
        _, name, gone[name], now = min(options)
    return {name: count / by_name[name].width for name, count in gone.items() if count}
