"""Reshapes: how view, reshape, flatten and unflatten split and merge axes.

A row-major reshape falls apart into minimal groups of input and output dimensions with equal
products; within a group a block's axes are split or merged by reshaping its atoms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from fxsvd.axes import Block, Shape, TensorType, keep_rows_equal, tie
from fxsvd.relations import Atoms, Relations

Group = tuple[range, range]


def groups(before: Shape, after: Shape) -> Iterator[Group]:
    """Minimal ranges of dimensions with equal products, in order.

    >>> list(groups((2, 12, 5), (2, 3, 4, 5)))
    [(range(0, 1), range(0, 1)), (range(1, 2), range(1, 3)), (range(2, 3), range(3, 4))]
    """
    i = j = 0
    while i < len(before) or j < len(after):
        start = i, j
        a = before[i] if i < len(before) else 1
        b = after[j] if j < len(after) else 1
        i, j = min(i + 1, len(before)), min(j + 1, len(after))
        while a != b:
            if a < b:
                a, i = a * before[i], i + 1
            else:
                b, j = b * after[j], j + 1
        yield range(start[0], i), range(start[1], j)


def reshape(relations: Relations, t: TensorType, after: Shape, reason: str) -> TensorType:
    """The type of the tensor seen with another shape."""
    pairs = list(groups(t.shape, after))
    blocks = []
    for old in t.blocks:
        new = _regroup(relations, old, t.shape, after, pairs)
        if new is None:
            continue
        if len(new.dims) > 1 and new.atoms.shape != old.atoms.shape:
            keep_rows_equal(relations, new, reason)
        blocks.append(new)
    return TensorType(after, tuple(blocks), t.stored)


def _regroup(
    relations: Relations, block: Block, before: Shape, after: Shape, pairs: Sequence[Group]
) -> Block | None:
    """The block over the new dimensions, group after group (None: nothing is left of it)."""
    touched = [(i, o) for i, o in pairs if any(d in i and before[d] > 1 for d in block.dims)]
    for inside, _ in touched:
        block = _tie_ragged(relations, block, before, inside)
    names: list[tuple[int, int]] = [(0, d) for d in block.dims]  # (0, old) or (1, new) dimension
    atoms = block.atoms
    for inside, outside in touched:
        names, atoms = _one_group(names, atoms, before, after, inside, outside)
    names, atoms = _without_constant(names, atoms)
    dims = tuple(d for _, d in names)
    return replace(block, dims=dims, atoms=atoms) if dims else None


def _tie_ragged(relations: Relations, block: Block, before: Shape, inside: range) -> Block:
    """Tie axes where the ragged one would be merged with anything but its own row.

    Merged in another order (a channel shuffle), every row keeps the same indices; merged with a
    fixed axis (a pixel shuffle), a row lives or dies as a whole.
    """
    merged = [d for d in inside if before[d] > 1]
    while len(merged) > 1 and set(merged) & set(block.dims[1:]):
        mine = [d for d in merged if d in block.dims]
        first = block.dims.index(mine[0])
        in_order = mine == list(block.dims[first : first + len(mine)])
        pure = len(mine) == len(merged)
        inner = merged[: len(mine)] == mine  # whatever is fixed lies inside: the order stays
        if in_order and (pure or inner or len(mine) == len(block.dims)):
            return block
        outer = next((d for d in mine if d != block.dims[-1]), block.dims[-1])
        block = tie(relations, block, outer if pure else mine[-1])
    return block


def _one_group(
    names: list[tuple[int, int]],
    atoms: Atoms,
    before: Shape,
    after: Shape,
    inside: range,
    outside: range,
) -> tuple[list[tuple[int, int]], Atoms]:
    """Bring a group's axes together (fixed ones broadcast), then reshape them."""
    mine = [n for n in names if n[0] == 0 and n[1] in inside]
    if not mine:
        return names, atoms
    rest = [n for n in names if n not in mine]
    behind = [n for n in rest if names.index(n) > names.index(mine[0])]
    place = len(rest) if names[-1] in mine else rest.index(behind[0])
    head, tail = rest[:place], rest[place:]
    order = [names.index(n) for n in [*head, *sorted(mine), *tail]]
    atoms = atoms.transpose(order)
    full = [before[d] for d in inside]
    held = [before[d] if (0, d) in mine else 1 for d in inside]
    outer, inner = atoms.shape[: len(head)], atoms.shape[len(head) + len(mine) :]
    atoms = np.broadcast_to(atoms.reshape(*outer, *held, *inner), (*outer, *full, *inner))
    atoms = atoms.reshape(*outer, *(after[d] for d in outside), *inner)
    return [*head, *((1, d) for d in outside), *tail], atoms


def _without_constant(
    names: list[tuple[int, int]], atoms: Atoms
) -> tuple[list[tuple[int, int]], Atoms]:
    """Drop axes along which nothing changes: they are fixed dimensions."""
    for axis in reversed(range(len(names))):
        first = atoms.take([0], axis=axis)
        if atoms.shape[axis] == 1 or bool((atoms == first).all()):
            atoms = first.squeeze(axis)
            names = names[:axis] + names[axis + 1 :]
    return names, np.ascontiguousarray(atoms)
