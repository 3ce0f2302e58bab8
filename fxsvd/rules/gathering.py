"""Indices of a dimension, again and again: tiles, and constant indices.

What is gathered lives and dies with what it is gathered from, and may grow without it
(``fxsvd.relations``). What is gathered from a fixed axis of channels, an image's colours, is free.
Where a tile is resized into none, it becomes an index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fxsvd.axes import Block, TensorType, dimension, insert, take
from fxsvd.relations import Atoms
from fxsvd.rules.indexing import (
    buffer_of,
    constant_index,
    getitem,
    mend_buffer,
    numbers_of,
)
from fxsvd.rules.movement import flat, free_blocks
from fxsvd.rules.registry import Call, Edit, literals, rule, spellings


@rule(*spellings("repeat", "tile"))
def repeat(call: Call, input: TensorType, *repeats: Any, **kwargs: Any) -> TensorType:
    """Copies side by side; a single value made many is free to go."""
    times = _times(repeats, kwargs, len(call.out))
    tiled = _tiled(input.shape, times)
    if tiled is not None:
        return _gathered(call, input, tiled, _tile(input.shape[tiled], times[tiled]))
    for _ in range(len(call.out) - len(input.shape)):
        input = insert(input, 0)
    if not input.blocks:
        return TensorType(tuple(call.out), free_blocks(call, input.shape, times))
    for dim, n in enumerate(times):
        if n > 1:
            index = _tile(input.shape[dim], n)
            input = take(call.relations, input, dim, index, f"`{call.label}`")
    return input


def _times(repeats: tuple[Any, ...], kwargs: dict[str, Any], rank: int) -> tuple[Any, ...]:
    """How often each dimension of the result is there."""
    times = flat(repeats) if repeats else tuple(next(iter(kwargs.values())))
    return (1,) * (rank - len(times)) + times


def _tiled(shape: Sequence[int], times: Sequence[Any]) -> int | None:
    """The dimension, where just one is made of several copies of more than one index."""
    made = [d for d, n in enumerate(times) if not isinstance(n, int) or n != 1]
    one = len(made) == 1 and len(times) == len(shape) and isinstance(times[made[0]], int)
    return made[0] if one and shape[made[0]] > 1 else None


def _tile(size: int, times: int) -> Atoms:
    return np.tile(np.arange(size), times)


def _gathered(call: Call, t: TensorType, dim: int, index: Atoms) -> TensorType:
    """Indices of a dimension, where they are not tied more closely."""
    old = t.vector(dim)
    if t.stored or (old is None and not _colours(call, t, dim)):
        return take(call.relations, t, dim, index, f"`{call.label}`")
    if old is None:
        new = Block((dim,), call.relations.found(len(index)), zero=False)
    else:
        (block,) = t.touches((dim,))
        new = replace(block, atoms=call.relations.copied(old[index]))
    shape = (*t.shape[:dim], len(index), *t.shape[dim + 1 :])
    return TensorType(shape, (*(b for b in t.blocks if dim not in b.dims), new))


def _colours(call: Call, t: TensorType, dim: int) -> bool:
    """Whether it is the channels of vectors or images, all fixed; elsewhere it may be tokens."""
    value = call.node.all_input_nodes[0].meta["val"] if call.node is not None else None
    numbers = value is None or (value.is_floating_point() and isinstance(value.shape[dim], int))
    return dim == 1 and len(t.shape) in (2, 4) and not t.blocks and numbers


@literals(*spellings("repeat", "tile"))
def repeat_literals(edit: Edit) -> None:
    """How often follows the result, where one value is made many; a tile may become an index."""
    first, *rest = edit.node.args
    source = edit.type_of(first)
    times = _times(tuple(rest), edit.node.kwargs, len(edit.out.shape))
    tiled = _tiled(source.shape, times)
    if tiled is not None:
        index = _mended(edit, source, tiled, _tile(source.shape[tiled], times[tiled]))
        if not np.array_equal(index, _tile(edit.shape(source)[tiled], times[tiled])):
            edit.node.op, edit.node.target = "call_method", "index_select"
            order = edit.constant("order", torch.from_numpy(index))
            edit.node.args, edit.node.kwargs = (first, tiled, order), {}
        return
    before = (1,) * (len(edit.out.shape) - len(source.shape)) + tuple(source.shape)
    after = edit.shape(edit.out)
    new = tuple(
        edit.size(n, edit.out.shape[d], after[d]) if before[d] == 1 else n
        for d, n in enumerate(times)
    )
    edit.node.args, edit.node.kwargs = (first, new), {}


@rule(*spellings("index_select"))
def index_select(call: Call, input: TensorType, dim: int, index: Any) -> TensorType:
    """Indices by a tensor."""
    dim = dimension(dim, len(input.shape))
    known = constant_index(call, index)
    if known is not None and known.ndim == 1:
        return _gathered(call, input, dim, known)
    return getitem(call, input, (*(slice(None),) * dim, index))  # type: ignore[no-any-return]


@literals(*spellings("index_select"))
def index_select_literals(edit: Edit) -> None:
    """A constant index is renumbered."""
    given = dict(zip(("input", "dim", "index"), edit.node.args, strict=False)) | edit.node.kwargs
    first, dim, index = given["input"], given["dim"], given["index"]
    if buffer_of(index) is None:
        return
    source, before = edit.type_of(first), numbers_of(index)
    after = _mended(edit, source, dimension(dim, len(source.shape)), before)
    if not np.array_equal(before, after):
        edit.node.args, edit.node.kwargs = (first, dim, mend_buffer(edit, index, after)), {}


def _mended(edit: Edit, source: TensorType, dim: int, index: Atoms) -> Atoms:
    return regathered(index, edit.order(source, dim), edit.order(edit.out, dim))


def regathered(index: Atoms, source: Atoms, result: Atoms) -> Atoms:
    """A constant index, once its source and its result are resized.

    A copy in the result is gathered from the same copy in the source, or the last that is there.

    Args:
        index: what each entry of the result was gathered from.
        source: which entry each one of the source was, or is a copy of.
        result: likewise, of the result.

    >>> regathered(np.array([0, 1, 0]), np.array([0, 0, 1]), np.array([0, 1, 1, 2])).tolist()
    [0, 2, 2, 0]
    """
    places = {key: place for place, key in enumerate(_numbered(source))}
    last = np.bincount(source) - 1
    found = [places[i, min(n, int(last[i]))] for i, n in _numbered(result, index)]
    return np.array(found, dtype=np.int64)


def _numbered(entries: Atoms, names: Atoms | None = None) -> list[tuple[int, int]]:
    """The name of each entry, and how many of the same entry come before it."""
    met: dict[int, int] = {}
    out = []
    for entry in entries.tolist():
        met[entry] = met.get(entry, -1) + 1
        out.append((entry if names is None else int(names[entry]), met[entry]))
    return out
