"""Ops that make tensors: constants can have any width, counted or random ones cannot."""

from __future__ import annotations

from typing import Any

import torch

from fxsvd.axes import Block, TensorType
from fxsvd.rules.movement import flat, mended
from fxsvd.rules.registry import Call, Edit, literals, rule, spellings

ZEROS = (torch.zeros, torch.empty, "new_zeros", "new_empty")
OTHERS = (torch.ones, torch.full, "new_ones", "new_full")
LIKE_ZEROS = spellings("zeros_like", "empty_like")
LIKE_OTHERS = spellings("ones_like", "full_like", "rand_like", "randn_like", "bernoulli", "uniform")
COUNTED = (
    *(torch.arange, torch.linspace, torch.eye, torch.tensor, torch.rand, torch.randn),
    *(torch.randint, torch.randperm, torch.meshgrid, torch.as_tensor, torch.logspace),
)
MASKS = spellings("tril", "triu")


@rule(*ZEROS)
def zeros(call: Call, *args: Any, **kwargs: Any) -> TensorType:
    """Zeros of a literal size."""
    return _uniform(call, zero=True)


@rule(*OTHERS)
def uniform(call: Call, *args: Any, **kwargs: Any) -> TensorType:
    """One value everywhere."""
    return _uniform(call, zero=False)


def _uniform(call: Call, *, zero: bool) -> TensorType:
    literal = _sizes(call.node) if call.node is not None else tuple(call.out)
    blocks = tuple(
        Block((d,), call.relations.found(n), zero)
        for d, (n, written) in enumerate(zip(call.out, literal, strict=True))
        if n > 1 and isinstance(written, int) and n < 1 << 20
    )
    return TensorType(tuple(call.out), blocks)


def _sizes(node: torch.fx.Node) -> tuple[Any, ...]:
    args: Any = node.args[1:] if node.op == "call_method" else node.args
    written: Any = node.kwargs.get("size", ()) or flat(args)
    if written and isinstance(written[0], (tuple, list)):  # full(size, value)
        written = written[0]
    return tuple(written)


@literals(*ZEROS, *OTHERS)
def size_literals(edit: Edit) -> None:
    """Each written size follows the result's."""
    node = edit.node
    first = node.args[:1] if node.op == "call_method" else ()
    sizes = _sizes(node)
    new = mended(edit, sizes, edit.out.shape, edit.shape(edit.out))
    rest = node.args[len(first) :]
    full = bool(rest) and isinstance(rest[0], (tuple, list))
    node.args = (*first, new, *(rest[1:] if full else ()))
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "size"}


@rule(*LIKE_ZEROS)
def zeros_like(call: Call, input: TensorType, *_: Any, **__: Any) -> TensorType:
    """Zeros in the shape of another tensor."""
    return input.with_zero(True)


@rule(*LIKE_OTHERS)
def ones_like(call: Call, input: TensorType, *_: Any, **__: Any) -> TensorType:
    """Values in the shape of another tensor."""
    return input.with_zero(False)


@rule(*MASKS)
def triangle(call: Call, input: TensorType, *_: Any, **__: Any) -> TensorType:
    """A triangle of the last two dimensions."""
    rank = len(input.shape)
    return call.fix(input, (rank - 2, rank - 1), "takes a triangle of it")


@rule(*COUNTED)
def counted(call: Call, *_: Any, **__: Any) -> Any:
    """Numbers that depend on the size."""
    return call.fixed()
