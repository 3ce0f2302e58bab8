"""What calibration costs: CPU seconds of ``fxsvd.calibrate`` and of plain forward passes.

Both read the same batches, on one thread and in one run, in turns, so that a busy machine slows
both. ResNet-56 sees CIFAR-10 images, torchvision's MobileNetV2 noise, with random weights. The
target is a ratio of 2: the moments cost no more than the forward pass in which they are taken.

    python examples/reproduce/calibration.py --data DIR [--work DIR] [--samples 1000] [--runs 3]
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial

import torch
from data import CIFAR10, cifar10_jpeg, parse
from networks import load_cifar_resnet
from torch import Tensor, nn

import fxsvd

TARGET = 2.0


def seconds(run: Callable[[], object]) -> float:
    """CPU seconds of a call, over all threads."""
    start = time.process_time()
    run()
    return time.process_time() - start


@torch.no_grad()
def forward(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """One pass of each batch."""
    for batch in batches:
        model(batch)


def measured(model: nn.Module, batches: list[Tensor], runs: int) -> tuple[list[float], list[float]]:
    """CPU seconds of forward passes and of calibrations, in turns, after one of each."""
    deps = fxsvd.analyze(fxsvd.capture(model, batches[0][:2], check=False))
    look = partial(forward, model, batches)
    look()
    fxsvd.calibrate(deps, batches[:1])
    pairs = [(seconds(look), seconds(lambda: fxsvd.calibrate(deps, batches))) for _ in range(runs)]
    plain, calibrations = zip(*pairs, strict=True)
    return list(plain), list(calibrations)


def row(name: str, model: nn.Module, images: Tensor, batch: int, runs: int) -> str:
    """A line of the table."""
    plain, calibration = measured(model.eval(), list(images.split(batch)), runs)
    ratio = statistics.median(c / p for c, p in zip(calibration, plain, strict=True))
    verdict = "yes" if ratio <= TARGET else "no"
    figures = f"{min(plain):.2f} | {min(calibration):.2f} | {ratio:.2f} | {verdict}"
    return f"| {name} | {len(images)} × {images.shape[-1]}², {batch} at a time | {figures} |"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=1000, help="CIFAR images")
    parser.add_argument("--batch", type=int, default=250, help="CIFAR images per batch")
    parser.add_argument("--runs", type=int, default=3)
    options = parse(parser)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # MobileNetV2 sees fewer images than its classifier has inputs
    print("| network | images | forward, s | calibrate, s | ratio | ≤ 2 |")
    print("|---|---|---:|---:|---:|---|")
    images, labels = cifar10_jpeg(options.data, options.work, train=True)
    some = torch.randperm(len(labels))[: options.samples]  # they are stored class by class
    model = load_cifar_resnet(options.data, "resnet56_jpeg")
    inputs = CIFAR10(images[some])
    print(row("ResNet-56", model, inputs, options.batch, options.runs), flush=True)
    from torchvision.models import mobilenet_v2

    inputs = torch.randn(32, 3, 224, 224)
    print(row("MobileNetV2", mobilenet_v2(weights=None), inputs, 16, options.runs))


if __name__ == "__main__":
    main()
