"""Nests of tensors, shapes and types: tuples, lists and dictionaries of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fxsvd.axes import TensorType
from fxsvd.capture import concrete


def shapes_of(value: Any) -> Any:
    """Concrete shapes (batch at its hint) of a nest of tensors; other values as they are."""
    if isinstance(value, torch.Tensor):
        return torch.Size([concrete(size) for size in value.shape])
    if isinstance(value, torch.SymInt):
        return concrete(value)
    if isinstance(value, dict):
        return {k: shapes_of(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        return tuple(shapes_of(v) for v in value)
    return value


def has_tensor(shapes: Any) -> bool:
    """Whether a nest of shapes has the shape of any tensor."""
    if isinstance(shapes, torch.Size):
        return True
    items: Iterable[Any] = shapes.values() if isinstance(shapes, dict) else ()
    items = shapes if isinstance(shapes, tuple) else items
    return any(has_tensor(item) for item in items)


def plain(shapes: Any) -> Any:
    """The same nest with tuples for sizes."""
    if isinstance(shapes, torch.Size):
        return tuple(shapes)
    return tuple(plain(s) for s in shapes) if isinstance(shapes, tuple) else shapes


def shapes_of_types(value: Any) -> Any:
    """The shapes of a nest of types."""
    if isinstance(value, TensorType):
        return value.shape
    if isinstance(value, (tuple, list)):
        return tuple(shapes_of_types(v) for v in value)
    return value


def flatten(value: Any) -> list[TensorType]:
    """All tensor types in a nest."""
    if isinstance(value, TensorType):
        return [value]
    items: Iterable[Any] = value.values() if isinstance(value, dict) else ()
    items = value if isinstance(value, (tuple, list)) else items
    return [t for item in items for t in flatten(item)]


def attribute(root: nn.Module, path: str) -> Any:
    """The attribute at a dotted path."""
    value: Any = root
    for part in path.split("."):
        value = getattr(value, part)
    return value
