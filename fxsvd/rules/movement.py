"""Data movement: the op applied to the atoms themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fxsvd.axes import (
    Block,
    TensorType,
    dimension,
    insert,
    permute,
    take,
)
from fxsvd.relations import Atoms
from fxsvd.rules.registry import Call, Edit, literals, renumbered, rule, spellings, stays

VIEWS = spellings("view", "reshape", "unflatten", "view_as", "reshape_as")


def flat(sizes: tuple[Any, ...]) -> tuple[Any, ...]:
    """``f(x, (a, b))`` and ``f(x, a, b)`` mean the same."""
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes


@rule(*VIEWS, *spellings("flatten", "ravel", "squeeze", "unsqueeze"))
def view(call: Call, input: TensorType, *_: Any, **__: Any) -> TensorType:
    """Anything row-major."""
    return call.reshape(input, tuple(call.out))


@literals(*spellings("view", "reshape"))
def view_literals(edit: Edit) -> None:
    """Each written size follows the result's."""
    first, *rest = edit.node.args
    sizes = tuple(edit.node.kwargs.get("shape", ())) or flat(tuple(rest))
    if any(isinstance(size, torch.dtype) for size in sizes):
        return
    new = mended(edit, sizes, edit.out.shape, edit.shape(edit.out))
    spread = len(rest) > 1  # x.view(a, b), as against x.view((a, b))
    edit.node.args, edit.node.kwargs = (first, *new) if spread else (first, new), {}


@literals(*spellings("unflatten"))
def unflatten_literals(edit: Edit) -> None:
    """The sizes of the dimension that is split."""
    args = {"input": None, **dict(zip(("input", "dim", "sizes"), edit.node.args, strict=False))}
    args |= edit.node.kwargs
    dim = dimension(args["dim"], len(edit.type_of(args["input"]).shape))
    place = slice(dim, dim + len(args["sizes"]))
    new = mended(edit, args["sizes"], edit.out.shape[place], edit.shape(edit.out)[place])
    edit.node.args, edit.node.kwargs = (args["input"], args["dim"], new), {}


def mended(edit: Edit, sizes: Sequence[Any], before: Sequence[int], after: Sequence[int]) -> Any:
    """Written sizes, each mended (-1 stays -1)."""
    return tuple(
        size if isinstance(size, int) and size < 0 else edit.size(size, b, a)
        for size, b, a in zip(sizes, before, after, strict=True)
    )


@rule(*spellings("permute"))
def permute_rule(call: Call, input: TensorType, *dims: Any, **kwargs: Any) -> TensorType:
    """Dimensions in another order."""
    order = flat(dims) if dims else kwargs["dims"]
    return permute(input, [dimension(d, len(input.shape)) for d in order])


@rule(*spellings("transpose", "swapaxes", "swapdims"))
def transpose(call: Call, input: TensorType, dim0: int, dim1: int) -> TensorType:
    """Two dimensions change places."""
    rank = len(input.shape)
    order = list(range(rank))
    a, b = dimension(dim0, rank), dimension(dim1, rank)
    order[a], order[b] = order[b], order[a]
    return permute(input, order)


@rule(*spellings("t", "numpy_T", "adjoint"))
def matrix_transpose(call: Call, input: TensorType) -> TensorType:
    """The last two dimensions change places."""
    return transpose(call, input, -2, -1) if len(input.shape) > 1 else input


@rule(*spellings("movedim", "moveaxis"))
def movedim(call: Call, input: TensorType, source: Any, destination: Any) -> TensorType:
    """Dimensions move to other places, the rest keep their order."""
    order = np.moveaxis(np.empty(tuple(range(2, 2 + len(input.shape)))), source, destination).shape
    return permute(input, [size - 2 for size in order])


@rule(getattr)
def attribute(call: Call, input: TensorType, name: str) -> Any:
    """``x.T``, ``x.mT``, ``x.data`` and friends."""
    if name in ("T", "mT", "H", "mH"):
        rank = len(input.shape)
        return permute(input, range(rank)[::-1]) if name == "T" else transpose(call, input, -2, -1)
    if name in ("data", "real"):
        return input
    call.freeze(input, f"reads its `.{name}`")
    return call.fixed()


@rule(*spellings("expand", "broadcast_to", "expand_as"))
def expand(call: Call, input: TensorType, *sizes: Any, **__: Any) -> TensorType:
    """Dimensions of size one become larger; with no channels yet, the new ones are free to go."""
    shift = len(call.out) - len(input.shape)
    for _ in range(shift):
        input = insert(input, 0)
    blocks = input.blocks or free_blocks(call, input.shape, flat(sizes))
    return TensorType(tuple(call.out), blocks)


def free_blocks(call: Call, shape: Sequence[int], sizes: Sequence[Any]) -> tuple[Block, ...]:
    """Fresh atoms where a literal size makes one value many."""
    literal = _literal_sizes(call, sizes)
    grown = [d for d, n in enumerate(call.out) if n > 1 and shape[d] == 1 and literal[d]]
    return tuple(Block((d,), call.relations.found(call.out[d]), zero=False) for d in grown)


def _literal_sizes(call: Call, sizes: Sequence[Any]) -> list[bool]:
    if call.node is None:
        return [isinstance(s, int) for s in sizes] or [False] * len(call.out)
    written = flat(tuple(call.node.args[1:]))
    if len(written) != len(call.out):
        return [False] * len(call.out)
    return [isinstance(s, int) for s in written]


@literals(*spellings("expand", "broadcast_to"))
def expand_literals(edit: Edit) -> None:
    """Each written size follows the result's."""
    first, *rest = edit.node.args
    sizes = tuple(edit.node.kwargs.get("size", ())) or flat(tuple(rest))
    new = mended(edit, sizes, edit.out.shape, edit.shape(edit.out))
    edit.node.args, edit.node.kwargs = (
        (first, *new) if edit.node.op == "call_method" else (first, new),
        {},
    )


@rule(*spellings("repeat_interleave"))
def repeat_interleave(
    call: Call, input: TensorType, repeats: Any, dim: int | None = None, **_: Any
) -> TensorType:
    """Each index several times in a row."""
    if dim is None or not isinstance(repeats, int):
        call.freeze(input, "repeats it by a tensor, or flattens it")
        return TensorType(tuple(call.out))
    dim = dimension(dim, len(input.shape))
    index = np.repeat(np.arange(input.shape[dim]), repeats)
    return take(call.relations, input, dim, index, f"`{call.label}`")


@rule(*spellings("flip"))
def flip(call: Call, input: TensorType, *dims: Any) -> TensorType:
    """Indices in reverse."""
    for dim in flat(dims):
        d = dimension(dim, len(input.shape))
        index = np.arange(input.shape[d])[::-1]
        input = take(call.relations, input, d, index, f"`{call.label}`")
    return input


@rule(*spellings("roll"))
def roll(call: Call, input: TensorType, shifts: Any, dims: Any = None) -> TensorType:
    """Indices rotated."""
    if dims is None:
        call.freeze(input, "rolls it flattened")
        return TensorType(tuple(call.out))
    for shift, dim in _pairs(shifts, dims):
        d = dimension(dim, len(input.shape))
        index = np.roll(np.arange(input.shape[d]), shift)
        input = take(call.relations, input, d, index, f"`{call.label}`")
    return input


def _pairs(shifts: Any, dims: Any) -> list[tuple[Any, Any]]:
    if isinstance(dims, int):
        return [(shifts, dims)]
    return list(zip(shifts if isinstance(shifts, (tuple, list)) else [shifts], dims, strict=True))


@literals(*spellings("roll"))
def roll_literals(edit: Edit) -> None:
    """A shift by n becomes one by those that are kept among the last n."""
    names = dict(zip(("input", "shifts", "dims"), edit.node.args, strict=False)) | edit.node.kwargs
    source = edit.type_of(names["input"])
    new = []
    for shift, dim in _pairs(names["shifts"], names["dims"]):
        alive = edit.alive(source, dimension(dim, len(source.shape)))
        n = shift % len(alive)
        new.append(shift if stays(alive) else int(alive[len(alive) - n :].sum()))
    single = isinstance(names["shifts"], int)
    edit.node.args = (names["input"], new[0] if single else tuple(new), names["dims"])
    edit.node.kwargs = {}


@rule(*spellings("channel_shuffle"))
def channel_shuffle(call: Call, input: TensorType, groups: int) -> TensorType:
    """Channels in another order: groups may become unequal, the order is then written out."""
    order = shuffled(input.shape[1], groups)
    return take(call.relations, input, 1, order, f"`{call.label}`")


def shuffled(channels: int, groups: int) -> Atoms:
    """Which channel comes where when ``groups`` rows of channels are interleaved.

    >>> shuffled(6, 2).tolist()
    [0, 3, 1, 4, 2, 5]
    """
    return np.arange(channels).reshape(groups, -1).T.ravel()


@literals(*spellings("channel_shuffle"))
def channel_shuffle_literals(edit: Edit) -> None:
    """Where the groups no longer keep the same channels, an index says the order."""
    first, groups = edit.node.args
    alive = edit.alive(edit.type_of(first), 1)
    rows = alive.reshape(groups, -1)
    if (rows == rows[0]).all() and (rows <= 1).all():
        return
    kept = renumbered(alive, shuffled(len(alive), groups))
    edit.node.op, edit.node.target = "call_method", "index_select"
    edit.node.args = (first, 1, edit.constant("order", torch.from_numpy(kept)))


@rule(*spellings("pixel_shuffle", "pixel_unshuffle"))
def pixel_shuffle(
    call: Call, input: TensorType, upscale_factor: int = 0, downscale_factor: int = 0
) -> TensorType:
    """Blocks of ``factor²`` channels turn into pixels, or back."""
    *batch, c, h, w = input.shape
    factor = upscale_factor or downscale_factor
    k, up = len(batch), call.out[-1] > w
    if up:
        seen = call.reshape(input, (*batch, c // factor**2, factor, factor, h, w))
        order = [*range(k), k, k + 3, k + 1, k + 4, k + 2]
    else:
        seen = call.reshape(input, (*batch, c, h // factor, factor, w // factor, factor))
        order = [*range(k), k, k + 2, k + 4, k + 1, k + 3]
    return call.reshape(permute(seen, order), tuple(call.out))
