"""A network to resize while it trains."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """A stream with batch norm, and a branch some of whose channels are dead."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        # No bias in front of the norm: its gradient is rounding, and Rprop steps by the sign.
        self.stem, self.norm = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.a, self.b = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 3)
        with torch.no_grad():
            for tensor in (self.a.weight[::3], self.b.weight[:, ::3]):
                tensor.zero_()
            self.a.bias[::3] = -1.0

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.head((x + self.b(F.relu(self.a(x)))).mean((2, 3)))
