"""Example inputs: their structure, their tensors, their batch size and their device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxsvd.errors import CaptureError

PLAIN_TYPES = (bool, int, float, str, type(None))
"""Types of the constants that an input may hold, and in which eval and train mode may differ."""


def normalize_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Splits example inputs into the arguments and keyword arguments of a call.

    Args:
        example_inputs: A tensor, a tuple or list (arguments) or a mapping (keyword arguments).

    Example:
        >>> normalize_inputs({"x": 1})
        ((), {'x': 1})
    """
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def tensors(value: Any) -> list[Tensor]:
    """Lists the tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in tensors(item)]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors(item)]
    return []


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Applies a function to each tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        items = {key: map_tensors(function, item) for key, item in value.items()}
        return items if type(value) is dict else type(value)(**items)
    if isinstance(value, (tuple, list)):
        parts = [map_tensors(function, item) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def device_of(model: nn.Module, inputs: Any) -> torch.device:
    """Returns the device everything is on, meta aside."""
    weights = [*model.parameters(), *model.buffers()]
    if any(isinstance(weight, nn.UninitializedParameter) for weight in weights):
        raise CaptureError("the model has lazy layers without parameters: run it once first")
    places = {weight.device for weight in weights if weight.device.type != "meta"}
    given = {tensor.device for tensor in tensors(inputs) if tensor.device.type != "meta"}
    if len(places) == 1 and given and not given & places:
        (place,), other = places, next(iter(given))
        raise CaptureError(
            f"the example inputs are on {other} and the model is on {place}: move one of them"
        )
    return next(iter([*places, *given]), torch.device("cpu"))


def batch_size(inputs: Any) -> int | None:
    """Returns dimension 0 of the first tensor that has one, or None."""
    sizes = [tensor.shape[0] for tensor in tensors(inputs) if tensor.dim()]
    return sizes[0] if sizes else None


def is_batched(tensor: Tensor, batch: int | None) -> bool:
    """Whether dimension 0 of a tensor counts as the batch."""
    return tensor.dim() > 0 and tensor.shape[0] == batch


def require_plain(name: str, value: Any) -> None:
    """Raises if an input hides tensors where they would be taken for constants."""
    if isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            require_plain(name, item)
    elif not isinstance(value, (Tensor, *PLAIN_TYPES, torch.dtype, torch.device)):
        raise CaptureError(
            f"the input {name} holds a {type(value).__qualname__}: give tensors, numbers, strings, "
            "and tuples, lists and dicts of them"
        )
