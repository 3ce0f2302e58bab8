"""What evolving costs: CPU seconds of steps with an Evolver attached, and of resizes.

The MNIST network of *SVD evolutive CNN* (1,971,308 parameters), on one thread. Steps with and
without an Evolver alternate, so that a busy machine slows both; it keeps the last 1,000 inputs for
calibration and is asked for a decision at every step, which is to leave the widths alone. Every
resize starts from the whole network; capture is behind it, verification is in it. The targets: 5 %
more for a step, two seconds for a resize.

    python examples/reproduce/evolve_cost.py [--steps 40]
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from calibration import forward, seconds
from evolutive import BATCH, TASKS
from torch import Tensor, nn
from torch.nn import functional as F

import fxsvd
from fxsvd.passes import Prune, Select, Shrink, Widen

WARM = 3
RESIZES: dict[str, Any] = {
    "Prune(0.1)": Prune(0.1),
    "Shrink(ratio=0.1)": Shrink(ratio=0.1),
    "Widen(ratio=0.1)": Widen(ratio=0.1),
    "Select(ratio=0.1), 1,000 images": Select(ratio=0.1),
}


def evolver(images: Tensor, **options: Any) -> fxsvd.Evolver:
    """The network, in training."""
    torch.manual_seed(0)
    network = TASKS["mnist"].network().train()
    return fxsvd.Evolver(network, images[:2], torch.optim.AdamW(network.parameters()), **options)


def overhead(images: Tensor, labels: Tensor, steps: int) -> float:
    """CPU seconds of steps with an Evolver, relative to those without."""
    plain = evolver(images)
    attached = evolver(images, policy=fxsvd.Schedule({}), data=1000)
    spent = [0.0, 0.0]
    for number in range(WARM + steps):
        alone = seconds(lambda: _step(plain.model, plain.optimizer, images, labels))
        both = seconds(lambda: _step(attached.model, attached.optimizer, images, labels))
        both += seconds(lambda count=number: attached.step(count + 1))
        if number >= WARM:
            spent = [spent[0] + alone, spent[1] + both]
    return spent[1] / spent[0] - 1


def _step(
    network: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> None:
    optimizer.zero_grad()
    F.cross_entropy(network(images), labels).backward()
    optimizer.step()


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    images, labels = torch.randn(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))
    print(f"overhead of a step: {overhead(images, labels, options.steps):+.1%}", flush=True)
    calibration = torch.randn(1000, 1, 28, 28).split(100)
    look = seconds(partial(forward, evolver(images).model, calibration))
    print(f"a look at 1,000 images: {look:.2f} s", flush=True)
    for name, resize in RESIZES.items():
        evolving = evolver(images)
        spent = seconds(partial(evolving.resize, resize, data=calibration))
        print(f"{name}: {spent:.2f} s", flush=True)


if __name__ == "__main__":
    main()
