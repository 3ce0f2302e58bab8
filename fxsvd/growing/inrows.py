"""Copies of whole heads, written down in a plan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fxsvd.dependency import Dependencies
from fxsvd.edits import Remap
from fxsvd.narrowing import Mask
from fxsvd.relations import Atoms


def in_rows(deps: Dependencies, edit: Remap, whole: Atoms) -> Remap:
    """An edit that copies channels one by one, or heads, where those grow whole, row by row.

    Args:
        deps: the analysis.
        edit: with the copies of each channel beside it.
        whole: by channel, itself, or the first of its head.

    >>> from fxsvd.capture import capture
    >>> from fxsvd.dependency import analyze
    >>> import torch
    >>> deps = analyze(capture(torch.nn.Linear(2, 4), torch.zeros(2, 2)))
    >>> edit = Remap(deps.spaces[0].name, 4, (0, 0, 1, 1, 2, 3))
    >>> in_rows(deps, edit, np.array([0, 0, 2, 2, 4, 5])).keep
    (0, 1, 0, 1, 2, 3)
    """
    channels = deps.space(edit.space).channels
    times = np.bincount(edit.keep, minlength=edit.width)
    starts = np.flatnonzero(np.append(True, np.diff(whole[channels])))
    rows = np.split(np.arange(edit.width), starts[1:])
    keep = [np.tile(row, times[row[0]]) for row in rows]
    return replace(edit, keep=tuple(np.concatenate(keep).tolist()))


def in_heads(whole: Atoms) -> Mask:
    """By channel, whether it is part of a head that is copied whole.

    Args:
        whole: by channel, itself, or the first of its head.

    >>> in_heads(np.array([0, 1, 1, 3])).tolist()
    [False, True, True, False]
    """
    out: Mask = np.bincount(whole, minlength=len(whole))[whole] > 1
    return out
