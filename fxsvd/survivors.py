"""Norms and statistics over the channels that survive, computed on tensors of the full shape.

A layer norm over a narrowed space takes its mean over fewer channels; silencing the others with
zeros would not show that. These functions say exactly what is meant: each takes the input, a mask
(broadcastable, True where a channel stays), and then the op's own arguments; what a norm returns is
zero where a channel is dead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _mean(x: Tensor, mask: Tensor, dims: Any, keepdim: bool = True) -> Tensor:
    weight = mask.to(x.dtype).expand_as(x)
    count = weight.sum(dims, keepdim=keepdim).clamp(min=1)
    return (x * weight).sum(dims, keepdim=keepdim) / count


def _normalized(x: Tensor, mask: Tensor, dims: Sequence[int], eps: float) -> Tensor:
    mean = _mean(x, mask, dims)
    variance = _mean((x - mean).square(), mask, dims)
    return (x - mean) * torch.rsqrt(variance + eps) * mask


def layer_norm(
    x: Tensor,
    mask: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    """``F.layer_norm`` over the channels that stay."""
    out = _normalized(x, mask, tuple(range(-len(normalized_shape), 0)), eps)
    return _affine(out, weight, bias)


def rms_norm(
    x: Tensor,
    mask: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """``F.rms_norm`` over the channels that stay."""
    dims = tuple(range(-len(normalized_shape), 0))
    power = _mean(x.square(), mask, dims)
    out = x * torch.rsqrt(power + (torch.finfo(x.dtype).eps if eps is None else eps)) * mask
    return _affine(out, weight, None)


def group_norm(
    x: Tensor,
    mask: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``F.group_norm`` over the channels that stay."""
    grouped = (x.shape[0], num_groups, -1)
    seen, full = x.reshape(grouped), mask.expand_as(x).reshape(grouped)
    out = _normalized(seen, full, (2,), eps).reshape(x.shape)
    shape = (-1, *(1 for _ in x.shape[2:]))
    return _affine(out, *(None if v is None else v.reshape(shape) for v in (weight, bias)))


def batch_norm(x: Tensor, mask: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``F.batch_norm`` in training mode over the entries that stay (weight standardisation)."""
    names = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    given = dict(zip(names, args, strict=False)) | kwargs
    if not given.get("training"):
        return F.batch_norm(x, **given)
    dims = [d for d in range(x.dim()) if d != 1]
    out = _normalized(x, mask, dims, given.get("eps", 1e-5))
    shape = (-1, *(1 for _ in x.shape[2:]))
    values = (given.get("weight"), given.get("bias"))
    return _affine(out, *(None if v is None else v.reshape(shape) for v in values))


def torch_batch_norm(
    x: Tensor,
    mask: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    *_: Any,
) -> Tensor:
    """``torch.batch_norm``, which takes its arguments in another order."""
    return batch_norm(x, mask, mean, variance, weight, bias, training, momentum, eps)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _dims(args: tuple[Any, ...], kwargs: dict[str, Any], rank: int) -> tuple[Any, bool]:
    dim = kwargs.get("dim", args[0] if args and not isinstance(args[0], bool) else None)
    last = args[-1] if len(args) > 1 and isinstance(args[-1], bool) else False
    return (tuple(range(rank)) if dim is None else dim), bool(kwargs.get("keepdim", last))


def mean(x: Tensor, mask: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``torch.mean`` over the channels that stay."""
    dims, keepdim = _dims(args, kwargs, x.dim())
    return _mean(x, mask, dims, keepdim)


def var(x: Tensor, mask: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``torch.var`` over the channels that stay."""
    return var_mean(x, mask, *args, **kwargs)[0]


def std(x: Tensor, mask: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``torch.std`` over the channels that stay."""
    return var(x, mask, *args, **kwargs).sqrt()


def var_mean(x: Tensor, mask: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """``torch.var_mean`` over the channels that stay."""
    positional = tuple(a for a in args if not isinstance(a, bool))
    dims, keepdim = _dims(positional, kwargs, x.dim())
    flags = [a for a in args if isinstance(a, bool)]
    correction = kwargs.get("correction", int(kwargs.get("unbiased", flags[0] if flags else True)))
    center = _mean(x, mask, dims)
    weight = mask.to(x.dtype).expand_as(x)
    total = ((x - center).square() * weight).sum(dims, keepdim=keepdim)
    count = (weight.sum(dims, keepdim=keepdim) - correction).clamp(min=1)
    return total / count, _mean(x, mask, dims, keepdim)


def std_mean(x: Tensor, mask: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """``torch.std_mean`` over the channels that stay."""
    variance, center = var_mean(x, mask, *args, **kwargs)
    return variance.sqrt(), center


def _extremum(name: str, worst: float) -> Callable[..., Any]:
    function = getattr(torch, name)

    def over_survivors(x: Tensor, mask: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = function(x.masked_fill(~mask, worst), *args, **kwargs)
        values = out if isinstance(out, Tensor) else out[0]
        values.masked_fill_(values == worst, 0.0)  # nothing stays among those: silent
        return out

    return over_survivors


SURVIVING: dict[str, Callable[..., Any]] = {
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "group_norm": group_norm,
    "batch_norm": batch_norm,
    "torch.batch_norm": torch_batch_norm,
    "mean": mean,
    "var": var,
    "std": std,
    "var_mean": var_mean,
    "std_mean": std_mean,
    "amax": _extremum("amax", -torch.inf),
    "amin": _extremum("amin", torch.inf),
    "max": _extremum("max", -torch.inf),
    "min": _extremum("min", torch.inf),
}
