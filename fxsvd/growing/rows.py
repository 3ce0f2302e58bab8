"""Numbers for channels that are new: rows that say something else, shares of what there is."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Length = Literal["typical", "smallest"]
SIGNIFICANT = 1e-12
"""Of the largest eigenvalue of a Gram matrix; what is smaller is rounding."""


def orthogonal_rows(
    present: Tensor, count: int, generator: torch.Generator, length: Length = "typical"
) -> Tensor:
    """Rows orthogonal to each other and to those that are present, as far as there is room.

    Args:
        present: ``[rows, columns]``.
        count: how many new ones.
        generator: of their directions.
        length: of each: ``"typical"``, the root mean square of the present ones'; ``"smallest"``,
            half their smallest singular value (J. Dejaegher, *SVD evolutive CNN*, 2021), so that
            the spectrum goes on where it ends. One where all that is present is zero.

    Returns:
        ``[count, columns]``, of the type of ``present``.

    >>> rows = orthogonal_rows(torch.tensor([[2.0, 0.0, 0.0]]), 2, torch.Generator())
    >>> (rows @ rows.T).round(decimals=4).tolist()
    [[4.0, 0.0], [0.0, 4.0]]
    """
    old = present.detach().double()
    columns = old.shape[1]
    span, smallest = _row_space(old)
    size = smallest / 2 if length == "smallest" else float(old.norm()) / max(len(old), 1) ** 0.5
    out = old.new_zeros(0, columns)
    while len(out) < count:
        if len(span) == columns:
            span = old.new_zeros(0, columns)  # there is no room left: start again
        room = min(count - len(out), columns - len(span))
        drawn = torch.randn(room, columns, generator=generator, dtype=torch.float64).to(old.device)
        for _ in range(2):  # once more for what rounding leaves
            drawn = drawn - drawn @ span.T @ span
        rows = torch.linalg.qr(drawn.T)[0].T
        out, span = torch.cat([out, rows]), torch.cat([span, rows])
    return ((size or 1.0) * out).to(present.dtype)


def _row_space(old: Tensor) -> tuple[Tensor, float]:
    """An orthonormal basis of the rows, and their smallest singular value (0 without any)."""
    wide = len(old) <= old.shape[1]
    energies, vectors = torch.linalg.eigh(old @ old.T if wide else old.T @ old)
    good = energies > energies[-1:].clamp(min=1e-300) * SIGNIFICANT
    if not bool(good.any()):
        return old[:0], 0.0
    basis = vectors[:, good].T
    smallest = float(energies[good][0]) ** 0.5
    return (torch.linalg.qr((basis @ old).T)[0].T if wide else basis), smallest


def shares(wide: Tensor, rank: Tensor, times: Tensor, generator: torch.Generator) -> Tensor:
    """Divide what each channel's copies have in common among them, exactly and unevenly.

    A copy takes between a half and three quarters of what is left, and the last one the rest:
    these differences have no rounding (Sterbenz), so the parts add up to the whole to the last bit.
    That the parts differ lets the copies learn different things (Net2Net, Chen et al. 2016, adds
    noise for that).

    Args:
        wide: numbers, with the same ones for all copies of a channel.
        rank: which copy each is, to broadcast against ``wide``.
        times: how many there are of that channel, likewise.
        generator: of the shares.

    >>> wide, rank = torch.tensor([0.3, 0.3, 0.3, 7.0]), torch.tensor([0, 1, 2, 0])
    >>> parts = shares(wide, rank, torch.tensor([3, 3, 3, 1]), torch.Generator())
    >>> bool(parts[:3].double().sum() == wide[0].double()), float(parts[3])
    (True, 7.0)
    """
    left, out = wide.clone(), torch.zeros_like(wide)
    for copy in range(int(times.max())):
        share = 0.5 + 0.25 * float(torch.rand((), generator=generator))
        part = torch.where(times - 1 == copy, left, left * share)
        out = torch.where(rank == copy, part, out)
        left = left - part
    return out
