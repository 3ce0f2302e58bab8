"""Which atoms live under a plan, and what that makes of shapes and tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fxsvd.analysis import Parameter
from fxsvd.axes import Block, Shape, TensorType
from fxsvd.dependency import Dependencies
from fxsvd.edits import Plan, Remap
from fxsvd.errors import PlanError
from fxsvd.relations import Atoms
from fxsvd.spaces import Space

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Narrowing:
    """The atoms that stay, and the parameters that get new numbers (in their full shape).

    Attributes:
        atoms: which atoms stay.
        values: new numbers by the parameter's first name.
        biases: by layer, the bias that it gets, and which of its outputs stay.
    """

    atoms: Mask
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    biases: dict[str, tuple[torch.Tensor, Mask]] = field(default_factory=dict)

    @classmethod
    def of(cls, deps: Dependencies, plan: Plan) -> Narrowing:
        """The atoms that stay under a plan.

        Raises:
            PlanError: the plan names spaces or channels that the network does not have, narrows a
                frozen space, or empties one.
        """
        channels = np.ones(deps.channels.count, dtype=bool)
        spaces = {space.name: space for space in deps.spaces}
        for edit in plan.edits:
            space = meant(edit, spaces)
            gone = np.ones(space.width, dtype=bool)
            gone[list(edit.keep)] = False
            channels[space.channels[gone]] = False
        if not channels.all():
            _drop_empty_rows(channels, deps)
        return cls(channels[deps.channels.of]).assigning(
            deps, {v.parameter: v.value for v in plan.values}
        )

    def assigning(self, deps: Dependencies, values: dict[str, torch.Tensor]) -> Narrowing:
        """The same, with further parameters that get new numbers.

        Raises:
            PlanError: the network has no such parameter, or another shape of it.
        """
        known = {p.names[0]: p for p in deps.analysis.parameters.values()}
        new = {name: value for name, value in values.items() if name not in known}
        for name, value in values.items():
            if name in known and known[name].value.shape != value.shape:
                raise PlanError(_misfit(name, value, known[name].value.shape))
        biases = dict(_bias(self, deps, name, value) for name, value in new.items())
        old = {name: value for name, value in values.items() if name in known}
        return Narrowing(self.atoms, self.values | old, self.biases | biases)

    def along(self, t: TensorType, dim: int) -> Mask:
        """Which indices of a dimension stay (of the first living row, where rows differ)."""
        alive = np.ones(t.shape[dim], dtype=bool)
        for block in t.touches((dim,)):
            alive &= self._along_block(block, dim)
        return alive

    def order(self, t: TensorType, dim: int) -> Atoms:
        """Which index each of a dimension was before."""
        return np.flatnonzero(self.along(t, dim))

    def _along_block(self, block: Block, dim: int) -> Mask:
        kept: Mask = self.atoms[block.atoms]
        if len(block.dims) == 1:
            return kept
        axis = block.dims.index(dim)
        inner = int(np.prod(kept.shape[axis + 1 :]))
        lines = kept.reshape(-1, kept.shape[axis], inner)
        rows: Mask = np.logical_or.reduce(lines, axis=-1)
        counts = rows.sum(axis=1)
        living = counts[counts > 0]
        if living.size == 0 or (living != living[0]).any():
            raise PlanError("the plan leaves rows of one tensor with unequal numbers of channels")
        first: Mask = rows[int(np.argmax(counts > 0))]
        return first

    def shape(self, t: TensorType) -> Shape:
        """The tensor's shape afterwards."""
        touched = {d for b in t.blocks for d in b.dims}
        return tuple(
            int(self.along(t, d).sum()) if d in touched else n for d, n in enumerate(t.shape)
        )

    def changes(self, known: Parameter) -> bool:
        """Whether anything of a parameter goes or gets another number."""
        return known.names[0] in self.values or self.touches(known.type)

    def assigned(self, known: Parameter, value: torch.Tensor) -> torch.Tensor:
        """The new numbers of a parameter, in its full shape; ``value`` where it has none."""
        new = self.values.get(known.names[0])
        return value if new is None else new.to(value.device, value.dtype, copy=True)

    def after(self, known: Parameter, value: torch.Tensor) -> torch.Tensor:
        """A parameter afterwards: its new numbers if it has any, narrowed."""
        return self.narrow(self.assigned(known, value), known.type)

    def touches(self, t: TensorType) -> bool:
        """Whether anything of the tensor goes."""
        return any(not self.atoms[b.atoms].all() for b in t.blocks)

    def mask(self, t: TensorType, block: Block) -> torch.Tensor:
        """What stays of a block, shaped to broadcast against the tensor."""
        order = np.argsort(block.dims)
        kept = self.atoms[block.atoms].transpose(order)
        shape = [n if d in block.dims else 1 for d, n in enumerate(t.shape)]
        return torch.from_numpy(np.ascontiguousarray(kept)).reshape(shape)

    def narrow(self, value: torch.Tensor, t: TensorType) -> torch.Tensor:
        """The tensor with the dead indices left out, bit-identical elsewhere."""
        picked = value
        along = [self.along(t, d) for d in range(len(t.shape))]
        ragged = {d for b in t.blocks for d in b.dims[1:]}
        done = set(range(len(along))) - ragged
        for dim in sorted(done):
            if not along[dim].all():
                index = torch.from_numpy(np.flatnonzero(along[dim])).to(value.device)
                picked = picked.index_select(dim, index)
        for block in t.blocks:
            if len(block.dims) > 1 and not self.atoms[block.atoms].all():
                picked = self._narrow_rows(picked, block, along, done)
                done |= set(block.dims)
        return picked

    def _narrow_rows(
        self, value: torch.Tensor, block: Block, along: list[Mask], done: set[int]
    ) -> torch.Tensor:
        """Behind a block's first dimension, each row keeps indices of its own."""
        full = [along[d] if d in done else np.ones(len(along[d]), dtype=bool) for d in block.dims]
        chosen = map(np.flatnonzero, full)
        kept = self.atoms[block.atoms][np.ix_(*chosen)]
        rows = kept.reshape(len(kept), -1)
        sizes = [int(along[d].sum()) for d in block.dims]
        if (rows.sum(axis=1) != np.prod(sizes[1:])).any():
            raise PlanError("the plan leaves rows of one tensor with unequal numbers of channels")
        index = torch.from_numpy(np.nonzero(rows)[1].reshape(len(rows), -1)).to(value.device)
        last = list(range(-len(sizes), 0))
        turned = value.movedim(block.dims, last).flatten(1 - len(sizes))
        picked = turned.gather(-1, index.expand(*turned.shape[:-1], -1))
        shaped: torch.Tensor = picked.unflatten(-1, sizes[1:])
        return shaped.movedim(last, block.dims)

    def silence(self, value: torch.Tensor, t: TensorType) -> torch.Tensor:
        """The tensor in its full shape with zeros where something is dead."""
        for block in t.blocks:
            mask = self.mask(t, block).to(value.device)
            value = torch.where(
                mask, value, torch.zeros((), dtype=value.dtype, device=value.device)
            )
        return value


def _bias(
    narrowing: Narrowing, deps: Dependencies, name: str, value: torch.Tensor
) -> tuple[str, tuple[torch.Tensor, Mask]]:
    """The layer that gets a bias of that name, its numbers, and which of them stay."""
    layer, _, tail = name.rpartition(".")
    weights = {p.names[0]: p for p in deps.analysis.parameters.values()}
    weight = weights.get(f"{layer}.weight")
    if tail != "bias" or weight is None:
        raise PlanError(_misfit(name, value, ()))
    module = deps.analysis.graph.get_submodule(layer)
    takes_one = isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    if not takes_one or module.bias is not None or len(value) != weight.value.shape[0]:
        raise PlanError(_misfit(name, value, ()))
    return layer, (value, narrowing.along(weight.type, 0))


def _misfit(name: str, value: torch.Tensor, shape: tuple[int, ...]) -> str:
    there = f"has {list(shape)}" if shape else "has no place for it"
    return (
        f"the plan gives {name!r} the shape {list(value.shape)}, the network {there}: "
        "it was made for another network"
    )


def _drop_empty_rows(channels: Mask, deps: Dependencies) -> None:
    """A row (a head) whose every channel goes is gone itself, wherever else it counts."""
    of = deps.channels.of
    for parents, children in deps.analysis.relations.nests:
        empty = ~channels[of[children]].any(axis=1)
        channels[of[parents[empty]]] = False


def meant(edit: Remap, spaces: dict[str, Space]) -> Space:
    """The space that an edit is about.

    Raises:
        PlanError: the network has none of that name and width, it is frozen, or nothing is left.
    """
    if edit.space not in spaces:
        near = get_close_matches(edit.space, spaces, 3)
        raise PlanError(f"the network has no space {edit.space!r}; near names: {near}")
    space = spaces[edit.space]
    if edit.width != space.width or not all(0 <= k < space.width for k in edit.keep):
        raise PlanError(
            f"the plan sees {edit.width} channels in {edit.space!r}, the network {space.width}: "
            "it was made for another network"
        )
    if space.frozen and len(edit.keep) != space.width:
        how = "narrowed" if len(edit.keep) < space.width else "widened"
        raise PlanError(f"{edit.space!r} cannot be {how}: {space.frozen}")
    if not edit.keep:
        raise PlanError(f"the plan leaves {edit.space!r} without a channel")
    return space
