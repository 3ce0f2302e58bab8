"""Where the rows that a linear layer or convolution multiplies are in its input.

A row of a convolution is a patch. A lookup depends on the layer's geometry alone, so that layers
that share theirs can share it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def output_size(module: nn.Module, x: Tensor) -> list[int]:
    """The spatial sizes of a convolution's output.

    >>> output_size(nn.Conv2d(3, 4, 3, stride=2, padding=1), torch.zeros(2, 3, 8, 5))
    [4, 3]
    """
    conv: nn.Conv2d = module  # type: ignore[assignment]  # any of the three
    before, after = _padding(conv)
    sizes = x.shape[-len(conv.kernel_size) :]
    return [
        (n + b + a - d * (k - 1) - 1) // s + 1
        for n, b, a, d, k, s in zip(
            sizes, before, after, conv.dilation, conv.kernel_size, conv.stride, strict=True
        )
    ]


def _padding(conv: nn.Conv2d) -> tuple[list[int], list[int]]:
    """Zeros (or what the mode says) before and after every spatial dimension."""
    if not isinstance(conv.padding, str):
        return list(conv.padding), list(conv.padding)
    if conv.padding == "valid":
        return [0] * len(conv.kernel_size), [0] * len(conv.kernel_size)
    total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return [t // 2 for t in total], [t - t // 2 for t in total]


@dataclass(frozen=True, eq=False)
class Lookup:
    """Where the entries of some rows are in an input, and which are in its padding of zeros.

    Attributes:
        index: rows of a linear layer's input; of a convolution's, flattened (and padded, where not
            with zeros), the entries: ``[rows, channels, kernel positions]``.
        outside: row and kernel position of each place in the padding.
    """

    index: Tensor
    outside: tuple[Tensor, ...] = ()


def geometry(module: nn.Module, x: Tensor) -> tuple[Any, ...]:
    """All that a lookup depends on, but for the numbers of the rows.

    >>> x = torch.zeros(2, 3, 8, 8)
    >>> geometry(nn.Conv2d(3, 4, 3), x) == geometry(nn.Conv2d(3, 8, 3), x)
    True
    """
    names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    return (x.shape, x.device, *(getattr(module, name, None) for name in names))


def lookup(module: nn.Module, x: Tensor, where: Tensor) -> Lookup:
    """Where the entries of rows are.

    Args:
        module: a linear layer or convolution.
        x: its input, with a batch dimension.
        where: numbers of rows: ``sample * positions + position``.

    >>> x = torch.arange(9.0).reshape(1, 1, 3, 3)
    >>> lookup(nn.Conv2d(1, 1, 2), x, torch.tensor([3])).index.flatten().tolist()
    [4, 5, 7, 8]
    """
    if isinstance(module, nn.Linear):
        return Lookup(where)
    conv: nn.Conv2d = module  # type: ignore[assignment]  # any of the three
    sample, *position = torch.unravel_index(where, (len(x), *output_size(conv, x)))
    before = _padding(conv)[0] if conv.padding_mode == "zeros" else [0] * len(position)
    x = _padded(conv, x)
    place, inside = _places(conv, x, position, before)
    channel = sample.unsqueeze(1) * x.shape[1] + torch.arange(x.shape[1], device=x.device)
    start = channel * x[0, 0].numel()
    small = torch.int32 if x.numel() < 2**31 else torch.int64  # twice as fast to look up
    index = start.to(small).unsqueeze(2) + place.to(small).unsqueeze(1)
    return Lookup(index, (~inside).nonzero(as_tuple=True))


def read(module: nn.Module, x: Tensor, found: Lookup) -> Tensor:
    """The rows that a lookup names, ``[rows, groups, row]``.

    >>> conv, x = nn.Conv2d(1, 1, 2, padding=1), torch.ones(1, 1, 3, 3)
    >>> read(conv, x, lookup(conv, x, torch.tensor([0, 5]))).tolist()
    [[[0.0, 0.0, 0.0, 1.0]], [[1.0, 1.0, 1.0, 1.0]]]
    """
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1])[found.index].unsqueeze(1)
    conv: nn.Conv2d = module  # type: ignore[assignment]  # any of the three
    values = _padded(conv, x).flatten()
    rows = values.index_select(0, found.index.flatten()).view(found.index.shape)
    row, entry = found.outside
    rows[row, :, entry] = 0
    return rows.view(len(rows), conv.groups, -1)


def _padded(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """With padding that is no zeros."""
    if conv.padding_mode == "zeros":
        return x
    sides = zip(*map(reversed, _padding(conv)), strict=True)
    return F.pad(x, [n for pair in sides for n in pair], mode=conv.padding_mode)


def _places(
    conv: nn.Conv2d, x: Tensor, position: list[Tensor], before: list[int]
) -> tuple[Tensor, Tensor]:
    """Where in a channel each entry of a patch is, and whether it is there at all.

    Both ``[rows, kernel positions]``.
    """
    place = torch.zeros(len(position[0]), 1, dtype=torch.int64, device=x.device)
    inside = place == 0
    for i, at in enumerate(position):
        steps = torch.arange(conv.kernel_size[i], device=x.device) * conv.dilation[i] - before[i]
        there, size = at.unsqueeze(1) * conv.stride[i] + steps, x.shape[2 + i]
        known = (there >= 0) & (there < size)
        inside = (inside.unsqueeze(2) & known.unsqueeze(1)).flatten(1)
        there = there.clamp(0, size - 1)
        place = (place.unsqueeze(2) * size + there.unsqueeze(1)).flatten(1)
    return place, inside
