"""The two figures of lnr.py: test error against size, by chaining, and with and without debiasing.

Not a command. Each is written as CSV, printed as a table, and drawn where matplotlib is there.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

from data import Labelled
from lnr_search import CALIBRATING, Point, batches, parameters, passes
from networks import accuracy
from torch import Tensor, nn

import fxsvd
from fxsvd.passes import Select

Curve = list[tuple[float, float]]  # KiB, percent of errors

CHAININGS = ("parallel", "top-down", "bottom-up", "bottom-up+refit")
PENALTIES = (0.5, 0.3, 0.2, 0.12, 0.07, 0.04, 0.02)
POINTS = 8
SMALLER = (0.8, 0.6, 0.4, 0.25)  # shares of the widths at the end of the path


def kibibytes(model: nn.Module) -> float:
    """Of float32 parameters."""
    return parameters(model) * 4 / 1024


def errors(model: nn.Module, test: Labelled) -> float:
    """Percent of the test images."""
    return 100 * (1 - accuracy(model, *test))


class Figures:
    """Curves of one network.

    Args:
        model: the original.
        images: prepared training images.
        test: prepared test images, and labels.
        options: of the command.
    """

    def __init__(
        self, model: nn.Module, images: Tensor, test: Labelled, options: argparse.Namespace
    ) -> None:
        self.graph = fxsvd.capture(model, images[:2])
        self.data, self.test, self.options = batches(images, CALIBRATING), test, options

    def by_chaining(self, path: list[Point]) -> dict[str, Curve]:
        """The same widths, chained in each way; where the path ends, all of them shrink alike."""
        small = [knobs for size, _, knobs in path if size < 0.5 * path[0][0]]
        chosen = small[:: -(-len(small) // (POINTS - len(SMALLER)))]
        last = path[-1][2]
        chosen += [{k: max(1, round(share * n)) for k, n in last.items()} for share in SMALLER]
        return {
            chaining: self._curve([passes(k, self.options, chaining=chaining) for k in chosen])
            for chaining in CHAININGS
        }

    def by_debiasing(self) -> dict[str, Curve]:
        """Along the penalties of the lasso, with and without the second fit."""
        lasso: dict[str, Any] = {"method": "lasso", "chaining": "parallel", "positions": 8}
        return {
            name: self._curve([[Select(penalty=p, debias=debias, **lasso)] for p in PENALTIES])
            for name, debias in (("debiased", True), ("the lasso's own coefficients", False))
        }

    def _curve(self, each: list[list[Any]]) -> Curve:
        found = []
        for chosen in each:
            plan = fxsvd.plan(self.graph, passes=chosen, data=self.data)
            small = fxsvd.apply(self.graph, plan)
            found.append((round(kibibytes(small), 1), round(errors(small, self.test), 2)))
            print(f"  {chosen[0].chaining}, debias {chosen[0].debias}: {found[-1]}", flush=True)
        return found


def publish(curves: dict[str, Curve], file: Path) -> None:
    """Write a figure under a name without ending, and print it."""
    with file.with_suffix(".csv").open("w", newline="") as out:
        rows = [(name, *point) for name, curve in curves.items() for point in curve]
        csv.writer(out).writerows([("curve", "KiB", "test error %"), *rows])
    print(f"\n| {file.stem} | KiB: test error % |\n|---|---|")
    for name, curve in curves.items():
        print(f"| {name} | {' · '.join(f'{size:.0f}: {error:.2f}' for size, error in curve)} |")
    try:
        from matplotlib import pyplot
    except ImportError:
        print("pip install matplotlib, to have it drawn")
        return
    drawing, axes = pyplot.subplots(figsize=(6, 4))
    for name, curve in curves.items():
        axes.plot(*zip(*sorted(curve), strict=True), marker="o", label=name)
    axes.set(xlabel="KiB of float32 parameters", ylabel="test error, %", yscale="log")
    axes.legend()
    drawing.savefig(file.with_suffix(".png"), dpi=120, bbox_inches="tight")
    pyplot.close(drawing)
