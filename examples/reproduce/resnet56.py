"""ResNet-56 on CIFAR-10 (JPEG, quality 75) without a gradient step: accuracy by width and method.

*Inner* narrows the first convolution of every block, all by the same ratio. *Whole* narrows
all spaces, residual streams too, by the ratio that leaves the wanted share of the multiply-adds.
Selection is calibrated on 1,000 training images; accuracy is on all 10,000 test images.

    pip install "fxsvd" torchvision torch-pruning
    python examples/reproduce/resnet56.py --data DIR [--only inner] [--seed 0]
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import data
import networks
import torch
from torch import Tensor, nn

import fxsvd
from fxsvd import cost
from fxsvd.passes import Prune, Select

IMAGES, BATCH = 1000, 100
INNER = tuple(f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(9))
KEPT = (0.75, 0.5)
Small = Callable[[float], nn.Module]


def methods(model: nn.Module, batches: list[Tensor], only: tuple[str, ...]) -> dict[str, Small]:
    """By name, what makes the network smaller by a ratio of channels removed."""

    def compiled(options: Callable[[float], Any]) -> Small:
        return lambda ratio: fxsvd.compile(
            model, batches[0][:2], passes=[options(ratio)], data=batches, progress=False
        )

    def select(chaining: Any) -> Small:
        return compiled(lambda ratio: Select(ratio=ratio, only=only, chaining=chaining))

    return {
        "magnitude": compiled(lambda ratio: Prune(ratio=ratio, only=only)),
        "torch-pruning": lambda ratio: torch_pruned(model, batches[0][:2], ratio, only),
        "Select, parallel": select("parallel"),
        "Select, bottom-up": select("bottom-up"),
        "Select, top-down": select("top-down"),
        "Select, bottom-up+refit": select("bottom-up+refit"),
    }


def torch_pruned(model: nn.Module, x: Tensor, ratio: float, only: tuple[str, ...]) -> nn.Module:
    """The same widths by torch-pruning's group magnitude."""
    import torch_pruning

    small = copy.deepcopy(model)
    last = list(small.modules())[-1]
    others = [m for name, m in small.named_modules() if only and name not in only]
    pruner = torch_pruning.pruner.MagnitudePruner(
        small,
        x,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=[last, *(m for m in others if isinstance(m, nn.Conv2d | nn.Linear))],
    )
    pruner.step()
    return small


def ratio_for(model: nn.Module, x: Tensor, share: float) -> float:
    """The ratio, equal for all spaces, that comes nearest to a share of the multiply-adds."""
    graph = fxsvd.capture(model, x)
    whole = cost.measure(graph).macs

    def left(ratio: float) -> float:
        small = fxsvd.apply(graph, fxsvd.plan(graph, passes=[Prune(ratio=ratio)]))
        return cost.measure(small).macs / whole

    candidates = [i / 64 for i in range(1, 33)]
    return min(candidates, key=lambda ratio: abs(left(ratio) - share))


def scopes(
    model: nn.Module, x: Tensor, wanted: str | None
) -> Iterator[tuple[str, tuple[str, ...], float]]:
    """Title, spaces and ratio of each part of the table."""
    if wanted in (None, "inner"):
        yield from ((f"inner, {k:.0%} of the channels", INNER, 1 - k) for k in KEPT)
    if wanted in (None, "whole"):
        for share in KEPT:
            yield f"whole, {share:.0%} of the MACs", (), ratio_for(model, x, share)


def size(small: nn.Module, x: Tensor) -> tuple[float, float]:
    """Thousands of parameters, millions of multiply-adds."""
    after = cost.measure(fxsvd.capture(small, x, check=False))
    return after.parameters / 1e3, after.macs / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("inner", "whole"))
    parser.add_argument("--methods", nargs="*", help="names to run; all where left out")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of calibration images")
    options = data.parse(parser)
    model = networks.load_cifar_resnet(options.data, "resnet56_jpeg")
    images, _ = data.cifar10_jpeg(options.data, options.work, train=True)
    generator = torch.Generator().manual_seed(options.seed)
    chosen = torch.randperm(len(images), generator=generator)[:IMAGES]
    batches = list(data.CIFAR10(images[chosen]).split(BATCH))
    test, labels = data.cifar10_jpeg(options.data, options.work, train=False)
    test, x = data.CIFAR10(test), batches[0][:2]

    def accuracy(network: nn.Module) -> float:
        return 100 * networks.accuracy(network.eval(), test, labels)

    whole = accuracy(model)
    print(f"{IMAGES} calibration images, {len(test)} test images; original {whole:.2f} %\n")
    print("| narrowed | method | parameters | MACs | accuracy % | lost | CPU s | wall s |")
    print("|---|---|---|---|---|---|---|---|")
    for title, only, ratio in scopes(model, x, options.only):
        for name, smaller in methods(model, batches, only).items():
            if options.methods and name not in options.methods:
                continue
            busy, start = time.process_time(), time.perf_counter()
            small = smaller(ratio)
            busy, start = time.process_time() - busy, time.perf_counter() - start
            reached, (kilo, mega) = accuracy(small), size(small, x)
            print(
                f"| {title} | {name} | {kilo:.0f} k | {mega:.1f} M | {reached:.2f} "
                f"| {whole - reached:.2f} | {busy:.0f} | {start:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
