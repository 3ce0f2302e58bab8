"""A network to resize while it trains, data and optimizers to train it with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxsvd

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True),
    "adam, foreach": lambda p: torch.optim.Adam(p, lr=1e-2, foreach=True),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=5e-3),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
}


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


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 2, 5, 5, generator=generator).double()
    return x, (x.mean((1, 2, 3)) * 20).long().clamp(0, 2)


def train(model: nn.Module, optimizer: Any, seeds: range, *others: Any) -> float:
    loss = torch.zeros(())
    for seed in seeds:
        x, y = batch(seed)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        for other in others:
            other.step()
    return float(loss.detach())


def made(kind: str = "adam", **options: Any) -> tuple[fxsvd.Evolver, Any]:
    net = Residual().double().train()
    optimizer = OPTIMIZERS[kind](net.parameters())
    return fxsvd.Evolver(net, batch(0)[0], optimizer, **options), optimizer
