"""The demonstration: train, compress, verify, fine-tune and export, in seconds and offline.

The data are the 1797 handwritten digits (8 by 8 pixels) that come with scikit-learn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxsvd.compile import compile as compile_
from fxsvd.cost import latencies, metric
from fxsvd.errors import FxsvdError
from fxsvd.export import export_onnx
from fxsvd.passes import Prune

FILE = "fxsvd-demo.onnx"
TEST = 360  # digits held out
BATCH = 64


class Block(nn.Module):
    """Two convolutions and a skip connection, projected where the shape changes."""

    def __init__(self, width_in: int, width_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width_out)
        self.skip: nn.Module = nn.Identity()
        if width_in != width_out:
            self.skip = nn.Conv2d(width_in, width_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C', H', W']``."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.skip(x))


class DigitNet(nn.Module):
    """A small residual network for 8 by 8 digits."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(
            Block(width, width), Block(width, 2 * width, stride=2), Block(2 * width, 2 * width)
        )
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Pixels ``[B, 1, 8, 8]`` to logits ``[B, 10]``."""
        x = F.relu(self.norm(self.stem(x)))
        x = self.blocks(x)
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


@dataclass(frozen=True)
class Digits:
    """Images ``[N, 1, 8, 8]`` in [0, 1] and labels ``[N]``, shuffled, split in two."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits() -> Digits:
    """The data set.

    Raises:
        FxsvdError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise FxsvdError("the demo needs scikit-learn: pip install 'fxsvd[demo]'") from error
    data = load_digits()
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[order, None] / 16
    labels = torch.tensor(data.target)[order]
    return Digits(images[TEST:], labels[TEST:], images[:TEST], labels[:TEST])


def train(
    model: nn.Module, data: Digits, epochs: int, rate: float, progress: Callable[[str], None]
) -> None:
    """Train in place, with a line of progress per epoch.

    Args:
        model: any classifier of ``[B, 1, 8, 8]`` images.
        data: what ``digits`` returned.
        epochs: passes over the training images.
        rate: the highest learning rate of the schedule.
        progress: called with a line after each epoch.
    """
    batches = -(-len(data.images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * batches)
    for epoch in range(1, epochs + 1):
        model.train()
        for index in torch.randperm(len(data.images)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(data.images[index]), data.labels[index]).backward()
            optimizer.step()
            schedule.step()
        progress(f"epoch {epoch} of {epochs}: test accuracy {accuracy(model, data):.1%}")


def accuracy(model: nn.Module, data: Digits) -> float:
    """The fraction of test digits that the model, put into eval mode, gets right."""
    model.eval()
    with torch.no_grad():
        predicted = model(data.test_images).argmax(dim=1)
    return float((predicted == data.test_labels).float().mean())


def run(
    out: Path, progress: Callable[[str], None], *, epochs: int = 6, tuning_epochs: int = 3
) -> str:
    """Train a network, halve its widths, fine-tune, export; returns the account of it.

    Args:
        out: the folder to write ``fxsvd-demo.onnx`` to.
        progress: called with a line at each stage.
        epochs: passes over the training images before compression.
        tuning_epochs: passes after it.

    Raises:
        FxsvdError: a package of the ``demo`` extra is missing.
    """
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(0)
        progress("loading the digits")
        data = digits()
        model = DigitNet()
        progress(f"training a residual network on {len(data.images)} handwritten digits")
        train(model, data, epochs, 5e-3, progress)
        trained = accuracy(model, data)
        small = compile_(model, data.images[:BATCH], passes=[Prune(ratio=0.5)], progress=progress)
        pruned = accuracy(small, data)
        progress("fine-tuning")
        train(small, data, tuning_epochs, 2e-3, progress)
        progress("measuring latency")
        before, after = latencies([model, small], data.images[:BATCH])
    progress("exporting")
    path = out / FILE
    difference = export_onnx(small, path, data.images[:1])
    return "\n".join(
        [
            str(small.report),
            "",
            f"test accuracy   {trained:.1%} trained, {pruned:.1%} pruned, "
            f"{accuracy(small, data):.1%} fine-tuned",
            f"latency         {1000 * before:.1f} ms before, {1000 * after:.1f} ms after "
            f"({BATCH} digits, one thread)",
            f"wrote           {path} ({metric(path.stat().st_size)}B), "
            f"equal in ONNX Runtime to {difference:.1e}",
        ]
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Images of 8 by 8 pixels are too little work to share: on a busy machine threads only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
