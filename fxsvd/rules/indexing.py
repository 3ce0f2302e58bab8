"""Subscripts: slices, integers, None, ellipsis and constant index tensors, read and written."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import fx

from fxsvd.axes import TensorType, dimension, insert, pick, take
from fxsvd.relations import Atoms
from fxsvd.rules.elementwise import tensors
from fxsvd.rules.registry import Call, Edit, literals, renumbered, rule, spellings, stays


def entries(index: Any, rank: int) -> Iterator[tuple[int, Any]]:
    """Pairs (dimension of the input, entry), the ellipsis written out; None gets dimension -1."""
    parts = list(index) if isinstance(index, tuple) else [index]
    used = sum(_consumes(p) for p in parts if p is not Ellipsis)
    dim = 0
    for part in parts:
        if part is Ellipsis:
            dim += rank - used
        elif part is None:
            yield -1, None
        else:
            yield dim, part
            dim += _consumes(part)


def _consumes(part: Any) -> int:
    return 0 if part is None else 1


@rule(operator.getitem)
def getitem(call: Call, input: Any, index: Any) -> Any:
    """``x[index]``; of a tuple, list, dict or size, the element."""
    if not isinstance(input, TensorType):
        return input[index]
    parts = list(entries(index, len(input.shape)))
    if any(_is_mask(part) for _, part in parts):
        call.freeze(input, "picks by a mask")
        return call.fixed()
    if sum(isinstance(part, (TensorType, list)) for _, part in parts) > 1:
        input = call.fix(
            input, [d for d, p in parts if isinstance(p, (TensorType, list))], "indexes it"
        )
    return _read(call, input, parts)


def _is_mask(part: Any) -> bool:
    return isinstance(part, bool)


def _read(call: Call, t: TensorType, parts: Sequence[tuple[int, Any]]) -> TensorType:
    """Apply the entries one by one, counting how far the dimensions have shifted."""
    shift, before = 0, 0
    for dim, part in parts:
        at = (before if part is None else dim) + shift
        if part is None:
            t, shift = insert(t, at), shift + 1
        elif isinstance(part, slice):
            t = sliced(call, t, at, part)
        elif isinstance(part, int):
            t, shift = _one(call, t, at, part), shift - 1
        else:
            t, grown = _gather(call, t, at, part)
            shift += grown
        before = before if part is None else dim + 1
    if t.shape == tuple(call.out):
        return t
    call.freeze(t, "indexes it in a way without a rule")
    return TensorType(tuple(call.out))


def _one(call: Call, t: TensorType, dim: int, index: int) -> TensorType:
    index = dimension(index, t.shape[dim])
    return pick(call.relations, t, dim, index, f"`{call.label}` picks one index of it")


def sliced(call: Call, t: TensorType, dim: int, part: slice) -> TensorType:
    """``x[start:stop:step]`` along a dimension."""
    start, stop, step = part.indices(t.shape[dim])
    if (start, stop, step) == (0, t.shape[dim], 1):
        return t
    index = np.arange(start, stop, step)
    if step > 1 and t.touches((dim,)):
        if part.stop is not None or t.shape[dim] % step or start >= step:
            t = call.fix(t, (dim,), "takes every so many of it")
        else:
            shape = (*t.shape[:dim], t.shape[dim] // step, step, *t.shape[dim + 1 :])
            return pick(call.relations, call.reshape(t, shape), dim + 1, start, f"`{call.label}`")
    return take(call.relations, t, dim, index, f"`{call.label}`")


def _gather(call: Call, t: TensorType, dim: int, index: Any) -> tuple[TensorType, int]:
    """An index tensor; a constant vector moves channels, anything else fixes the axis."""
    known = constant_index(call, index)
    if known is not None and known.ndim == 1 and t.touches((dim,)):
        return take(call.relations, t, dim, known, f"`{call.label}`"), 0
    shape = index.shape if isinstance(index, TensorType) else np.shape(index)
    t = call.fix(t, (dim,), "indexes it")
    place = list(range(dim)) + [d - 1 + len(shape) for d in range(dim + 1, len(t.shape))]
    old = [d for d in range(len(t.shape)) if d != dim]
    renamed = dict(zip(old, place, strict=True))
    blocks = tuple(type(b)(tuple(renamed[d] for d in b.dims), b.atoms, b.zero) for b in t.blocks)
    return TensorType((*t.shape[:dim], *shape, *t.shape[dim + 1 :]), blocks), len(shape) - 1


def constant_index(call: Call, index: Any) -> np.ndarray[Any, Any] | None:
    """The numbers of an index that is a list or a buffer of the graph."""
    if isinstance(index, (list, tuple)):
        return np.asarray(index)
    if call.node is None:
        return None
    value = next((buffer_of(n) for n in call.node.all_input_nodes[1:]), None)
    if value is None or value.is_meta or value.dtype not in (torch.int64, torch.int32):
        return None
    return value.detach().cpu().numpy()


def buffer_of(node: fx.Node) -> torch.Tensor | None:
    """The tensor that a get_attr node reads."""
    if node.op != "get_attr" or node.graph.owning_module is None:
        return None
    value: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value if isinstance(value, torch.Tensor) else None


@rule(operator.setitem)
def setitem(call: Call, input: TensorType, index: Any, value: Any) -> None:
    """``x[index] = value``: what is written lives and dies with where it is written."""
    place = getitem(_reading(call, input, index), input, index)
    if tensors(value) and place.blocks + value.blocks:
        call.combine(place, value)


def _reading(call: Call, t: TensorType, index: Any) -> Call:
    """A call whose result is the slot that is written."""
    probe = torch.empty(t.shape, device="meta")
    shape = probe[_plain(index)].shape
    return replace(call, out=shape)


def _plain(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(_plain(part) for part in index)
    if isinstance(index, TensorType):
        return torch.zeros(index.shape, dtype=torch.int64, device="meta")
    return index


@literals(operator.getitem, operator.setitem)
def index_literals(edit: Edit) -> None:
    """Bounds become the number of kept indices before them."""
    first, index, *rest = edit.node.args
    source = edit.type_of(first)
    if not isinstance(source, TensorType):
        return
    parts = iter(list(entries(index, len(source.shape))))
    single = not isinstance(index, tuple)
    new = tuple(
        part if part is Ellipsis else _mend_part(edit, source, *next(parts))
        for part in ((index,) if single else index)
    )
    edit.node.args = (first, new[0] if single else new, *rest)


def _mend_part(edit: Edit, source: TensorType, dim: int, part: Any) -> Any:
    if part is None or dim < 0:
        return part
    alive = edit.alive(source, dim)
    if stays(alive):
        return part
    if isinstance(part, slice):
        return part if part.step not in (None, 1) else mend_slice(alive, part)
    if isinstance(part, int):
        return int(alive[: dimension(part, len(alive))].sum())
    if isinstance(part, fx.Node):
        return mend_buffer(edit, part, renumbered(alive, numbers_of(part)))
    return part


def mend_slice(alive: Any, part: slice) -> slice:
    """The slice that picks the kept ones of what it picked (None stays None)."""
    size = len(alive)
    start, stop, _ = part.indices(size)
    new_start = None if part.start is None else int(alive[:start].sum())
    new_stop = None if part.stop is None else int(alive[:stop].sum())
    return slice(new_start, new_stop, part.step)


def numbers_of(node: fx.Node) -> Atoms:
    """A constant index."""
    value = buffer_of(node)
    assert value is not None  # its rule read it
    return value.detach().cpu().numpy()


def mend_buffer(edit: Edit, node: fx.Node, index: Atoms) -> fx.Node:
    """Another index, as a constant of the same kind."""
    value = buffer_of(node)
    assert value is not None  # its rule read it
    return edit.buffer(node, torch.as_tensor(index, dtype=value.dtype, device=value.device))


@rule(*spellings("select"))
def select(call: Call, input: TensorType, dim: int, index: Any) -> TensorType:
    """One index of a dimension."""
    dim = dimension(dim, len(input.shape))
    if not isinstance(index, int):
        t = call.fix(input, (dim,), "picks a computed index of it")
        return pick(call.relations, t, dim, 0, f"`{call.label}`")
    return _one(call, input, dim, index)


@literals(*spellings("select"))
def select_literals(edit: Edit) -> None:
    """The index counts the kept ones before it."""
    first, dim, index = edit.node.args
    source = edit.type_of(first)
    alive = edit.alive(source, dimension(dim, len(source.shape)))
    if isinstance(index, int) and not stays(alive):
        edit.node.args = (first, dim, int(alive[: dimension(index, len(alive))].sum()))


@rule(*spellings("narrow"))
def narrow(call: Call, input: TensorType, dim: int, start: int, length: int) -> TensorType:
    """``length`` indices from ``start``."""
    return sliced(call, input, dimension(dim, len(input.shape)), slice(start, start + length))


@literals(*spellings("narrow"))
def narrow_literals(edit: Edit) -> None:
    """Start and length count the kept ones."""
    first, dim, start, length = edit.node.args
    source = edit.type_of(first)
    alive = edit.alive(source, dimension(dim, len(source.shape)))
    if not stays(alive):
        new = int(alive[:start].sum()), int(alive[start : start + length].sum())
        edit.node.args = (first, dim, *new)


@rule(*spellings("unbind"))
def unbind(call: Call, input: TensorType, dim: int = 0) -> tuple[TensorType, ...]:
    """Every index of a dimension by itself."""
    dim = dimension(dim, len(input.shape))
    return tuple(_one(call, input, dim, i) for i in range(input.shape[dim]))
