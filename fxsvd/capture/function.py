"""A ``torch.autograd.Function`` in a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class CustomFunction(nn.Module):
    """An autograd function of the model's, kept whole: its backward pass is its own.

    Args:
        function: The class whose ``apply`` is called.

    Example:
        >>> class Double(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         return 2 * x
        >>> CustomFunction(Double)(torch.ones(1)).item()
        2.0
    """

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Applies the function."""
        return self.function.apply(*args, **kwargs)

    def extra_repr(self) -> str:
        """Shows the function's name."""
        return self.function.__name__
