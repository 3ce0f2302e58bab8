"""Linear neural reconstruction: select channels, refit what reads them, and retrain once or never.

    python examples/reproduce/lnr.py --network lenet_300_100 | lenet_5  --data DIR [--work DIR]
        [--figures] [--calibration N] [--epochs N] [--method M] [--chaining C] [--no-debias]
    python examples/reproduce/lnr.py --network alexnet  --data DIR [--images DIR]

For the LeNets of train.py: the published table (error at the published size, as compressed and
after one round of retraining, on moved images), for selection alone and with low rank on top.
Widths and ranks are found on training images (lnr_search.py), the test set is looked at for the
table only. Sizes count float32 parameters. With --figures, instead: error against size by chaining,
and with and without debiasing (lnr_figures.py). Everything lands in WORK; an interrupted search for
widths goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from data import Labelled, load, parse
from lnr_figures import CHAININGS, Figures, errors, kibibytes, publish
from lnr_retrain import retrain
from lnr_search import (
    TRADING,
    Knobs,
    Point,
    Search,
    calibrating,
    knobs_of_size,
    passes,
    path_down,
)
from networks import load_trained
from torch import Tensor, fx, nn
from train import RECIPES

import fxsvd

# Widths as they are, and the ranks from which on a layer gets smaller.
NETWORKS: dict[str, Knobs] = {
    "lenet_300_100": {"width fc1": 300, "width fc2": 100, "rank fc1": 217},
    "lenet_5": {
        "width conv1": 20,
        "width conv2": 50,
        "width fc1": 500,
        "rank conv2": 45,
        "rank fc1": 307,
    },
}
# Percent of errors at KiB: as compressed, and at a smaller size after retraining.
REPORTED = {
    "lenet_300_100": ((1.71, 482), (1.64, 307)),
    "lenet_5": ((0.78, 276), (0.78, 177)),
}


@dataclasses.dataclass
class Experiment:
    """A network, its data, and what to do."""

    model: nn.Module
    train: Labelled
    images: Tensor
    test: Labelled
    options: argparse.Namespace

    @property
    def name(self) -> str:
        return f"{self.options.network}-mnist"

    def whole(self, low_rank: bool) -> Knobs:
        """The knobs, not turned."""
        knobs = NETWORKS[self.options.network]
        return {k: n for k, n in knobs.items() if low_rank or k.startswith("width")}

    def path(self, low_rank: bool) -> list[Point]:
        smallest = min(256 * size for _, size in REPORTED[self.options.network])
        return path_down(self.model, self.images, self.whole(low_rank), smallest, self.options)

    def knobs(self, size: int, low_rank: bool) -> Knobs:
        """The best that were found of a size in KiB."""
        found = knobs_of_size(self.path(low_rank), 256 * size, self.options.network)
        search = Search(self.model, self.images, self.options, TRADING)
        return search.traded(found, 256 * size, self.whole(low_rank))

    def compressed(self, knobs: Knobs) -> fx.GraphModule:
        """Verified, and fitted to more images than the search."""
        data = calibrating(self.model, self.images, self.options.calibration)
        chosen = passes(knobs, self.options, data, positions="auto")
        return fxsvd.compile(self.model, self.images[:2], passes=chosen, data=data, progress=False)

    def rows(self) -> Iterator[str]:
        """The table."""
        whole = kibibytes(self.model)
        yield "| published | KiB | share | widths, ranks | test error % | retrained % | seconds |"
        yield "|---|---:|---:|---|---:|---:|---:|"
        yield f"| original | {whole:.0f} | | | {errors(self.model, self.test):.2f} | | |"
        retrained = self.options.epochs > 0
        for low_rank in (True, False):
            way = "low rank on top" if low_rank else "selection alone"
            (error, size), (again, less) = REPORTED[self.options.network]
            row = self._row(self.knobs(size, low_rank), False)
            yield f"| {error} % at {size} KiB; {way} {row}"
            row = self._row(self.knobs(less, low_rank), retrained)
            yield f"| {again} % at {less} KiB, retrained; {way} {row}"

    def _row(self, knobs: Knobs, retrained: bool) -> str:
        start = time.perf_counter()
        small = self.compressed(knobs)
        seconds = time.perf_counter() - start
        size = kibibytes(small)
        cells = [f"{size:.0f}", f"{100 * size / kibibytes(self.model):.1f} %"]
        cells += [", ".join(f"{knob} {number}" for knob, number in knobs.items())]
        cells += [f"{errors(small, self.test):.2f}"]
        print(" ", cells, flush=True)
        again = ""
        if retrained:
            retrain(small, RECIPES[self.name].prepare, self.train, self.options.epochs)
            again = f"{errors(small, self.test):.2f}"
        cells += [again]
        return f"| {' | '.join(cells)} | {seconds:.0f} |"


def options_given() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--network", choices=[*NETWORKS, "alexnet"], required=True)
    parser.add_argument("--method", choices=["backward", "forward", "lasso"], default="backward")
    parser.add_argument("--chaining", choices=CHAININGS, default="top-down")
    parser.add_argument("--no-debias", dest="debias", action="store_false")
    parser.add_argument("--calibration", type=int, default=40000, help="training images")
    parser.add_argument("--epochs", type=int, default=30, help="of retraining; 0: none")
    parser.add_argument("--shrink", type=float, default=0.9, help="a step of the search for widths")
    parser.add_argument("--figures", action="store_true", help="draw them, and no table")
    parser.add_argument("--images", type=Path, help="AlexNet: a folder of train/ and val/")
    return parse(parser)


def main() -> None:
    """Print the table of a network, and draw its figures."""
    options = options_given()
    torch.set_flush_denormal(True)
    if options.network == "alexnet":
        from lnr_alexnet import rows

        for row in rows(options):
            print(row)
        return
    prepare = RECIPES[f"{options.network}-mnist"].prepare
    train, test = (load("mnist", options.data, options.work, train=t) for t in (True, False))
    model = load_trained(options.work, f"{options.network}-mnist")
    model.to(memory_format=torch.channels_last)  # convolves several times faster
    prepared = prepare(test[0]), test[1]
    experiment = Experiment(model, train, prepare(train[0]), prepared, options)
    if options.figures:
        figures = Figures(model, experiment.images, prepared, options)
        stem = options.work / f"lnr-{options.network}"
        publish(figures.by_chaining(experiment.path(low_rank=False)), Path(f"{stem}-chaining"))
        publish(figures.by_debiasing(), Path(f"{stem}-debiasing"))
        return
    table = []
    for row in experiment.rows():
        print(row, flush=True)
        table.append(row)
    print("", *table, sep="\n")


if __name__ == "__main__":
    main()
