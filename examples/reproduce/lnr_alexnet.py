"""Linear neural reconstruction on AlexNet: one error for all layers; seconds, memory and errors.

Used by lnr.py. Published: 43.48 / 20.93 % (top-1 / top-5) become 45.36 / 21.90 % at 91 MiB (39 %).
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import torch
from data import imagenet_sample
from torch import Tensor, nn

import fxsvd
from fxsvd.passes import Select

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WIDTHS = {"features.10": 208, "classifier.1": 2048, "classifier.4": 2048}
"""39 % of the parameters: nearly all are in the three linear layers."""


def rows(options: argparse.Namespace) -> list[str]:
    """The lines of a table."""
    from torchvision.models import alexnet

    torch.manual_seed(0)
    pretrained = options.images is not None
    model = alexnet(weights="DEFAULT" if pretrained else None).eval()
    calibration, held_out = _images(options)
    before = time.perf_counter()
    small = fxsvd.compile(
        model,
        calibration[0][:2],
        passes=[Select(width=WIDTHS, method=options.method, chaining=options.chaining)],
        data=calibration,
        progress=print,
    )
    seconds = time.perf_counter() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    lines = [
        "| network | MiB | top-1 / top-5 error % | seconds | peak GiB |",
        "|---|---:|---|---:|---:|",
    ]
    for name, network in (("AlexNet", model), ("selected", small)):
        size = sum(p.numel() for p in network.parameters()) * 4 / 2**20
        wrong = _errors(network, held_out) if pretrained else "random weights"
        cost = f"{seconds:.0f} | {peak:.1f}" if network is small else "|"
        lines.append(f"| {name} | {size:.0f} | {wrong} | {cost} |")
    return lines


def _images(options: argparse.Namespace) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Batches to calibrate with, and labelled ones: DIR/train and DIR/val, or the sample."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    if options.images is None:
        pixels, _ = imagenet_sample(options.data, options.work)
        return list(((pixels / 255 - mean) / std).split(50)), []
    train, val = (_folder(options.images / part) for part in ("train", "val"))
    count = options.calibration
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:count]
    shown = torch.utils.data.DataLoader(torch.utils.data.Subset(train, chosen.tolist()), 100)
    return [x for x, _ in shown], list(torch.utils.data.DataLoader(val, 100))


def _folder(folder: Path) -> torch.utils.data.Dataset[tuple[Tensor, int]]:
    from torchvision import datasets, transforms

    steps = [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor()]
    return datasets.ImageFolder(
        folder, transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])
    )


@torch.no_grad()
def _errors(model: nn.Module, held_out: list[tuple[Tensor, Tensor]]) -> str:
    wrong, count = torch.zeros(2), 0
    for images, labels in held_out:
        right = model(images).topk(5).indices == labels.unsqueeze(1)
        wrong += torch.stack([~right[:, 0], ~right.any(1)]).sum(1)
        count += len(labels)
    return " / ".join(f"{100 * float(w) / count:.2f}" for w in wrong)
