"""Tensors that are rearranged: permuted, indexed, given or robbed of a dimension."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fxsvd.axes.types import Block, Shape, TensorType, marginal
from fxsvd.relations import Atoms, Relations


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
    there, taken = (set(relations.originals(a).flat) for a in (block.atoms, atoms))
    if there == taken:
        return
    axis = block.dims.index(dim)
    rows = relations.fresh(*block.atoms.shape[:axis])
    if relations.growing:  # nothing goes; numbered all the same, as in the analysis for narrowing
        return
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
