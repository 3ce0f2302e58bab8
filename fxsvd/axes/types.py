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

from collections.abc import Iterable
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
