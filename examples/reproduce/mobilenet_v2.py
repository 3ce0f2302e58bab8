"""MobileNetV2 (ImageNet) at 80 % of its multiply-adds, without training: top-1 agreement.

Of 500 images 250 calibrate, and 250 judge: on how many of them do the small network and its parent
choose the same class? Batch norms are folded, the linear bottlenecks turned to a basis in which
channels come by importance (Rotate), and all spaces narrowed by Select, refitted top-down. How many
channels each loses is decided on the calibration images: each is narrowed alone, to four widths,
fitted to two thirds of them and judged on the rest, three times in turn, by the divergence of the
outputs; the channels that are cheapest per multiply-add go, until the budget is met. Beside it:
magnitude pruning, torch-pruning (where installed), and the cost of calibrating.

    python examples/reproduce/mobilenet_v2.py --data DIR
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import data
import networks
import numpy as np
import torch
from allocation import Curve, Macs, allocate
from torch import Tensor, nn

import fxsvd
from fxsvd.calibrate import calibrate
from fxsvd.cost import measure
from fxsvd.coupling import Group
from fxsvd.data.readers import readers
from fxsvd.dependency import Dependencies
from fxsvd.edits import Plan
from fxsvd.narrowing import Narrowing
from fxsvd.passes import Fold, Prune, Rotate, Select
from fxsvd.rewrite import rewrite
from fxsvd.selecting.chained import alive
from fxsvd.selecting.choosing import METHODS
from fxsvd.selecting.fit import fit, own_output
from fxsvd.selecting.selection import Selection
from fxsvd.widths import as_plan

SHARES = (0.1, 0.2, 0.35, 0.5)
FOLDS = 3


@torch.no_grad()
def outputs(graph: nn.Module, images: Tensor) -> Tensor:
    """Log-probabilities."""
    return torch.cat([graph(part) for part in images.split(25)]).log_softmax(1)


def chosen(network: nn.Module, images: Tensor) -> Tensor:
    """The class with the largest logit, in eval mode."""
    return outputs(network.eval(), images).argmax(1)


def curves(deps: Dependencies, fitted: Tensor, judged: Tensor) -> list[Curve]:
    """The curve of every space that may be narrowed, each fitted to the original's inputs."""
    graph = deps.analysis.graph.eval()
    found = {name: r for name, r in readers(deps).items() if not r.depthwise}
    moments = calibrate(deps, fitted.split(25), layers=found, positions="all")
    selection = Selection(deps, found, moments, outputs_that_stay=False)
    expected = outputs(graph, judged)

    def loss(plan: Plan) -> float:
        narrowing = Narrowing.of(deps, plan)
        left = {n: m for n, r in found.items() if not (m := alive(r, deps, narrowing)).all()}
        fits = [fit(found[n], own_output(found[n], moments[n]), m) for n, m in left.items()]
        values = tuple(a for f in fits for a in f.assigns(graph))
        narrowed = outputs(rewrite(deps, replace(plan, values=values)).eval(), judged)
        return float((expected.exp() * (expected - narrowed)).sum(1).mean())

    return [_curve(deps, selection, group, loss) for group in deps.groups]


def _curve(
    deps: Dependencies, selection: Selection, group: Group, loss: Callable[[Plan], float]
) -> Curve:
    space = deps.spaces[deps.space_of[group.channels[0]]]
    steps = group.ranked(METHODS["backward"](selection, group, 0.0))
    counts, losses = [], []
    for share in SHARES:
        count = max(1, int(share * len(steps)))
        kept = np.ones(deps.channels.count, dtype=bool)
        kept[np.concatenate(steps[:count])] = False
        counts.append(count)
        losses.append(max(loss(as_plan(deps, kept, {}, "")), 1e-6))
    print(f"  {space.name}: {', '.join(f'{x:.4f}' for x in losses)}", flush=True)
    return Curve(space.name, space.width, tuple(counts), tuple(losses))


def averaged(folds: list[list[Curve]]) -> list[Curve]:
    """The mean of the losses that were measured on different images."""
    return [
        replace(same[0], losses=tuple(np.mean([c.losses for c in same], axis=0).tolist()))
        for same in zip(*folds, strict=True)
    ]


def macs_of(network: nn.Module, example: Tensor) -> int:
    """Multiply-adds of one sample."""
    return measure(fxsvd.capture(network, example, check=False)).macs


def bisected(make: Callable[[float], nn.Module], example: Tensor, macs: float) -> nn.Module:
    """The network of the ratio that leaves about so many multiply-adds."""
    low, high = 0.0, 0.5
    for _ in range(6):
        ratio = (low + high) / 2
        low, high = (ratio, high) if macs_of(make(ratio), example) > macs else (low, ratio)
    return make((low + high) / 2)


def magnitude(parent: nn.Module, example: Tensor, macs: float) -> nn.Module:
    """Every space loses the same share of its channels, those of least norm."""

    def pruned(ratio: float) -> nn.Module:
        passes = [Prune(ratio=ratio)]
        return fxsvd.compile(parent, example, passes=passes, verify=False, progress=False)

    return bisected(pruned, example, macs)


def rival(parent: nn.Module, example: Tensor, macs: float) -> nn.Module | None:
    """The same by torch-pruning; None where it is not installed."""
    try:
        import torch_pruning as tp
    except ImportError:
        return None

    def pruned(ratio: float) -> nn.Module:
        small = copy.deepcopy(parent)
        importance = tp.importance.GroupMagnitudeImportance(p=2)
        options = {"pruning_ratio": ratio, "ignored_layers": [small.classifier[1]]}
        tp.pruner.BasePruner(small, example[:1], importance=importance, **options).step()
        return small.eval()

    return bisected(pruned, example, macs)


def seconds(run: Callable[[], Any]) -> float:
    """CPU seconds."""
    start = time.process_time()
    run()
    return time.process_time() - start


def cost_of_calibrating(deps: Dependencies, batches: list[Tensor]) -> float:
    """CPU seconds of ``calibrate`` over those of plain forward passes of the same batches."""
    graph = deps.analysis.graph.eval()
    with torch.no_grad():
        plain = seconds(lambda: [graph(batch) for batch in batches])
    return seconds(lambda: calibrate(deps, batches)) / plain


def cached(path: Path, make: Callable[[], list[Curve]]) -> list[Curve]:
    """Curves from a file, or made and written there."""
    if not path.exists():
        text = json.dumps([asdict(c) for c in make()], indent=1)
        data.replace_file(path, lambda partial: partial.write_text(text))
    read = json.loads(path.read_text())
    return [Curve(c["space"], c["width"], tuple(c["counts"]), tuple(c["losses"])) for c in read]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", type=float, default=0.8, help="share of multiply-adds kept")
    options = data.parse(parser)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    images, labels = data.imagenet_sample(options.data, options.work)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = data.MOBILENET_V2(images)[order], labels[order]
    calibration, judged = images[:250], images[250:]
    parent, example = networks.load_mobilenet_v2(options.data), images[:2]
    batches = list(calibration.split(25))
    exact = [Fold(), Rotate(ratio=0.0, positions=64)]
    turned = fxsvd.compile(parent, example, passes=exact, data=batches[:2], progress=False)
    print(f"turned: outputs change by {turned.report.change:.1e}", flush=True)
    deps = fxsvd.analyze(fxsvd.capture(turned, example))
    fold = torch.arange(len(calibration)) % FOLDS
    folds = [
        cached(
            options.work / f"mobilenet_v2-curves-{i}.json",
            partial(curves, deps, calibration[fold != i], calibration[fold == i]),
        )
        for i in range(FOLDS)
    ]
    found = averaged(folds)
    ratios = allocate(found, Macs(deps), options.budget * macs_of(parent, example))
    print("removed:", {name: round(ratio, 3) for name, ratio in ratios.items()}, flush=True)
    select = Select(ratio=ratios, positions="all", everywhere=False)
    small = fxsvd.compile(turned, example, passes=[select], data=batches, progress=False)
    macs = small.report.after.macs
    before = macs_of(parent, example)

    expected = chosen(parent, judged)

    def line(name: str, network: nn.Module | None) -> None:
        if network is None:
            print(f"| {name} | not installed | | |")
            return
        left, found = macs_of(network, example) / before, chosen(network, judged)
        same, right = ((found == other).double().mean() for other in (expected, labels[250:]))
        print(f"| {name} | {left:.1%} | {same:.1%} | {right:.1%} |", flush=True)

    print("| network | multiply-adds | agrees with the parent | right |\n|---|---|---|---|")
    line("parent", parent)
    line("Fold, Rotate, Select", small)
    line("magnitude (Prune)", magnitude(parent, example, macs))
    line("magnitude (torch-pruning)", rival(parent, example, macs))
    print(f"calibrate() costs {cost_of_calibrating(deps, batches):.2f} forward passes (CPU time)")


if __name__ == "__main__":
    main()
