"""Ops that contract axes: linear, matmul, einsum, convolution, embedding."""

from __future__ import annotations

import operator
import string
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from fxsvd.axes import Block, TensorType
from fxsvd.rules.registry import Call, Edit, literals, rule, spellings

LETTERS = string.ascii_letters


def vector_on(call: Call, t: TensorType, vector: TensorType | None, dim: int) -> TensorType:
    """Combine a per-channel parameter with dimension ``dim`` (bias, gain)."""
    if vector is None:
        return t
    shape = (*vector.shape, *(1 for _ in t.shape[dim + 1 :]))
    return call.combine(t, call.reshape(vector, shape))


@rule(*spellings("linear"))
def linear(
    call: Call, input: TensorType, weight: TensorType, bias: TensorType | None = None
) -> TensorType:
    """``x Wᵀ + b``."""
    batch = LETTERS[: len(input.shape) - 1]
    out = call.einsum(
        [(batch + "Y", input), ("ZY"[-len(weight.shape) :], weight)],
        batch + "Z"[: len(weight.shape) - 1],
    )
    return out if bias is None else call.combine(out, bias)


@rule(*spellings("matmul", "bmm", "mm", "mv", "dot", "inner_product"), operator.matmul)
def matmul(call: Call, input: TensorType, other: TensorType, **_: Any) -> TensorType:
    """Batched matrix product with broadcasting."""
    a, b = len(input.shape), len(other.shape)
    batch = LETTERS[: max(a, b, 2) - 2]
    left = (batch[len(batch) - (a - 2) :] if a > 2 else "") + ("XY" if a > 1 else "Y")
    right = (batch[len(batch) - (b - 2) :] if b > 2 else "") + ("YZ" if b > 1 else "Y")
    return call.einsum(
        [(left, input), (right, other)],
        batch + ("X" if a > 1 else "") + ("Z" if b > 1 else ""),
    )


@rule(*spellings("addmm", "addbmm", "baddbmm", "addmv"))
def addmm(call: Call, input: TensorType, a: TensorType, b: TensorType, **_: Any) -> TensorType:
    """A matrix product plus something."""
    product = matmul(call, a, b)
    if len(product.shape) > len(call.out):  # addbmm sums over the batch
        product = call.contract(product, (0,))
    return call.combine(input, product)


@rule(*spellings("outer", "ger"))
def outer(call: Call, input: TensorType, other: TensorType) -> TensorType:
    """``x yᵀ``."""
    return call.einsum([("a", input), ("b", other)], "ab")


@rule(torch.einsum)
def einsum(call: Call, equation: str, *operands: Any) -> TensorType:
    """``torch.einsum`` with letters and at most a leading ellipsis."""
    types = operands[0] if isinstance(operands[0], (tuple, list)) else operands
    left, arrow, right = equation.replace(" ", "").partition("->")
    names = left.split(",")
    if not arrow:
        letters = sorted(set(left) - {",", "."})
        right = "".join(c for c in letters if left.count(c) == 1)
        right = "..." + right if "..." in left else right
    spare = [c for c in LETTERS if c not in left]
    extra = max(len(t.shape) - len(n.replace("...", "")) for n, t in zip(names, types, strict=True))
    dots = "".join(spare[:extra])
    return call.einsum(
        [(_undot(n, dots, len(t.shape)), t) for n, t in zip(names, types, strict=True)],
        right.replace("...", dots),
    )


def _undot(names: str, dots: str, rank: int) -> str:
    missing = rank - len(names.replace("...", ""))
    return names.replace("...", dots[len(dots) - missing :])


@rule(torch.embedding)
def swapped_embedding(call: Call, weight: TensorType, input: TensorType, *_: Any) -> TensorType:
    """The same with the weight in front."""
    out: TensorType = embedding(call, input, weight)
    return out


@rule(F.embedding)
def embedding(call: Call, input: TensorType, weight: TensorType, *_: Any, **__: Any) -> TensorType:
    """Rows of the weight by number; the vocabulary stays."""
    weight = call.fix(weight, (0,), "looks rows up by number")
    call.produced(weight, (1,))
    shift = len(input.shape) - 1
    blocks = tuple(Block(tuple(d + shift for d in b.dims), b.atoms, b.zero) for b in weight.blocks)
    return TensorType((*input.shape, weight.shape[1]), blocks)


# ---------------------------------------------------------------- convolution


CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d)
TRANSPOSED = (
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
)


@rule(*dict.fromkeys(CONVOLUTIONS))
def convolution(
    call: Call,
    input: TensorType,
    weight: TensorType,
    bias: TensorType | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> TensorType:
    """``weight`` is ``[out, in / groups, …]``; of the kernel nothing can go, nor of positions."""
    passing = _passing(input, weight, stride, padding) if groups == 1 else []
    return _convolve(call, input, weight, bias, groups, "oi", passing)


def _passing(x: TensorType, w: TensorType, stride: Any, padding: Any) -> list[int]:
    """Dimensions of channels that a kernel of size one leaves alone (it convolves a stack)."""
    kernel, first = w.shape[2:], len(x.shape) - len(w.shape) + 2
    if not x.touches(range(first, len(x.shape))):
        return []
    strides, pads = (
        tuple(n) if isinstance(n, (tuple, list)) else (n,) * len(kernel) for n in (stride, padding)
    )
    return [
        first + i
        for i, size in enumerate(kernel)
        if size == 1 and strides[i] == 1 and pads[i] in (0, "same", "valid")
    ]


@rule(*dict.fromkeys(TRANSPOSED))
def transposed(
    call: Call,
    input: TensorType,
    weight: TensorType,
    bias: TensorType | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> TensorType:
    """``weight`` is ``[in, out / groups, …]``."""
    return _convolve(call, input, weight, bias, groups, "io")


def _convolve(
    call: Call,
    x: TensorType,
    w: TensorType,
    bias: TensorType | None,
    groups: int,
    order: str,
    passing: Sequence[int] = (),
) -> TensorType:
    kernel = len(w.shape) - 2
    channel = len(x.shape) - kernel - 1
    x = _channels_only(call, x, channel + 1, passing)
    w = _channels_only(call, w, 2)
    batch, behind = LETTERS[:channel], LETTERS[channel : len(x.shape) - 1]
    if groups == 1:
        out = call.einsum([(batch + "i" + behind, x), (order, w)], batch + "o" + behind)
    else:
        out = _grouped(call, x, w, groups, channel, order)
    out = vector_on(call, out, bias, channel)
    if call.out[channel] != out.shape[channel]:  # by an in-place transpose of the result
        raise ValueError("its result changes shape in place")
    return TensorType(tuple(call.out), out.blocks)


def _channels_only(call: Call, t: TensorType, rank: int, passing: Sequence[int] = ()) -> TensorType:
    """The leading dimensions; channels along the others cannot go, but for those ``passing``."""
    t = call.fix(t, set(range(rank, len(t.shape))).difference(passing), "slides along it")
    return t if passing else TensorType(t.shape[:rank], t.blocks, t.stored)


def _grouped(
    call: Call, x: TensorType, w: TensorType, groups: int, channel: int, order: str
) -> TensorType:
    """Each group by itself; one input a group (depthwise) ties inputs to outputs."""
    batch = LETTERS[:channel]
    per = x.shape[channel] // groups
    x = call.reshape(x, (*x.shape[:channel], groups, per, *x.shape[channel + 1 :]))
    w = call.reshape(w, (groups, w.shape[0] // groups, w.shape[1]))
    if per == 1:
        x, w = _tie_depthwise(call, x, w, channel)
    else:
        x = call.fix(x, (channel,), "has a fixed number of groups")
        w = call.fix(w, (0,), "has a fixed number of groups")
    out = call.einsum([(batch + "gi", x), ("g" + order, w)], batch + "go")
    return call.reshape(out, (*out.shape[:channel], out.shape[channel] * out.shape[channel + 1]))


def _tie_depthwise(
    call: Call, x: TensorType, w: TensorType, channel: int
) -> tuple[TensorType, TensorType]:
    """All outputs of a group live and die with its one input."""
    outputs = [d for d in (1, 2) if w.shape[d] > 1]
    w = call.fix(w, outputs, "has a fixed number of outputs per group") if outputs else w
    return x, w


@literals(*dict.fromkeys(CONVOLUTIONS))
def convolution_literals(edit: Edit) -> None:
    """The group count of a depthwise convolution follows its channels."""
    _mend_groups(edit, 6)


@literals(*dict.fromkeys(TRANSPOSED))
def transposed_literals(edit: Edit) -> None:
    """The group count of a depthwise convolution follows its channels."""
    _mend_groups(edit, 7)


def _mend_groups(edit: Edit, place: int) -> None:
    node = edit.node
    groups = node.kwargs.get("groups", node.args[place] if len(node.args) > place else 1)
    x, w = edit.type_of(node.args[0]), edit.type_of(node.args[1])
    channel = len(x.shape) - len(w.shape) + 1
    if groups == 1 or x.shape[channel] != groups:
        return
    new = edit.shape(x)[channel]
    if "groups" in node.kwargs:
        node.kwargs = {**node.kwargs, "groups": new}
    else:
        node.args = (*node.args[:place], new, *node.args[place + 1 :])


def grouped_weight(call: Call, shape: tuple[int, ...], groups: int, order: str) -> TensorType:
    """Fresh atoms for a grouped weight: each group may keep other inputs.

    ``[out, in / groups]`` (or ``[in, out / groups]``): the second axis depends on the group, so its
    block spans both.
    """
    first = call.relations.fresh(shape[0])
    blocks = [Block((0,), first)] if shape[0] > 1 else []
    if shape[1] > 1:
        second = call.relations.fresh(groups, shape[1])
        blocks.append(Block((0, 1), second.repeat(shape[0] // groups, axis=0)))
    return TensorType(shape, tuple(blocks), stored=True)
