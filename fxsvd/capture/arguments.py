"""Turns what a model passes to calls and returns into what a node may hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxsvd.capture.batch import SYMBOLIC
from fxsvd.capture.origins import Origins
from fxsvd.capture.sizes import Sizes
from fxsvd.capture.writer import Writer
from fxsvd.errors import CaptureError

_LITERALS = (
    *(int, float, complex, bool, str, type(None), type(...)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


class Arguments:
    """Replaces tensors and symbolic sizes in a value by nodes.

    Args:
        origins: Knows the nodes of tensors.
        sizes: Makes the nodes of sizes.
        writer: Gets the nodes that build structures.
    """

    def __init__(self, origins: Origins, sizes: Sizes, writer: Writer) -> None:
        self._origins = origins
        self._sizes = sizes
        self._writer = writer

    def argument(self, value: Any) -> Any:
        """Turns a runtime value into what a node may hold: nodes and literals."""
        if isinstance(value, Tensor):
            return self._origins.node_of(value)
        if isinstance(value, SYMBOLIC):
            return self._sizes.value_of(value.node.expr)
        if isinstance(value, (tuple, list)):
            items = [self.argument(item) for item in value]
            if hasattr(value, "_fields"):
                return type(value)(*items)
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, dict):
            return {key: self.argument(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(*self.argument((value.start, value.stop, value.step)))
        return _literal(value)

    def output(self, value: Any) -> Any:
        """Like `argument`, but structures of the model's own types are built again by a node."""
        if hasattr(value, "__dataclass_fields__"):
            fields = {
                name: self.output(getattr(value, name)) for name in value.__dataclass_fields__
            }
            node = self._writer.graph.call_function(type(value), (), fields)
        elif isinstance(value, dict):
            items = {key: self.output(item) for key, item in value.items()}
            if type(value) is dict:
                return items
            node = self._writer.graph.call_function(type(value), (items,))
        elif isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
            parts = [self.output(item) for item in value]
            return parts if isinstance(value, list) else tuple(parts)
        else:
            return self.argument(value)
        self._writer.describe(node, value)
        return node


def _literal(value: Any) -> Any:
    if isinstance(value, _LITERALS):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, range):
        return list(value)
    raise CaptureError(
        f"a {type(value).__module__}.{type(value).__qualname__} cannot be part of a graph. Return "
        "and pass tensors, numbers and plain structures (Hugging Face models: use_cache=False)."
    )
