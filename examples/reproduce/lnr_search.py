"""How wide the spaces get, and of what rank the layers, for lnr.py: greedy steps, on training data.

Whatever costs the least Kullback-Leibler divergence from the original's outputs per parameter saved
shrinks by a tenth (or ``--shrink``). Some training images calibrate, others judge, a pixel off
their place: a network that has learnt them by heart makes its usual errors there. Not a command.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from typing import Any

import torch
from data import replace_file
from torch import Tensor, nn

import fxsvd
from fxsvd.passes import Factorize, Select

Knobs = dict[str, int]  # "width LAYER" and "rank LAYER"
Point = tuple[int, float, Knobs]  # parameters, divergence, knobs

READS = {  # the space that a layer reads (none: the input), and how many entries each channel has
    "lenet_300_100": {"fc1": ("", 784)},
    "lenet_5": {"conv2": ("conv1", 25), "fc1": ("conv2", 16)},
}
CALIBRATING, JUDGING = 2000, 4000  # images
MOVES = ((1, 0), (-1, 0), (0, 1), (0, -1))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def passes(knobs: Knobs, options: argparse.Namespace, **changes: Any) -> list[Any]:
    """Selection, then low rank where a rank among the knobs saves parameters."""
    sizes: dict[str, Knobs] = {"width": {}, "rank": {}}
    for knob, number in knobs.items():
        kind, layer = knob.split()
        sizes[kind][layer] = number
    chosen = {"method": options.method, "chaining": options.chaining, "debias": options.debias}
    found: list[Any] = [Select(width=sizes["width"], **({"positions": 8} | chosen | changes))]
    ranks = {}
    for layer, rank in sizes["rank"].items():
        space, entries = READS[options.network][layer]
        m, n = sizes["width"][layer], sizes["width"].get(space, 1) * entries
        ranks |= {layer: rank} if rank * (m + n) < m * n else {}
    return [*found, Factorize(rank=ranks)] if ranks else found


def batches(images: Tensor, count: int) -> list[Tensor]:
    """The first images in batches with memory of their own: copies of views copy what is viewed."""
    return [part.clone() for part in images[:count].split(500)]


class Search:
    """Judges knobs, and turns them one at a time."""

    def __init__(self, model: nn.Module, images: Tensor, options: argparse.Namespace) -> None:
        self.graph = fxsvd.capture(model, images[:2])
        self.data = batches(images, CALIBRATING)
        parts = images[-JUDGING:].chunk(len(MOVES))
        moved = [part.roll(move, (2, 3)) for part, move in zip(parts, MOVES, strict=True)]
        self.judged = torch.cat(moved).split(500)
        self.options = options
        self.wanted = self.outputs(self.graph)

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> Tensor:
        """Log-probabilities, in double."""
        model = model.to(memory_format=torch.channels_last)  # convolves several times faster
        return torch.cat([model(part).double() for part in self.judged]).log_softmax(1)

    def judge(self, knobs: Knobs) -> Point:
        """Parallel chaining, which reads the data once."""
        plan = fxsvd.plan(
            self.graph, passes=passes(knobs, self.options, chaining="parallel"), data=self.data
        )
        small = fxsvd.apply(self.graph, plan)
        divergence = (self.wanted.exp() * (self.wanted - self.outputs(small))).sum(1).mean()
        return parameters(small), float(divergence), knobs

    def steps(self, start: Point) -> Iterator[Point]:
        """From a point on: the cheapest step first, prices looked at again when they matter."""
        now, prices = start, dict.fromkeys(start[2], -math.inf)
        while prices:
            fresh: dict[str, Point] = {}
            while (knob := min(prices, key=prices.__getitem__)) not in fresh:
                smaller = max(
                    min(int(self.options.shrink * now[2][knob] + 0.5), now[2][knob] - 1), 1
                )
                fresh[knob] = trial = self.judge(now[2] | {knob: smaller})
                saved = now[0] - trial[0]  # nothing where a rank is still too high to save
                prices[knob] = max(trial[1] - now[1], 1e-9) / saved if saved > 0 else 0.0
            now = fresh[knob]
            prices = {k: p for k, p in prices.items() if now[2][k] > 2}
            yield now


def path_down(
    model: nn.Module, images: Tensor, knobs: Knobs, smallest: int, options: argparse.Namespace
) -> list[Point]:
    """Points of falling size down to the smallest, from the file where they are there already."""
    kind = "low-rank" if any(k.startswith("rank") for k in knobs) else "select"
    file = options.work / f"lnr-{options.network}-{options.method}-{kind}.json"
    points: list[Point] = [(parameters(model), 0.0, knobs)]
    if file.exists():
        points = [(size, lost, knobs) for size, lost, knobs in json.loads(file.read_text())]
    if points[-1][0] <= smallest:
        return points
    search = Search(model, images, options)
    for point in search.steps(points[-1]):
        points.append(point)
        text = json.dumps(points)
        replace_file(file, lambda partial, text=text: partial.write_text(text))
        print(f"  {kind}: {point[0]} parameters, divergence {point[1]:.6f}, {point[2]}", flush=True)
        if point[0] <= smallest:
            break
    return points


def knobs_of_size(points: list[Point], most: int) -> Knobs:
    """The first on the path that is small enough, its last step only as long as it has to be."""
    last = next(i for i, point in enumerate(points) if point[0] <= most)
    (large, _, before), (small, _, after) = points[max(last - 1, 0)], points[last]
    (knob,) = (k for k in after if after[k] != before[k])
    each = (large - small) / (before[knob] - after[knob])
    return after | {knob: before[knob] - math.ceil((large - most) / each)}
