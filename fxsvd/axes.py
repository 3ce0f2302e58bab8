"""The types of dimensions: which channels a tensor's axes are made of, and how they move.

A tensor's type is its shape and a few *blocks*. A block is an array of atoms over one or more whole
dimensions: element ``(i, j, …)`` of the tensor along these dimensions belongs to atom
``atoms[i, j, …]``. A dimension without a block is *fixed*: nobody may narrow it.

``[B, C, H, W]`` has one block, ``C`` atoms over dimension 1. Seen as heads, ``[B, N, H, D]`` has
one block of ``H × D`` atoms over dimensions 2 and 3: each head may keep other features, as long as
each keeps equally many (``Relations.equal_rows``). The last axis of a block is the ragged one: its
kept indices may differ from row to row. Flattening back merges the axes into one vector again.

One invariant makes rewriting simple: *the narrowed tensor is the original with the dead indices
left out, in the same order*. Where an op would break it, the axes are tied together first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fxsvd.relations import Atoms, Relations

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Block:
    """Atoms over the dimensions ``dims`` (``atoms.shape[k]`` is the size of ``dims[k]``).

    Attributes:
        dims: the tensor's dimensions, outermost first, the ragged one last.
        atoms: one atom per combination of indices.
        zero: silenced channels hold exact zeros here (they may be summed over).
    """

    dims: tuple[int, ...]
    atoms: Atoms
    zero: bool = True


@dataclass(frozen=True, eq=False)
class TensorType:
    """A shape (batch at its hint) and the blocks over it; dimensions in no block are fixed.

    ``stored``: the tensor is a parameter, or computed from parameters alone.
    """

    shape: Shape
    blocks: tuple[Block, ...] = ()
    stored: bool = False

    def vector(self, dim: int) -> Atoms | None:
        """The atoms of a dimension that one block of its own describes, else None."""
        found = [b for b in self.blocks if dim in b.dims]
        return found[0].atoms if len(found) == 1 and len(found[0].dims) == 1 else None

    def touches(self, dims: Iterable[int]) -> tuple[Block, ...]:
        """The blocks over any of the dimensions."""
        wanted = set(dims)
        return tuple(b for b in self.blocks if wanted & set(b.dims))

    def with_zero(self, zero: bool) -> TensorType:
        """The same type; silenced channels are zeros or not."""
        return replace(self, blocks=tuple(replace(b, zero=zero) for b in self.blocks))


def dimension(dim: int, rank: int) -> int:
    """A dimension counted from the front."""
    return dim + rank if dim < 0 else dim


# ---------------------------------------------------------------- freezing and tying


def freeze_type(relations: Relations, t: TensorType, reason: str) -> TensorType:
    """Freeze all of a type's atoms; the result is fixed everywhere."""
    for block in t.blocks:
        relations.freeze(block.atoms, reason)
    return TensorType(t.shape)


def fix_dims(relations: Relations, t: TensorType, dims: Iterable[int], reason: str) -> TensorType:
    """Forbid narrowing the dimensions ``dims``; other axes of the same blocks stay narrowable."""
    wanted = set(dims)
    blocks = []
    for block in t.blocks:
        hit = wanted & set(block.dims)
        kept = _fix_block(relations, block, hit, reason) if hit else block
        blocks += [kept] if kept is not None else []
    return replace(t, blocks=tuple(blocks))


def _fix_block(relations: Relations, block: Block, dims: set[int], reason: str) -> Block | None:
    rest = [d for d in block.dims if d not in dims]
    if not rest:
        relations.freeze(block.atoms, reason)
        return None
    if block.dims[-1] in dims:  # a row lives or dies as a whole
        block = tie(relations, block, block.dims[-1])
        return _fix_block(relations, block, dims, reason) if dims & set(block.dims) else block
    rows = marginal(relations, block, dims)
    if rows is not None:
        relations.freeze(rows.atoms, reason)
    return block


def tie(relations: Relations, block: Block, dim: int) -> Block:
    """Unify a block along one of its dimensions and drop that dimension from it."""
    axis = block.dims.index(dim)
    first = block.atoms.take([0], axis=axis)
    relations.unify(block.atoms, first)
    dims = block.dims[:axis] + block.dims[axis + 1 :]
    return replace(block, dims=dims, atoms=first.squeeze(axis))


def marginal(relations: Relations, block: Block, dims: Iterable[int]) -> Block | None:
    """The block as seen along ``dims`` alone.

    With the ragged axis among them the other axes are tied (every row keeps the same indices);
    without it, an index lives while anything in its row does.
    """
    wanted = set(dims)
    kept = tuple(d for d in block.dims if d in wanted)
    if not kept or len(kept) == len(block.dims):
        return block if kept else None
    if block.dims[-1] in wanted:
        for dim in block.dims:
            block = block if dim in wanted else tie(relations, block, dim)
        return block
    axes = [block.dims.index(d) for d in kept]
    if axes != list(range(len(axes))):  # an index of theirs means the same in every outer row
        _keep_all_rows(relations, block)
    children = np.moveaxis(block.atoms, axes, range(len(axes)))
    parents = relations.fresh(*children.shape[: len(axes)])
    relations.nest(parents, children)
    return Block(kept, parents, block.zero)


def _keep_all_rows(relations: Relations, block: Block) -> None:
    rows = relations.fresh(*block.atoms.shape[:-1])
    relations.freeze(rows, "its rows are numbered the same in every other")
    relations.nest(rows, block.atoms)


# ---------------------------------------------------------------- elementwise


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


# ---------------------------------------------------------------- data movement


def permute(t: TensorType, order: Sequence[int]) -> TensorType:
    """Dimension ``order[i]`` becomes dimension ``i``."""
    place = {d: i for i, d in enumerate(order)}
    blocks = tuple(replace(b, dims=tuple(place[d] for d in b.dims)) for b in t.blocks)
    return TensorType(tuple(t.shape[d] for d in order), blocks, t.stored)


def take(relations: Relations, t: TensorType, dim: int, index: Atoms, reason: str) -> TensorType:
    """Pick the indices ``index`` (a vector) along a dimension, keeping their order."""
    shape = (*t.shape[:dim], len(index), *t.shape[dim + 1 :])
    blocks = []
    for block in t.blocks:
        if dim in block.dims:
            atoms = block.atoms.take(index, axis=block.dims.index(dim))
            _keep_some(relations, block, dim, atoms, reason)
            block = replace(block, atoms=atoms)
            if len(block.dims) > 1 and block.dims[0] != dim:
                keep_rows_equal(relations, block, reason)
        blocks.append(block)
    blocks = [_squeezed(shape, b) for b in blocks if b.atoms.size > 1]
    return TensorType(shape, tuple(blocks), t.stored)


def _keep_some(relations: Relations, block: Block, dim: int, atoms: Atoms, reason: str) -> None:
    """Of what is taken of a living row, something lives."""
    if set(block.atoms.flat) == set(atoms.flat):
        return
    axis = block.dims.index(dim)
    rows = relations.fresh(*block.atoms.shape[:axis])
    relations.nest(rows, atoms)
    if axis:
        relations.nest(rows, block.atoms)
    else:
        relations.freeze(rows, f"{reason} takes a part of it, of which something stays")


def pick(relations: Relations, t: TensorType, dim: int, index: int, reason: str) -> TensorType:
    """Pick one index of a dimension and drop the dimension; the index must stay."""
    kept = [d for d in range(len(t.shape)) if d != dim]
    renamed = {d: i for i, d in enumerate(kept)}
    blocks = []
    for block in t.blocks:
        if dim not in block.dims:
            blocks.append(block)
            continue
        if block.dims[-1] == dim:
            block = _tie_rows_below(relations, block)
        rows = marginal(relations, block, (dim,))
        assert rows is not None
        relations.freeze(rows.atoms.take([index], axis=rows.dims.index(dim)), reason)
        rest = tuple(d for d in block.dims if d != dim)
        if rest:
            atoms = block.atoms.take([index], axis=block.dims.index(dim))
            atoms = atoms.squeeze(block.dims.index(dim))
            blocks.append(replace(block, dims=rest, atoms=atoms))
    return TensorType(
        tuple(t.shape[d] for d in kept),
        tuple(replace(b, dims=tuple(renamed[d] for d in b.dims)) for b in blocks),
        t.stored,
    )


def _tie_rows_below(relations: Relations, block: Block) -> Block:
    """Tie the ragged axis within each row, so that a single index of it has a meaning."""
    if len(block.dims) > 1:
        relations.unify(block.atoms, block.atoms[..., :1])
        block = replace(
            block, dims=(block.dims[-1], *block.dims[:-1]), atoms=np.moveaxis(block.atoms, -1, 0)
        )
    return block


def keep_rows_equal(relations: Relations, block: Block, reason: str) -> None:
    """Every row of a block must keep equally many indices, so that the tensor stays rectangular."""
    rows = block.atoms.squeeze()
    if rows.ndim > 1:
        relations.equal_rows(rows, reason)


def insert(t: TensorType, dim: int) -> TensorType:
    """A new dimension of size one at ``dim``."""
    blocks = tuple(replace(b, dims=tuple(d + (d >= dim) for d in b.dims)) for b in t.blocks)
    return TensorType((*t.shape[:dim], 1, *t.shape[dim:]), blocks, t.stored)


def _squeezed(shape: Shape, block: Block) -> Block:
    """The block without dimensions of size one: they say nothing."""
    keep = tuple(d for d in block.dims if shape[d] > 1)
    if len(keep) == len(block.dims):
        return block
    return replace(block, dims=keep, atoms=block.atoms.reshape([shape[d] for d in keep]))
