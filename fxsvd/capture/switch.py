"""A constant that follows the mode of the module it is in."""

from __future__ import annotations

from typing import Any

from torch import nn


class Switch(nn.Module):
    """A constant that follows the module's mode, such as the rate of a functional dropout.

    Args:
        train_value: What a call returns in train mode.
        eval_value: What a call returns in eval mode.

    Example:
        >>> rate = Switch(train_value=0.1, eval_value=0.0)
        >>> rate(), rate.eval()()
        (0.1, 0.0)
    """

    def __init__(self, train_value: Any, eval_value: Any) -> None:
        super().__init__()
        self.train_value = train_value
        self.eval_value = eval_value

    def forward(self) -> Any:
        """Returns the value of the current mode."""
        return self.train_value if self.training else self.eval_value

    def extra_repr(self) -> str:
        """Shows both values."""
        return f"train={self.train_value!r}, eval={self.eval_value!r}"
