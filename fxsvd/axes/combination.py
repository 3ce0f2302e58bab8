"""Tensors that meet: elementwise ops, sums over axes, einsum."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from fxsvd.axes.types import Block, Shape, TensorType, fix_dims, freeze_type, marginal
from fxsvd.relations import Relations


def combine(
    relations: Relations, types: Sequence[TensorType], reason: str, *, product: bool = False
) -> TensorType:
    """The type of an elementwise op over tensors that broadcast together.

    Axes that meet are unified; an axis that meets a fixed one is fixed. ``product``: a silenced
    channel is zero where it is so in *any* operand, else only where in *all* of them.
    """
    shape = tuple(np.broadcast_shapes(*(t.shape for t in types)))
    aligned = [_align(t, shape) for t in types]
    aligned = _meet_fixed(relations, aligned, reason)
    aligned = [_one_kind(relations, t, aligned, reason) for t in aligned]
    if len(aligned) == 1:
        return aligned[0]
    blocks, shared = [b for t in aligned for b in t.blocks], _shared_dims(aligned)
    merged = [b for b in blocks if not shared & set(b.dims)]
    for block in sorted((b for b in blocks if shared & set(b.dims)), key=lambda b: -len(b.dims)):
        merged = _merge(relations, merged, block, product)
    if not product:
        merged = [replace(b, zero=b.zero and _in_all(b, aligned)) for b in merged]
    return TensorType(shape, tuple(merged), all(t.stored for t in types))


def _shared_dims(types: Sequence[TensorType]) -> set[int]:
    """Dimensions over which several of the types have blocks: only there channels meet.

    One tensor may have several blocks over one dimension (a kernel flattened to ``in · k · k``);
    they stay apart as long as no other tensor meets them.
    """
    held = [{d for b in t.blocks for d in b.dims} for t in types]
    return {d for i, dims in enumerate(held) for d in dims if any(d in h for h in held[:i])}


def _align(t: TensorType, shape: Shape) -> TensorType:
    """The type with leading dimensions of size one, up to the rank of ``shape``."""
    shift = len(shape) - len(t.shape)
    if not shift:
        return t
    blocks = tuple(replace(b, dims=tuple(d + shift for d in b.dims)) for b in t.blocks)
    return TensorType((1,) * shift + t.shape, blocks, t.stored)


def _meet_fixed(relations: Relations, types: Sequence[TensorType], reason: str) -> list[TensorType]:
    """Fix every dimension that is fixed in any of the types (size one aside: it is broadcast)."""
    held = [{d for b in t.blocks for d in b.dims} for t in types]
    wide = [{d for d, size in enumerate(t.shape) if size > 1} for t in types]
    fixed = set().union(*(w - h for w, h in zip(wide, held, strict=True)))
    hits = [fixed & w & h for w, h in zip(wide, held, strict=True)]
    pairs = zip(types, hits, strict=True)
    return [fix_dims(relations, t, hit, reason) if hit else t for t, hit in pairs]


def _one_kind(
    relations: Relations, t: TensorType, others: Sequence[TensorType], reason: str
) -> TensorType:
    """Where an axis merged of several kinds meets another tensor's, only one kind can go.

    The features of heads that share them, say: the heads stay.
    """
    gone: list[Block] = []
    lines = [b.dims for b in t.blocks if len(b.dims) == 1]
    for dim in {d for d in lines if lines.count(d) > 1}:
        kinds = [b for b in t.blocks if b.dims == dim]
        if any(o is not t and o.touches(dim) for o in others):
            gone += sorted(kinds, key=lambda b: _weight(relations, b))[:-1]
    for block in gone:
        relations.freeze(block.atoms, reason)
    return replace(t, blocks=tuple(b for b in t.blocks if b not in gone)) if gone else t


def _weight(relations: Relations, block: Block) -> tuple[bool, int]:
    """Whether a block's atoms are more than numbers of rows, and how many there are."""
    rows = any(np.isin(block.atoms, parents).any() for parents, _ in relations.nests)
    return not rows, len(np.unique(block.atoms))


def _in_all(block: Block, types: Sequence[TensorType]) -> bool:
    dims = set(block.dims)
    return all(any(dims <= set(b.dims) for b in t.blocks) for t in types)


def _merge(relations: Relations, merged: list[Block], new: Block, product: bool) -> list[Block]:
    """Relate a further block to those that share dimensions with it (at least as large)."""
    for place, old in enumerate(merged):
        common = [d for d in new.dims if d in old.dims]
        if not common:
            continue
        a, b = marginal(relations, old, common), marginal(relations, new, common)
        assert a is not None  # both hold the common dimensions
        assert b is not None
        order = [b.dims.index(d) for d in a.dims]
        relations.unify(a.atoms, b.atoms.transpose(order))
        if len(common) == len(new.dims):
            same = len(new.dims) == len(old.dims)
            zero = (old.zero or (same and new.zero)) if product else (old.zero and new.zero)
            return [*merged[:place], replace(old, zero=zero), *merged[place + 1 :]]
    return [*merged, new]


# ---------------------------------------------------------------- contraction


def contract(relations: Relations, t: TensorType, dims: Iterable[int], reason: str) -> TensorType:
    """Sum over ``dims`` (they are removed); silenced entries must be zeros to be summed over."""
    gone = set(dims)
    unsafe = {d for b in t.blocks if not b.zero for d in b.dims if d in gone}
    if unsafe:
        t = fix_dims(
            relations, t, unsafe, f"{reason} sums over values that are not zero when silent"
        )
    kept = [d for d in range(len(t.shape)) if d not in gone]
    blocks = [marginal(relations, b, kept) for b in t.blocks]
    renamed = {d: i for i, d in enumerate(kept)}
    merged: list[Block] = []
    for block in sorted((b for b in blocks if b), key=lambda b: -len(b.dims)):
        rows = any(set(block.dims) < set(b.dims) for b in merged)
        merged = _merge(relations, merged, block, True) if rows else [*merged, block]
    return TensorType(
        tuple(t.shape[d] for d in kept),
        tuple(replace(b, dims=tuple(renamed[d] for d in b.dims)) for b in merged),
        t.stored,
    )


def einsum(
    relations: Relations,
    operands: Sequence[tuple[str, TensorType]],
    output: str,
    reason: str,
) -> TensorType:
    """The type of an einsum with one letter per dimension."""
    letters = output + "".join(sorted({c for names, _ in operands for c in names} - set(output)))
    spread = [_spread(relations, names, t, letters, reason) for names, t in operands]
    whole = combine(relations, spread, reason, product=True)
    return contract(relations, whole, range(len(output), len(letters)), reason)


def _spread(
    relations: Relations, names: str, t: TensorType, letters: str, reason: str
) -> TensorType:
    """The operand over all letters: size one where it has no such letter."""
    if len(set(names)) < len(names):  # a diagonal: nobody needs it narrowed
        t = freeze_type(relations, t, f"{reason} takes a diagonal")
    place = [letters.index(c) for c in names]
    shape = [1] * len(letters)
    for dim, size in zip(place, t.shape, strict=True):
        shape[dim] = size
    blocks = tuple(replace(b, dims=tuple(place[d] for d in b.dims)) for b in t.blocks)
    return TensorType(tuple(shape), blocks, t.stored)
