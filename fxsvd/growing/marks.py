"""What a growing stream that norms run over makes of an axis of a parameter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fxsvd.narrowing import Mask

Fill = Literal["mean", "zero", "one", "copy", "level", "fresh"]
FreshRows = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Mark:
    """What becomes of the numbers along an axis.

    Attributes:
        power: those that are there are multiplied by √(d' / d) to this power.
        fill: what new ones are: the mean of those that are there, ``zero`` or ``one``, a ``copy``
            of their original, the mean magnitude (``level``), or ``fresh`` and orthogonal.
        gain: the parameter that multiplies, channel by channel, what this one writes: the mean is
            taken behind it.
    """

    power: int
    fill: Fill
    gain: str = ""


def filled(
    value: Tensor,
    dim: int,
    new: Mask,
    mark: Mark,
    gain: Tensor | None,
    fresh_rows: FreshRows,
) -> Tensor:
    """A parameter with the numbers that a mark says.

    Args:
        value: in its new shape, float64, with copies for what is new.
        dim: along which it grew.
        new: which indices of it are new.
        mark: what to do.
        gain: of a mark with one: its number for each index that is not new.
        fresh_rows: makes so many rows that say something else than those given.

    >>> wide, new = torch.tensor([1.0, 1.0, 3.0]), torch.tensor([False, True, False]).numpy()
    >>> filled(wide, 0, new, Mark(0, "mean"), None, lambda old, count: old[:count]).tolist()
    [1.0, 2.0, 3.0]
    """
    fresh = torch.from_numpy(new).to(value.device)
    scale = float(len(new) / (~new).sum()) ** (0.5 * mark.power)
    rows = value.movedim(dim, 0) * scale
    if mark.fill != "copy":
        rows[fresh] = _fill(rows[~fresh], int(fresh.sum()), mark, gain, fresh_rows)
    turned: Tensor = rows.movedim(0, dim)
    return turned


def level(gain: Tensor) -> float:
    """The size of a gain's numbers; one where all are zero.

    >>> level(torch.tensor([1.0, -3.0])), level(torch.zeros(2))
    (2.0, 1.0)
    """
    return float(gain.abs().mean()) or 1.0


def _fill(
    old: Tensor, count: int, mark: Mark, gain: Tensor | None, fresh_rows: FreshRows
) -> Tensor:
    if mark.fill == "fresh":
        return fresh_rows(old.flatten(1), count).reshape(count, *old.shape[1:])
    if mark.fill == "mean":
        shape = (-1, *(1 for _ in old.shape[1:]))
        share = old if gain is None else old * (gain / level(gain)).reshape(shape)
        mean: Tensor = share.mean(0)
        return mean.expand(count, *old.shape[1:])
    number = {"zero": 0.0, "one": 1.0}.get(mark.fill)
    return torch.full_like(old[:1], level(old) if number is None else number)
