"""How wide the spaces get, and of what rank the layers, for lnr.py: greedy steps, on training data.

Whatever costs the least Kullback-Leibler divergence from the original's outputs per parameter saved
shrinks by a tenth (or ``--shrink``). Some training images calibrate, others judge, all a pixel off
their place: a network that has learnt them by heart makes its usual errors there. Not a command.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from data import replace_file
from torch import Tensor, nn

import fxsvd
from fxsvd.passes import Factorize, Select

Knobs = dict[str, int]  # "width LAYER" and "rank LAYER"
Point = tuple[int, float, Knobs]  # parameters, divergence, knobs

READS = {  # the space that a layer reads (none: the input), and how many entries each channel has
    "lenet_300_100": {"fc1": ("", 784), "fc2": ("fc1", 1), "fc3": ("fc2", 1)},
    "lenet_5": {"conv1": ("", 25), "conv2": ("conv1", 25), "fc1": ("conv2", 16), "fc2": ("fc1", 1)},
}
CLASSES = 10
CALIBRATING, JUDGING = 2000, 4000  # images
TRADING = 10000  # images to calibrate with where two knobs are traded: a finer difference
HARD = 1 / 4  # the share of the calibrating images that are those of the highest entropy
COARSE, FINE = 0.1, 0.05  # trades, relative to a knob
MOVES = ((1, 0), (-1, 0), (0, 1), (0, -1))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def layers(network: str, knobs: Knobs) -> Iterator[tuple[str, int, int, int]]:
    """Each layer, its outputs, its inputs, and its rank: 0 where that would save nothing."""
    for layer, (space, entries) in READS[network].items():
        m = knobs.get(f"width {layer}", CLASSES)
        n = knobs.get(f"width {space}", 1) * entries
        rank = knobs.get(f"rank {layer}", m)
        yield layer, m, n, rank if rank * (m + n) < m * n else 0


def size(network: str, knobs: Knobs) -> int:
    """Parameters."""
    return sum(m + (r * (m + n) if r else m * n) for _, m, n, r in layers(network, knobs))


def passes(
    knobs: Knobs, options: argparse.Namespace, weighted: Sequence[Tensor] = (), **changes: Any
) -> list[Any]:
    """Selection, then low rank where a rank among the knobs saves parameters.

    With images to weight by, low rank looks at what the outputs are sensitive to.
    """
    widths = {k.split()[1]: number for k, number in knobs.items() if k.startswith("width")}
    chosen = {"method": options.method, "chaining": options.chaining, "debias": options.debias}
    found: list[Any] = [Select(width=widths, **({"positions": 8} | chosen | changes))]
    ranks = {layer: rank for layer, _, _, rank in layers(options.network, knobs) if rank}
    if not ranks:
        return found
    if not weighted:
        return [*found, Factorize(rank=ranks)]
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(len(x), CLASSES, generator=generator) for x in weighted]
    data = list(zip(weighted, noise, strict=True))
    sensitive: dict[str, Any] = {"method": "gradient", "loss": _along, "data": data}
    return [*found, Factorize(rank=ranks, split="balanced", **sensitive)]  # to be retrained


def _along(outputs: Tensor, noise: Tensor) -> Tensor:
    """Its gradients have the second moment of the outputs' Jacobian."""
    return (outputs * noise).sum()


def batches(images: Tensor, count: int) -> list[Tensor]:
    """The first images in batches with memory of their own: copies of views copy what is viewed."""
    return [part.clone() for part in images[:count].split(500)]


def moved(images: Tensor) -> Tensor:
    """A quarter of the images up, down, left and right by a pixel (their margins are empty)."""
    parts = zip(images.chunk(len(MOVES)), MOVES, strict=True)
    return torch.cat([part.roll(move, (2, 3)) for part, move in parts])


@torch.no_grad()
def calibrating(model: nn.Module, images: Tensor, count: int) -> list[Tensor]:
    """Images of which the network is least sure, and others, in batches; no label is looked at."""
    images = moved(images[:-JUDGING])
    sure = torch.cat([model(part).double() for part in images.split(500)]).log_softmax(1)
    hard = (sure.exp() * sure).sum(1).argsort()[: int(HARD * count)]
    generator = torch.Generator().manual_seed(0)
    others = torch.randperm(len(images), generator=generator)[: count - len(hard)]
    chosen = torch.cat([hard, others])
    return batches(images[chosen[torch.randperm(count, generator=generator)]], count)


class Search:
    """Judges knobs, and turns them one at a time."""

    def __init__(
        self, model: nn.Module, images: Tensor, options: argparse.Namespace, count: int
    ) -> None:
        self.graph = fxsvd.capture(model, images[:2])
        self.data = calibrating(model, images, count)
        self.judged = moved(images[-JUDGING:]).split(500)
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

    def traded(self, knobs: Knobs, most: int, whole: Knobs) -> Knobs:
        """One knob up and another one down, while that helps, at a size that hardly changes."""
        best, share = self.judge(knobs), COARSE
        while share >= FINE:
            before = best
            for up, down in itertools.permutations(knobs, 2):
                while trial := self._trade(best[2], up, down, share, most, whole):
                    found = self.judge(trial)
                    if found[1] >= best[1]:
                        break
                    best = found
                    print(f"  traded: divergence {best[1]:.6f}, {best[2]}", flush=True)
            share = share if best is not before else share / 2
        return best[2]

    def _trade(
        self, knobs: Knobs, up: str, down: str, share: float, most: int, whole: Knobs
    ) -> Knobs | None:
        """Up by a share, and down until the size fits; None where either is impossible."""
        network, more = self.options.network, knobs[up] + max(1, round(share * knobs[up]))
        trial = knobs | {up: more}
        bought = size(network, trial) - size(network, knobs)
        while size(network, trial) > most and trial[down] > 2:
            trial[down] -= 1
        fits = size(network, trial) <= most and more <= whole[up] and trial != knobs
        return trial if fits and bought > 0 and trial[down] >= knobs[down] / 2 else None

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
    search = Search(model, images, options, CALIBRATING)
    for point in search.steps(points[-1]):
        points.append(point)
        text = json.dumps(points)
        replace_file(file, lambda partial, text=text: partial.write_text(text))
        print(f"  {kind}: {point[0]} parameters, divergence {point[1]:.6f}, {point[2]}", flush=True)
        if point[0] <= smallest:
            break
    return points


def knobs_of_size(points: list[Point], most: int, network: str) -> Knobs:
    """The first on the path that is small enough, its last step only as long as it has to be."""
    last = next(i for i, point in enumerate(points) if point[0] <= most)
    before, after = points[max(last - 1, 0)][2], points[last][2]
    (knob,) = (k for k in after if after[k] != before[k])
    fitting = (after | {knob: n} for n in range(before[knob], after[knob], -1))
    return next((knobs for knobs in fitting if size(network, knobs) <= most), after)
