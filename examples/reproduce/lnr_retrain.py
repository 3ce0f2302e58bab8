"""Retraining for lnr.py: on the labels of training images that are moved by up to two pixels.

Adam, with a rate that falls to nothing along a cosine. Chosen on 10,000 training images that were
held out. The originals never saw a moved image: the same epochs would help them too. Not a command.
"""

from __future__ import annotations

import torch
from data import Labelled, Prepare
from torch import Tensor, nn
from torch.nn import functional as F

RATE, BATCH = 1e-3, 128
DECAY = 1e-2  # of the weights, by AdamW
PIXELS = 2
SEED = 0


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every image ``n×c×h×w`` moved on its own, at random; zeros come in at the margins."""
    n, _, height, width = images.shape
    padded = F.pad(images, (PIXELS,) * 4)
    down, right = torch.randint(2 * PIXELS + 1, (2, n, 1, 1), generator=generator)
    rows = torch.arange(height).view(1, -1, 1) + down
    columns = torch.arange(width) + right
    return padded[torch.arange(n).view(-1, 1, 1), :, rows, columns].movedim(3, 1)


def retrain(model: nn.Module, prepare: Prepare, labelled: Labelled, epochs: int) -> None:
    """Train in place, for some epochs.

    Args:
        model: a classifier.
        prepare: what its inputs have to go through.
        labelled: images uint8 ``n×1×h×w``, and labels.
        epochs: over all images.
    """
    images, labels = labelled
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=DECAY, fused=True)
    steps = epochs * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for epoch in range(epochs):
        losses = []
        for chosen in torch.randperm(len(images), generator=generator).split(BATCH):
            inputs = prepare(shifted(images[chosen], generator))
            loss = F.cross_entropy(model(inputs), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"  epoch {epoch + 1}/{epochs}: loss {sum(losses) / len(losses):.4f}", flush=True)
    model.eval()
