"""SVD-evolutive's MNIST network, resized while it trains: from 1,971,308 parameters to few.

Six residual blocks, whose skip tiles its input, as J. Dejaegher describes it (*SVD evolutive CNN*,
2021). While it trains, every so many steps all spaces are narrowed by ``Select``, refitted to what
their readers computed on training images; a resize that costs more than one point of accuracy is
undone, and half as much tried next. Then it is trained on at the final size. Steered by 5,000
training images that are held out; the test set is looked at once, at the end.

    python examples/reproduce/evolve.py --data DIR [--target 12500] [--epochs 10]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import data
import torch
from lnr_retrain import shifted
from networks import accuracy
from torch import Tensor, nn
from torch.nn import functional as F

import fxsvd
from fxsvd.cost import parameters
from fxsvd.passes import Select

BLOCKS = (
    (1, 7, 24),
    (24, 48, 72),
    (72, 100, 120),
    (120, 140, 160),
    (160, 180, 200),
    (200, 200, 200),
)
POOLED = (1, 3)  # blocks with a max-pool behind them
HELD_OUT, BATCH, RATE = 5000, 64, 2e-3
CALIBRATION = 1000


class _Block(nn.Module):
    def __init__(self, width_in: int, inner: int, width: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(width_in, inner, 3, padding=1)
        self.two = nn.Conv2d(inner, width, 3, padding=1)
        self.width, self.times = width, -(-width // width_in)

    def forward(self, x: Tensor) -> Tensor:
        skip = x.repeat(1, self.times, 1, 1)[:, : self.width]
        return F.leaky_relu(skip + self.two(F.leaky_relu(self.one(x), 0.2)), 0.2)


class Evolutive(nn.Module):
    """Inputs ``n×1×28×28``, 1,971,308 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(*widths) for widths in BLOCKS)
        self.head = nn.Linear(BLOCKS[-1][2] * 49, 10)

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in POOLED:
                x = F.max_pool2d(x, 2)
        return self.head(x.flatten(1))


class Experiment:
    """One network in training."""

    def __init__(self, root: Path) -> None:
        torch.manual_seed(0)
        images, labels = data.mnist(root, train=True)
        order = torch.randperm(len(images))
        images, labels = images[order], labels[order]
        self.held = data.MNIST(images[:HELD_OUT]), labels[:HELD_OUT]
        self.images, self.labels = images[HELD_OUT:], labels[HELD_OUT:]
        self.generator = torch.Generator().manual_seed(0)
        net = Evolutive()
        self.optimizer = torch.optim.AdamW(net.parameters(), RATE, weight_decay=1e-2)
        example = self.held[0][:2]
        self.evolver = fxsvd.Evolver(
            net, example, self.optimizer, loss=self.wrong, max_loss_increase=0.01, verify=False
        )

    def train(self, steps: int, last_rate: float = RATE) -> None:
        """Some steps on shifted images; the rate goes down to the last one."""
        model = self.evolver.model.train()
        for step in range(steps):
            for group in self.optimizer.param_groups:
                group["lr"] = RATE + (last_rate - RATE) * step / steps
            chosen = torch.randint(len(self.images), (BATCH,), generator=self.generator)
            x = data.MNIST(shifted(self.images[chosen], self.generator))
            loss = F.cross_entropy(model(x), self.labels[chosen])
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            self.optimizer.step()

    def wrong(self, network: nn.Module) -> float:
        """100 + the share of the held-out images that is wrong, in %: 1 % of it is a point."""
        return 200 - 100 * accuracy(network, *self.held)

    def shrink(self, ratio: float) -> float:
        """Narrow every space; the ratio for the next time."""
        chosen = torch.randperm(len(self.images), generator=self.generator)[:CALIBRATION]
        batches = data.MNIST(self.images[chosen]).split(100)
        start = time.perf_counter()
        event = self.evolver.resize(Select(ratio=ratio, chaining="top-down"), data=batches)
        seconds = time.perf_counter() - start
        print(f"{event}, {seconds:.1f} s", flush=True)
        if not event.plan.edits:  # of so few channels, that share is none
            return 2 * ratio
        return ratio / 2 if event.undone else ratio


def main() -> None:
    """Train, shrink, train on, and look at the test set."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", type=int, default=12_500, help="parameters, at most")
    parser.add_argument("--ratio", type=float, default=0.25, help="of the channels, each time")
    parser.add_argument("--pause", type=int, default=200, help="steps from one time to the next")
    parser.add_argument("--resizes", type=int, default=60, help="at most")
    parser.add_argument("--epochs", type=float, default=10, help="at the final size")
    options = data.parse(parser)
    run, start = Experiment(options.data), time.perf_counter()
    print(f"{parameters(run.evolver.model)} parameters")
    run.train(options.pause)
    ratio, left = options.ratio, options.resizes
    while parameters(run.evolver.model) > options.target and left:
        ratio, left = run.shrink(ratio), left - 1
        run.train(options.pause)
    for _ in range(5):
        run.train(int(options.epochs * len(run.images) / BATCH / 5), last_rate=RATE / 5)
        print(f"{200 - run.wrong(run.evolver.model.eval()):.2f} % of those held out", flush=True)
    images, labels = data.mnist(options.data, train=False)
    model = run.evolver.model.eval()
    right = 100 * accuracy(model, data.MNIST(images), labels)
    minutes = (time.perf_counter() - start) / 60
    print(f"{parameters(model)} parameters, {right:.2f} % of the test set, {minutes:.0f} minutes")


if __name__ == "__main__":
    main()
