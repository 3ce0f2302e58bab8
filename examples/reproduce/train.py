"""Train a baseline network, and say how well it does on the test set.

    python examples/reproduce/train.py lenet_300_100-mnist | lenet_5-mnist | vgg11-mnist |
        vgg11-cifar10  --data DIR [--work DIR]

Writes WORK/NAME.safetensors. A checkpoint after every epoch lets an interrupted run go on, to the
same weights. The test set is looked at once, at the end: the last epoch counts, not the best one.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from data import CIFAR10, MNIST, MNIST_32, Prepare, load, parse, replace_file
from networks import TRAINED, accuracy
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

SEED = 0


@dataclass(frozen=True)
class Recipe:
    """Adam, its rate multiplied by ``decay`` after every epoch."""

    dataset: str
    prepare: Prepare
    epochs: int
    batch: int
    rate: float
    decay: float
    weight_decay: float
    flip: bool = False
    bfloat16: bool = False  # autocast and channels_last; the weights stay float32


# The source of VGG-11 trains 7 epochs of batches of 16 at rate 1e-4. Adam then touches 129 million
# weights for every 16 images; batches are 8 times larger here, and the rate by the root of 8.
# MNIST saturates, so 4 epochs do; CIFAR-10 is flipped at random, which the source does not mention.
RECIPES = {
    "lenet_300_100-mnist": Recipe("mnist", MNIST, 20, 128, 1e-3, 0.8, 0),
    "lenet_5-mnist": Recipe("mnist", MNIST, 20, 128, 1e-3, 0.8, 0),
    "vgg11-mnist": Recipe("mnist", MNIST_32, 4, 128, 2.8e-4, 0.5, 1e-5, bfloat16=True),
    "vgg11-cifar10": Recipe(
        "cifar10", CIFAR10, 7, 128, 2.8e-4, 0.5, 1e-5, flip=True, bfloat16=True
    ),
}


def fit(model: nn.Module, recipe: Recipe, images: Tensor, labels: Tensor, checkpoint: Path) -> None:
    """Train in place, from the checkpoint where there is one, and leave one after every epoch."""
    if recipe.bfloat16:
        model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=recipe.rate, weight_decay=recipe.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, recipe.decay)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        for key, part in parts.items():
            part.load_state_dict(saved[key])
    for epoch in range(schedule.last_epoch, recipe.epochs):
        torch.manual_seed(SEED + 1 + epoch)  # order, flips and dropout, also after a resume
        print(f"epoch {epoch + 1}/{recipe.epochs}", flush=True)
        _epoch(model, recipe, optimizer, images, labels)
        schedule.step()
        state = {key: part.state_dict() for key, part in parts.items()}
        replace_file(checkpoint, lambda partial, state=state: torch.save(state, partial))


def _epoch(
    model: nn.Module,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
) -> None:
    model.train()
    start, seen, loss_sum, right = time.perf_counter(), 0, 0.0, 0
    batches = torch.randperm(len(images)).split(recipe.batch)
    for number, chosen in enumerate(batches, 1):
        inputs, target = _inputs(recipe, images[chosen]), labels[chosen]
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.bfloat16):
            logits = model(inputs).float()
        loss = F.cross_entropy(logits, target)
        loss.backward()
        optimizer.step()
        seen += len(chosen)
        loss_sum += loss.item() * len(chosen)
        right += int((logits.argmax(1) == target).sum())
        if number % 100 == 0 or number == len(batches):
            seconds = (time.perf_counter() - start) / number
            print(
                f"  step {number}/{len(batches)}  loss {loss_sum / seen:.4f}  "
                f"training accuracy {right / seen:.2%}  {seconds:.3f} s a step",
                flush=True,
            )


def _inputs(recipe: Recipe, images: Tensor) -> Tensor:
    out = recipe.prepare(images)
    if recipe.flip:
        out = torch.where(torch.rand(len(out), 1, 1, 1) < 0.5, out.flip(3), out)
    return out.contiguous(memory_format=torch.channels_last) if recipe.bfloat16 else out


def main() -> None:
    """Train what is not trained yet; print the test accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=sorted(RECIPES))
    arguments = parse(parser)
    name, work = arguments.name, arguments.work
    recipe, weights, checkpoint = RECIPES[name], work / f"{name}.safetensors", work / f"{name}.pt"
    print(name, recipe, f"seed {SEED}", flush=True)
    torch.set_flush_denormal(True)  # Adam's averages of silent units decay into numbers 100× slower
    torch.manual_seed(SEED)
    model = TRAINED[name]()
    if weights.exists():
        model.load_state_dict(load_file(weights))
    else:
        images, labels = load(recipe.dataset, arguments.data, work, train=True)
        fit(model, recipe, images, labels, checkpoint)
        state = {key: value.contiguous() for key, value in model.state_dict().items()}
        replace_file(weights, lambda partial: save_file(state, partial))
        checkpoint.unlink(missing_ok=True)
    images, labels = load(recipe.dataset, arguments.data, work, train=False)
    right = accuracy(model, recipe.prepare(images), labels)
    print(f"{name}: test accuracy {right:.2%}, error {1 - right:.2%}, float32")


if __name__ == "__main__":
    main()
