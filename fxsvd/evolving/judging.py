"""Whether a resize costs too much."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxsvd.cost import evaluating
from fxsvd.data import ranks

Loss = Callable[[nn.Module], Any]


@torch.no_grad()
def judged(loss: Loss | None, network: nn.Module) -> float | None:
    """The loss of a network in eval mode, the mean over all ranks, so that they decide alike.

    >>> judged(lambda net: torch.tensor(0.5 if net.training else 0.25), nn.ReLU())
    0.25
    >>> judged(None, nn.ReLU())
    """
    if loss is None:
        return None
    with evaluating(network):
        own = float(loss(network))
    return float(ranks.gathered([own]).mean())


def too_much(before: float | None, after: float | None, allowed: float) -> bool:
    """Whether a loss rose more than is allowed, relative to the one before; NaN always did.

    >>> too_much(2.0, 2.1, 0.1), too_much(2.0, 2.3, 0.1), too_much(2.0, float("nan"), 0.1)
    (False, True, True)
    """
    if before is None or after is None:
        return False
    return not after <= before + allowed * abs(before)
