"""The networks and the training of the evolve_*.py scripts. Not a command.

Residual blocks of two convolutions, whose skip tiles the block's input, without batch norm, as
J. Dejaegher describes them (*SVD evolutive CNN*, 2021). He gives the widths of the MNIST network;
those of the other two are chosen to have the size that he reports.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import data
import torch
from lnr_retrain import shifted
from networks import accuracy
from torch import Tensor, nn
from torch.nn import functional as F

import fxsvd
from fxsvd.cost import parameters

HELD_OUT, BATCH, DECAY = 5000, 64, 1e-2
LAST_RATE = 2e-5
Widths = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Task:
    """A data set, and a network for it.

    Attributes:
        dataset: a name that ``data.load`` knows.
        prepare: what uint8 images go through.
        size: height and width of the images.
        blocks: channels before, inside and after each block.
        pooled: the blocks with a max-pool behind them.
        flipped: whether a mirrored image is as good.
        half: whether layers compute in bfloat16 in training (under autocast).
        rate: the learning rate before it falls.
    """

    dataset: str
    prepare: data.Prepare
    size: int
    blocks: Widths
    pooled: tuple[int, ...]
    flipped: bool = False
    half: bool = False
    rate: float = 2e-3

    def network(self, blocks: Widths | None = None) -> nn.Module:
        """A new one, of other widths where they are given."""
        side = self.size >> len(self.pooled)
        return Evolutive(blocks or self.blocks, self.pooled, side * side)


TASKS = {
    "mnist": Task(
        "mnist",
        data.MNIST,
        28,
        (
            (1, 7, 24),
            (24, 48, 72),
            (72, 100, 120),
            (120, 140, 160),
            (160, 180, 200),
            (200, 200, 200),
        ),
        pooled=(1, 3),
    ),
    "fashion_mnist": Task(
        "fashion_mnist",
        data.FASHION_MNIST,
        28,
        ((1, 8, 16), (16, 24, 32), (32, 48, 64), (64, 64, 80), (80, 80, 96), (96, 96, 96)),
        pooled=(1, 3),
        flipped=True,
    ),
    "cifar10": Task(
        "cifar10",
        data.CIFAR10,
        32,
        (
            (3, 24, 32),
            (32, 32, 32),
            (32, 48, 48),
            (48, 48, 64),
            (64, 80, 80),
            (80, 96, 96),
            (96, 96, 112),
            (112, 128, 128),
            (128, 136, 144),
            (144, 144, 152),
            (152, 160, 160),
            (160, 160, 160),
        ),
        pooled=(2, 5, 8),
        flipped=True,
        half=True,
        rate=1e-3,
    ),
}


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
    """Blocks, a max-pool behind some of them, and a linear layer on all pixels that are left."""

    def __init__(self, blocks: Widths, pooled: tuple[int, ...], pixels: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(*widths) for widths in blocks)
        self.head = nn.Linear(blocks[-1][2] * pixels, 10)
        self.pooled = pooled

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in self.pooled:
                x = F.max_pool2d(x, 2)
        return self.head(x.flatten(1))


class Run:
    """One network in training, with an evolver.

    Steered by 5,000 training images that are held out; the test set is for the end.

    Args:
        task: the data set and network.
        root: the data.
        work: decoded images.
        blocks: other widths than the task's.
        seed: of the weights and batches.
    """

    def __init__(
        self, task: Task, root: Path, work: Path, blocks: Widths | None = None, seed: int = 0
    ) -> None:
        self.task, self.root, self.work, self.blocks = task, root, work, blocks
        images, labels = data.load(task.dataset, root, work, train=True)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        images, labels = images[order], labels[order]
        self.held = task.prepare(images[:HELD_OUT]), labels[:HELD_OUT]
        self.images, self.labels = images[HELD_OUT:], labels[HELD_OUT:]
        self.generator, self.steps = torch.Generator().manual_seed(seed), 0
        torch.manual_seed(seed)
        self.evolver = self.fresh(task.network(blocks))

    def fresh(self, network: nn.Module) -> fxsvd.Evolver:
        """A new optimizer and evolver for a network."""
        optimizer = torch.optim.AdamW(
            network.parameters(), self.task.rate, weight_decay=DECAY, fused=True
        )
        return fxsvd.Evolver(
            network,
            self.held[0][:2],
            optimizer,
            loss=lambda net: 200 - self.right(net),
            max_loss_increase=0.01,
        )

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to what ``evolver.state_dict()`` gave."""
        self.evolver = self.fresh(self.task.network(self.blocks))
        self.evolver.load_state_dict(state)

    def save(self, path: Path) -> None:
        """Keep everything that ``load`` needs to go on as if nothing had happened."""
        state = self.evolver.state_dict(), self.steps, self.generator.get_state()
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        """Go on from what was saved."""
        state, self.steps, drawn = torch.load(path, weights_only=False)
        self.restore(state)
        self.generator.set_state(drawn)

    @property
    def size(self) -> int:
        """Parameters."""
        return parameters(self.evolver.model)

    def right(self, network: nn.Module) -> float:
        """The share of the held-out images that is right, in %: 1 % of 200 minus it is a point."""
        return 100 * accuracy(network, *self.held)

    def test(self) -> float:
        """The share of the test set that is right, in %."""
        images, labels = data.load(self.task.dataset, self.root, self.work, train=False)
        return 100 * accuracy(self.evolver.model.eval(), self.task.prepare(images), labels)

    def samples(self, count: int) -> Any:
        """Training images as the network sees them, in batches of 100."""
        chosen = torch.randperm(len(self.images), generator=self.generator)[:count]
        return self._seen(chosen).split(100)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Training images, shifted and perhaps mirrored, and their labels."""
        chosen = torch.randint(len(self.images), (BATCH,), generator=self.generator)
        return self._seen(chosen), self.labels[chosen]

    def _seen(self, chosen: Tensor) -> Tensor:
        images = self.images[chosen]
        if self.task.flipped:
            mirrored = torch.rand(len(images), generator=self.generator) < 0.5
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
        return self.task.prepare(shifted(images, self.generator))

    def train(self, steps: int, begin: float | None = None, end: float | None = None) -> None:
        """Some steps, with a rate that goes evenly from one number to another (the task's)."""
        begin, end = begin or self.task.rate, end or self.task.rate
        model, optimizer = self.evolver.model.train(), self.evolver.optimizer
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = begin + (end - begin) * step / steps
            inputs, labels = self.batch()
            with torch.autocast("cpu", torch.bfloat16, enabled=self.task.half):
                outputs = model(inputs)
            loss = F.cross_entropy(outputs.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        self.steps += steps

    def finish(self, epochs: float) -> float:
        """Train with a falling rate; the share of the held-out images that is right, in %."""
        self.train(int(epochs * len(self.images) / BATCH), end=LAST_RATE)
        return self.right(self.evolver.model.eval())
