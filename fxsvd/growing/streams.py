"""Streams that norms run over, and how they grow by any number of channels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fxsvd.dependency import Dependencies
from fxsvd.growing.ledger import Again, Axis, Ledger, Stays
from fxsvd.growing.marks import Mark
from fxsvd.growing.pairs import paired
from fxsvd.growing.walk import Walk

Marks = Mapping[Axis, Mark]


def normed_streams(
    deps: Dependencies, numbers: Iterable[int]
) -> tuple[dict[int, Marks], dict[int, str]]:
    """How spaces that layer or RMS norms run over can grow.

    Args:
        deps: what ``fxsvd.analyze`` found.
        numbers: the spaces to look at.

    Returns:
        By the space's number, what becomes of each axis of a parameter with its channels; and, for
        spaces that cannot grow, why.

    >>> import torch
    >>> from torch import nn
    >>> from fxsvd.capture import capture
    >>> from fxsvd.dependency import analyze
    >>> net = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    >>> found, why = normed_streams(analyze(capture(net, torch.zeros(2, 3))), [0])
    >>> for (name, dim), mark in found[0].items(): print(name, dim, mark.power, mark.fill)
    0.weight 0 1 mean
    0.bias 0 1 mean
    1.weight 0 -1 copy
    1.bias 0 0 zero
    2.weight 1 0 fresh
    """
    found: dict[int, Marks] = {}
    why: dict[int, str] = {}
    pairs = paired(deps)
    for number in numbers:
        if pairs[deps.spaces[number].channels].any():
            why[number] = "two activations are multiplied over it"
            continue
        try:
            found[number] = _marks(deps, number)
        except Stays as reason:
            why[number] = str(reason)
    return found, why


def _marks(deps: Dependencies, number: int) -> Marks:
    ledger = Ledger(deps, number)
    walk = Walk(deps, number, ledger)
    while True:  # a choice is never taken back, so this ends
        try:
            walk.follow()
        except Again:
            continue
        if not ledger.norms:
            raise Stays("no norm runs over it")
        if name := ledger.unmarked():
            raise Stays(f"`{name}` holds a number for each channel")
        return ledger.marks
