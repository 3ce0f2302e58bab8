"""Ops that reduce or normalise along dimensions.

Sums and norms ignore silent zeros. Means, variances and extrema over narrowed channels are, like
those of a layer norm, taken over the channels that survive (``SURVIVORS`` names them; the verifier
compares against exactly that). Anything that ranks or mixes along an axis fixes it.
"""

from __future__ import annotations

from typing import Any

import torch

from fxsvd.axes import TensorType, contract, dimension, insert
from fxsvd.rules.registry import Call, rule, spellings

SUMS = spellings("sum", "norm", "vector_norm", "count_nonzero", "nansum")
SURVIVORS = spellings("mean", "var", "std", "amax", "amin", "max", "min", "var_mean", "std_mean")
MIXES = spellings(
    *("softmax", "log_softmax", "softmin", "gumbel_softmax", "cumsum", "cumprod", "logcumsumexp"),
    *("sort", "argsort", "topk", "kthvalue", "msort", "diff"),
)
COLLAPSES = spellings(
    *("argmax", "argmin", "logsumexp", "prod", "all", "any", "median", "mode", "quantile"),
)


def dims_of(rank: int, dim: Any) -> list[int]:
    """The reduced dimensions, counted from the front; None means all."""
    if dim is None or dim == () or dim == []:
        return list(range(rank))
    return [dimension(d, rank) for d in ([dim] if isinstance(dim, int) else dim)]


def reduced(call: Call, t: TensorType, dims: list[int]) -> Any:
    """Drop the reduced dimensions, or keep them with size one, as the result does."""
    out = contract(call.relations, t, dims, f"`{call.label}`")
    shape = call.out if isinstance(call.out, torch.Size) else call.out[0]
    if len(shape) == len(t.shape):
        for dim in sorted(dims):
            out = insert(out, dim)
    return out if isinstance(call.out, torch.Size) else tuple(out for _ in call.out)


@rule(*SUMS)
def total(call: Call, input: TensorType, *args: Any, **kwargs: Any) -> Any:
    """A sum or a norm: silent zeros do not matter."""
    named = {torch.norm, "norm", torch.linalg.norm, torch.linalg.vector_norm}
    place = 1 if call.node is not None and call.node.target in named else 0
    dim = kwargs.get("dim", args[place] if len(args) > place else None)
    return reduced(call, input, dims_of(len(input.shape), dim))


@rule(*SURVIVORS)
def over_survivors(call: Call, input: TensorType, *args: Any, **kwargs: Any) -> Any:
    """A statistic of the channels that survive (two tensors: elementwise)."""
    if args and isinstance(args[0], TensorType):
        return call.combine(input, args[0])
    dim = kwargs.get("dim", args[0] if args else None)
    if isinstance(dim, bool):  # var(unbiased)
        dim = None
    return reduced(call, input.with_zero(True), dims_of(len(input.shape), dim))


DIM_PLACES = {"topk": 1, "kthvalue": 1, "diff": 1, "gumbel_softmax": 3}  # else directly behind


@rule(*MIXES)
def mixes(call: Call, input: TensorType, *args: Any, **kwargs: Any) -> Any:
    """Keeps the shape, mixes along one dimension."""
    name = "" if call.node is None else str(getattr(call.node.target, "__name__", call.node.target))
    place = DIM_PLACES.get(name, 0)
    dim = 0 if name == "msort" else kwargs.get("dim", args[place] if len(args) > place else -1)
    t = call.fix(input, dims_of(len(input.shape), dim), "mixes along it").with_zero(False)
    if isinstance(call.out, torch.Size):
        return TensorType(tuple(call.out), t.blocks)
    return tuple(TensorType(tuple(shape), t.blocks) for shape in call.out)


@rule(*COLLAPSES)
def collapses(call: Call, input: TensorType, dim: Any = None, *_: Any, **__: Any) -> Any:
    """Drops dimensions whose every index matters."""
    dims = dims_of(len(input.shape), dim)
    return reduced(call, call.fix(input, dims, "reduces it").with_zero(False), dims)
