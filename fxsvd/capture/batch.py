"""The symbolic batch size, and the integer that stands for it."""

from __future__ import annotations

from typing import Any

import torch

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
"""Types of the numbers computed from a symbolic size."""

BATCH_HINT = 13
"""The size that stands for the batch wherever one integer is needed: a prime rare in networks."""


def concrete(value: int | torch.SymInt) -> int:
    """Turns a size into an integer, the symbolic batch counting as `BATCH_HINT`.

    Args:
        value: A size or any integer computed from sizes, as found in `node.meta["val"]`.

    Example:
        >>> concrete(7)
        7
    """
    if isinstance(value, int):
        return value
    node: Any = value.node
    return int(node.hint)
