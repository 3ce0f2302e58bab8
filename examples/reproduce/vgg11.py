"""VGG-11's classifier in low rank: accuracy against compression, for SVD and CUR of many kinds.

    python examples/reproduce/train.py vgg11-mnist --data DIR     # and vgg11-cifar10
    python examples/reproduce/vgg11.py [mnist] [cifar10] --data DIR [--work DIR] [--out DIR]

The convolutions stay, so their outputs are computed once. fc1 (25088 → 4096) and fc2 (4096 → 4096)
are replaced by two layers each, the last layer is left alone, nothing is trained afterwards. Every
row goes through ``fxsvd.compile``; WORK/vgg11-DATASET.csv holds what is done, so an interrupted run
goes on. Tables are written to OUT/vgg11-DATASET.md.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from data import CIFAR10, MNIST_32, load, parse, replace_file
from networks import accuracy, load_trained
from torch import Tensor, nn

import fxsvd
from fxsvd.cost import parameters
from fxsvd.passes import Factorize, Fold

CALIBRATION = 1000
SEEDS = 10
PREPARE = {"mnist": MNIST_32, "cifar10": CIFAR10}
REPORTED = {  # ratio: (rank of fc1, of fc2, accuracy on MNIST, on CIFAR-10); of SVD, then of CUR
    "svd": {
        25: (141, 82, 99.41, 75.07),
        150: (24, 14, 99.42, 75.08),
        225: (16, 10, 99.44, 75.06),
        300: (12, 7, 99.42, 75.00),
        400: (9, 6, 99.41, 73.57),
        500: (8, 5, 99.25, 69.62),
        600: (6, 4, 70.67, 73.39),
    },
    "cur": {
        12: (293, 171, 99.42, 73.39),
        29: (121, 71, 99.44, 72.90),
        100: (35, 20, 90.33, 64.62),
    },
}
DRAWN = ("linear-time", "leverage-score")
SVDS = ("svd on data", "svd on data, top-down", "gradient on data", "svd")
CURS = ("deim", "leverage", "qr", *DRAWN)


_SMALL = Factorize(rank={"fc1": 24, "fc2": 14})
EXACT: dict[str, list[Any]] = {
    "fc1 to 1e-9 of its norm": [Factorize(error=1e-18, only=("fc1",))],
    "pool folded": [Fold(dead=False)],
    "pool folded, svd on data": [Fold(dead=False), _SMALL],
    "svd on data, from nothing": [_SMALL],
}


@dataclass(frozen=True)
class Row:
    """One compilation."""

    method: str
    ratio: float
    fc1: int
    fc2: int
    seed: int
    parameters: int
    accuracy: float
    lost_fc1: float | None  # of its variance on the calibration data
    lost_fc2: float | None
    seconds: float


def head(model: Any) -> nn.Module:
    """What comes behind the convolutions."""
    fc1, relu1, drop1, fc2, relu2, drop2, fc3 = model.classifier
    layers = OrderedDict[str, nn.Module](pool=model.avgpool, flatten=nn.Flatten())
    layers.update(fc1=fc1, relu1=relu1, drop1=drop1, fc2=fc2, relu2=relu2, drop2=drop2, fc3=fc3)
    return nn.Sequential(layers).eval()


@torch.no_grad()
def features(model: Any, dataset: str, data: Path, work: Path) -> dict[str, Tensor]:
    """Outputs of the convolutions: of the first training images and of the test set; its labels."""
    path = work / f"vgg11-{dataset}-features.pt"
    if not path.exists():
        out = {}
        for split in ("train", "test"):
            images, labels = load(dataset, data, work, train=split == "train")
            if split == "train":
                order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
                images, labels = images[order[:CALIBRATION]], labels[order[:CALIBRATION]]
            parts = PREPARE[dataset](images).split(100)
            out[split] = torch.cat([model.features(part) for part in parts])
            out[f"{split} labels"] = labels
        replace_file(path, lambda partial: torch.save(out, partial))
    found: dict[str, Tensor] = torch.load(path, weights_only=True)
    return found


class Table:
    """Rows by method, ratio and seed, kept in a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, {}
        if path.exists():
            with path.open(newline="") as file:
                self.rows = {(r["method"], float(r["ratio"]), int(r["seed"])): r
                             for r in csv.DictReader(file)}  # fmt: skip

    def add(self, row: Row) -> None:
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)])
            if new:
                writer.writeheader()
            writer.writerow(asdict(row))
        self.rows[row.method, float(row.ratio), row.seed] = {
            k: "" if v is None else str(v) for k, v in asdict(row).items()
        }
        print(row, flush=True)

    def of(self, method: str, ratio: float) -> list[dict[str, str]]:
        return [r for (m, c, _), r in self.rows.items() if (m, c) == (method, float(ratio))]


def wanted() -> Iterator[tuple[str, int, int, int, int]]:
    """Method, ratio, ranks and seed of every row, one decomposition after the other."""
    for method in SVDS:
        for ratio, (fc1, fc2, *_) in REPORTED["svd"].items():
            yield method, ratio, fc1, fc2, 0
    for seed in range(SEEDS):
        for ratio, (fc1, fc2, *_) in REPORTED["cur"].items():
            once = ("svd on data", "svd", "deim on data", *CURS)
            for method in DRAWN if seed else once:
                yield method, ratio, fc1, fc2, seed


def compiled(net: nn.Module, seen: dict[str, Tensor], **options: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    small = fxsvd.compile(net, seen["test"][:2], progress=False, **options)
    return small, time.perf_counter() - start


def run(net: nn.Module, seen: dict[str, Tensor], table: Table) -> None:
    """Fill in what the table lacks."""
    calibration = list(seen["train"].split(250))
    labelled = list(zip(calibration, seen["train labels"].split(250), strict=True))
    for method, ratio, fc1, fc2, seed in wanted():
        if (method, float(ratio), seed) in table.rows:
            continue
        kind, _, on_data = method.partition(" on ")
        data = calibration if kind == "svd" or on_data else None
        factorize = Factorize(
            rank={"fc1": fc1, "fc2": fc2},
            method=kind,
            data_aware=bool(on_data),
            chaining="top-down" if on_data.endswith("top-down") else "parallel",
            loss=nn.functional.cross_entropy if kind == "gradient" else None,
            data=labelled if kind == "gradient" else None,
            seed=seed,
            known=KNOWN,
        )
        small, seconds = compiled(net, seen, passes=[factorize], data=data, verify=seed == 0)
        lost = {site.layer: site.predicted for site in small.report.sites}
        right = accuracy(small, seen["test"], seen["test labels"])
        sizes = (parameters(small), right, lost.get("fc1"), lost.get("fc2"), seconds)
        table.add(Row(method, ratio, fc1, fc2, seed, *sizes))


KNOWN: dict[Any, Any] = {}


def exact(net: nn.Module, seen: dict[str, Tensor], table: Table) -> None:
    """What the 49 copies of every feature allow without any loss; and the time from nothing."""
    data = list(seen["train"].split(250))
    for name, passes in EXACT.items():
        if table.of(name, 0):
            continue
        small, seconds = compiled(net, seen, passes=passes, data=data)
        lost = {site.layer: site.predicted for site in small.report.sites}
        rank = min(next(small.get_submodule("fc1").parameters()).shape)
        right = accuracy(small, seen["test"], seen["test labels"])
        sizes = (parameters(small), right, lost.get("fc1"), lost.get("fc2"), seconds)
        table.add(Row(name, 0, rank, 0, 0, *sizes))


def markdown(dataset: str, dense: float, table: Table) -> str:
    """The table, with what the source reports."""
    column = 2 if dataset == "mnist" else 3
    lines = [
        f"VGG-11, {dataset}: dense 119,586,826 parameters in the classifier, {dense:.2%}",
        "",
        "| method | CR | ranks | parameters | test accuracy | spread (10 seeds) | reported "
        "| fc1 lost | fc2 lost |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for family, methods in (("svd", SVDS), ("cur", (*CURS, "deim on data"))):
        for ratio, (fc1, fc2, *reported) in REPORTED[family].items():
            shown = f"{reported[column - 2]:.2f} %"
            names = methods if family == "svd" else ("svd on data", "svd", *methods)
            for method in names:
                rows = table.of(method, ratio)
                if rows:
                    lines.append(_line(method, ratio, f"{fc1}/{fc2}", rows, shown))
    for name in EXACT:
        rows = table.of(name, 0)
        lines += [_line(name, 0, r["fc1"], [r], f"{float(r['seconds']):.0f} s") for r in rows]
    return "\n".join(lines) + "\n"


def _line(method: str, ratio: float, ranks: str, rows: list[dict[str, str]], shown: str) -> str:
    values = [100 * float(r["accuracy"]) for r in rows]
    spread = ""
    if len(values) > 1:
        spread = f"±{statistics.stdev(values):.2f}, {min(values):.2f}–{max(values):.2f}"
    lost = [f"{float(rows[0][k]):.2e}" if rows[0][k] else "" for k in ("lost_fc1", "lost_fc2")]
    cells = [
        *(method, f"{ratio:g}" if ratio else "", ranks, f"{int(rows[0]['parameters']):,}"),
        *(f"{statistics.mean(values):.2f} %", spread, shown, *lost),
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Fill and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("datasets", nargs="*", default=["mnist", "cifar10"])
    parser.add_argument("--out", type=Path, help="where the tables go; default: --work")
    arguments = parse(parser)
    for dataset in arguments.datasets:
        model = load_trained(arguments.work, f"vgg11-{dataset}")
        seen = features(model, dataset, arguments.data, arguments.work)
        net, table = head(model), Table(arguments.work / f"vgg11-{dataset}.csv")
        del model
        KNOWN.clear()
        run(net, seen, table)
        exact(net, seen, table)
        dense = accuracy(net, seen["test"], seen["test labels"])
        text = markdown(dataset, dense, table)
        (arguments.out or arguments.work).joinpath(f"vgg11-{dataset}.md").write_text(text)
        print(text)


if __name__ == "__main__":
    main()
