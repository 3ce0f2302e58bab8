"""What a factorisation looks at while data runs through a network: some rows of some layers."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from fxsvd.calibrate import Positions
from fxsvd.data.readers import Reader, input_rows, output_rows, positions
from fxsvd.factoring.candidates import Candidate
from fxsvd.factoring.outputs import Watch
from fxsvd.substitution import build

MOST_ROWS = 1024
"""With positions="auto": rows of a sample, at most."""


def output_watch(reader: Reader, wanted: Positions, seed: int) -> Watch:
    """Rows of the layer's output, one block per group.

    >>> from fxsvd.folding.plain import reader_of
    >>> from torch import nn
    >>> layer = reader_of(nn.Linear(3, 2), torch.zeros(2, 3))
    >>> output_watch(layer, "all", 0)(torch.ones(5, 3), torch.ones(5, 2)).shape
    torch.Size([5, 1, 2])
    """
    where = _rows(reader, wanted, seed)
    groups = reader.groups

    def rows(x: Tensor, y: Tensor) -> Tensor:
        found = output_rows(reader.module, y, where(x))
        return found.reshape(len(found), groups, -1)

    return rows


def refit_watch(candidate: Candidate, wanted: Positions, seed: int) -> Watch:
    """Rows of the last part's input beside those of the layer's output.

    >>> from fxsvd.folding.plain import reader_of
    >>> from torch import nn
    >>> layer = reader_of(nn.Conv1d(2, 3, 2), torch.zeros(2, 2, 4))
    >>> from fxsvd.factoring.candidates import by_kernel
    >>> look = refit_watch(by_kernel(layer, "tucker", (1, 1), 0), "all", 0)
    >>> look(torch.ones(5, 2, 4), torch.ones(5, 3, 3)).shape
    torch.Size([15, 1, 4])
    """
    reader = candidate.reader
    *inner, last = (build(part, reader.weight.value) for part in candidate.parts())
    where = _rows(reader, wanted, seed)

    def rows(x: Tensor, y: Tensor) -> Tensor:
        chosen = where(x)
        for part in inner:
            x = part(x)
        read = input_rows(last, x, chosen)
        out = output_rows(reader.module, y, chosen)
        return torch.cat([read, out.reshape(len(out), reader.groups, -1)], dim=2)

    return rows


def _rows(reader: Reader, wanted: Positions, seed: int) -> Callable[[Tensor], Tensor]:
    """Which rows of a batch to look at: equally many of every sample, the same for a seed."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{reader.layer}/{seed}".encode()))

    def where(x: Tensor) -> Tensor:
        every = positions(reader.module, x)
        count = min(every, _per_sample(reader, every, wanted))
        if count == every:
            return torch.arange(len(x) * every, device=x.device)
        picked = torch.rand(len(x), every, generator=generator).topk(count, dim=1).indices
        return (torch.arange(len(x)).unsqueeze(1) * every + picked).flatten().to(x.device)

    return where


def _per_sample(reader: Reader, every: int, wanted: Positions) -> int:
    if isinstance(wanted, int):
        return max(1, wanted)
    if wanted == "all":
        return every
    weight = reader.weight.value
    out, row = len(weight) // reader.groups, weight[0].numel()
    return min(MOST_ROWS, max(4, math.ceil(2 * every * row / out)))
