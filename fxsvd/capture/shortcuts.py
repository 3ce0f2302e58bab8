"""The commonest layers on fakes, without computing their symbolic shapes.

Each function returns the result or its likeness, or None where torch has to be asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxsvd.capture.memo import is_simple


def _linear(source: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    if weight.dim() != 2 or source.shape[-1] != weight.shape[1] or not _is_plain(source, weight):
        return None
    shape = (*source.shape[:-1], weight.shape[0])
    return torch.empty(shape, dtype=source.dtype, device=source.device)


def _layer_norm(
    source: Tensor, shape: Any, weight: Tensor | None = None, *_: Any, **__: Any
) -> Tensor | None:
    if weight is None or not tuple(source.shape[-weight.dim() :]) == tuple(shape) == weight.shape:
        return None
    return source if _is_plain(source, weight) else None


def _batch_norm(source: Tensor, mean: Tensor | None, *_: Any, **__: Any) -> Tensor | None:
    if mean is None or source.dim() < 2 or source.shape[1] != mean.shape[0]:
        return None
    return source if _is_plain(source, mean) else None


def _is_plain(source: Tensor, weight: Tensor) -> bool:
    """Whether a layer's result is contiguous, and of the dtype and device of its input."""
    return (
        source.dtype == weight.dtype
        and source.device == weight.device
        and not torch.is_autocast_enabled(source.device.type)
        and is_simple(source)
        and source.is_contiguous()
    )


SHORTCUTS: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    F.linear: _linear,
    F.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
}
"""The commonest layers, whose symbolic shapes are slow to compute: the result or its likeness."""
