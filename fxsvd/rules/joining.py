"""Joining and parting along a dimension: cat, stack, pad, split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from fxsvd.axes import (
    Block,
    TensorType,
    combine,
    dimension,
    insert,
    keep_rows_equal,
    marginal,
    take,
)
from fxsvd.rules.registry import Call, Edit, literals, rule, spellings, stays

DIVISIONS = spellings("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_chunk")
"""Ops that part a tensor into neighbours along a dimension."""


@rule(*spellings("cat", "concat", "concatenate"))
def cat(call: Call, tensors: Sequence[TensorType], dim: int = 0, **kwargs: Any) -> TensorType:
    """Indices one after the other along a dimension; the other dimensions meet."""
    tensors = [t for t in tensors if t.shape != (0,)]
    return concatenate(call, tensors, dimension(kwargs.get("axis", dim), len(tensors[0].shape)))


def concatenate(call: Call, tensors: Sequence[TensorType], dim: int) -> TensorType:
    """The type of tensors joined along ``dim``."""
    along = [_along(call, t, dim) for t in tensors]
    others = [_without(t, dim) for t in tensors]
    rest = combine(call.relations, others, call._meets()) if len(others) > 1 else others[0]
    dims = {b.dims for b in along if b}
    blocks = rest.blocks
    if dims:
        blocks = (*blocks, _joined(call, tensors, along, dim, dims))
    return TensorType(tuple(call.out), blocks)


def _along(call: Call, t: TensorType, dim: int) -> Block | None:
    found = t.touches((dim,))
    if len(found) > 1:
        call.fix(t, (dim,), "joins an axis of several kinds")
        return None
    return found[0] if found else None


def _without(t: TensorType, dim: int) -> TensorType:
    shape = (*t.shape[:dim], 1, *t.shape[dim + 1 :])
    return TensorType(shape, tuple(b for b in t.blocks if dim not in b.dims))


def _joined(
    call: Call,
    tensors: Sequence[TensorType],
    along: Sequence[Block | None],
    dim: int,
    dims: set[tuple[int, ...]],
) -> Block:
    """The parts' blocks end to end; parts of fixed width get atoms that stay."""
    sizes = [t.shape[dim] for t in tensors]
    if len(dims) > 1 or (None in along and dims != {(dim,)}):
        parts = [b and marginal(call.relations, b, (dim,)) for b in along]
        dims = {(dim,)}
    else:
        parts = list(along)
    (order,) = dims
    atoms = [b.atoms if b else _kept(call, size) for b, size in zip(parts, sizes, strict=True)]
    block = Block(
        order,
        np.concatenate(atoms, axis=order.index(dim)),
        all(b is None or b.zero for b in parts),
    )
    if len(order) > 1 and order[-1] == dim:
        keep_rows_equal(call.relations, block, f"`{call.label}` joins rows of equal length")
    return block


def _kept(call: Call, size: int) -> Any:
    atoms = call.relations.fresh(size)
    call.relations.freeze(atoms, f"`{call.label}` joins it with a part of fixed width")
    return atoms


@rule(*spellings("stack"))
def stack(call: Call, tensors: Sequence[TensorType], dim: int = 0) -> TensorType:
    """A new dimension over several tensors, which meet elementwise."""
    out = call.combine(*tensors)
    dim = dimension(dim, len(out.shape) + 1)
    return replace(insert(out, dim), shape=tuple(call.out))


@rule(*spellings("pad"))
def pad(
    call: Call, input: TensorType, pad: Sequence[int], mode: str = "constant", value: Any = None
) -> TensorType:
    """Constant padding of a channel axis adds channels that nobody produces."""
    rank = len(input.shape)
    for k in range(len(pad) // 2):
        before, after, dim = pad[2 * k], pad[2 * k + 1], rank - 1 - k
        if (before or after) and input.touches((dim,)):
            input = _pad_axis(call, input, dim, before, after, mode)
    zero = not value
    return TensorType(tuple(call.out), (input if zero else input.with_zero(False)).blocks)


def _pad_axis(
    call: Call, t: TensorType, dim: int, before: int, after: int, mode: str
) -> TensorType:
    if input_is_unfit(t, dim, before, after, mode):
        return call.fix(t, (dim,), "pads it")
    atoms = t.vector(dim)
    assert atoms is not None  # unfit otherwise
    padded = np.concatenate([call.relations.found(before), atoms, call.relations.found(after)])
    blocks = tuple(replace(b, atoms=padded) if dim in b.dims else b for b in t.blocks)
    return replace(t, blocks=blocks)


def input_is_unfit(t: TensorType, dim: int, before: int, after: int, mode: str) -> bool:
    """Whether padding this axis is anything but adding constants to a plain vector."""
    return mode != "constant" or min(before, after) < 0 or t.vector(dim) is None


@literals(*spellings("pad"))
def pad_literals(edit: Edit) -> None:
    """As many channels are added as are kept of the added ones."""
    args = list(edit.node.args)
    written = list(args[1] if len(args) > 1 else edit.node.kwargs["pad"])
    rank = len(edit.out.shape)
    for k in range(len(written) // 2):
        alive = edit.alive(edit.out, rank - 1 - k)
        before, after = written[2 * k], written[2 * k + 1]
        if not stays(alive):
            written[2 * k] = int(alive[:before].sum())
            written[2 * k + 1] = int(alive[len(alive) - after :].sum())
    if len(args) > 1:
        edit.node.args = (args[0], tuple(written), *args[2:])
    else:
        edit.node.kwargs = {**edit.node.kwargs, "pad": tuple(written)}


@rule(*DIVISIONS)
def split(call: Call, input: TensorType, _how: Any = None, dim: int = 0, **__: Any) -> Any:
    """Neighbouring indices go to neighbouring results."""
    d = dimension(dim, len(input.shape))
    edges = np.cumsum([0, *(size[d] for size in call.out)])
    return tuple(
        take(call.relations, input, d, np.arange(a, b), f"`{call.label}`")
        for a, b in pairwise(edges)
    )


@literals(*DIVISIONS)
def split_literals(edit: Edit) -> None:
    """Explicit sizes wherever equal ones would no longer say the same."""
    node = edit.node
    args = dict(zip(("input", "how", "dim"), node.args, strict=False)) | node.kwargs
    dim = dimension(args.get("dim", 0), len(edit.out[0].shape))
    before = [t.shape[dim] for t in edit.out]
    after = [edit.shape(t)[dim] for t in edit.out]
    if before == after:
        return
    chunks = "chunk" in str(getattr(node.target, "__name__", node.target))
    if chunks and _chunked(sum(after), len(after)) == after:
        return
    how = after[0] if _chunked(sum(after), math.ceil(sum(after) / after[0])) == after else after
    node.target = "split" if node.op == "call_method" else torch.split
    node.args, node.kwargs = (args["input"], how), {"dim": args.get("dim", 0)}


def _chunked(total: int, parts: int) -> list[int]:
    size = math.ceil(total / parts)
    return [min(size, total - start) for start in range(0, total, size)]
