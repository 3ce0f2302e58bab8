"""Every model of the zoo through the whole pipeline, a CSV row for each.

    python -m tests.zoo.sweep --out zoo.csv [--only PATTERN] [--resume] [--jobs N]
    python -m tests.zoo.sweep --summary zoo.csv

A model is captured, pruned by half with no configuration, verified in float64 and run at two batch
sizes, in a process of its own. Its status is one of

* ``pruned``: verified, at most 0.40 of the parameters are left;
* ``accounted``: verified, more are left, and each of those sits on an axis that the report names
  with its reason, or has only one axis of channels;
* ``large``: verified, but more is left than the reasons account for;
* ``error``: refused with a clear ``FxsvdError``;
* ``wrong``: the result differs from the silenced original, or does not run at another batch size;
* ``crash``: anything else, a time limit included.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

import fxsvd
from fxsvd.axes import Block
from fxsvd.passes import Prune
from fxsvd.rewrite import rewrite
from fxsvd.running import difference, run
from fxsvd.verify import verify_rewrite
from tests.zoo import models

RATIO = 0.40
BATCHES = (2, 3)
LIMIT = 900.0
EVERY = 10  # every tenth model is exported
STATUSES = ("pruned", "accounted", "large", "error", "wrong", "crash")


@dataclass
class Row:
    """What happened to one model; ``frozen`` is the width of all spaces that stay."""

    name: str
    source: str = ""
    status: str = "crash"
    before: int = 0
    after: int = 0
    ratio: float = 1.0
    frozen: int = 0
    reasons: str = ""
    capture_s: float = 0.0
    prune_s: float = 0.0
    verify_s: float = 0.0
    error: float = float("nan")
    batches: str = ""
    onnx: str = ""
    size: int = 0
    message: str = ""


class BatchError(Exception):
    """The result does not run, or gives other shapes or values, at another batch size."""


# ---------------------------------------------------------------- one model


def examine(name: str, *, onnx: bool = False) -> Row:
    """Put one model through the pipeline; nothing is raised."""
    row = Row(name, name.partition(":")[0])
    try:
        _pipeline(row, onnx=onnx)
    except (fxsvd.VerificationError, BatchError) as error:
        row.status, row.message = "wrong", _text(error)
    except fxsvd.FxsvdError as error:
        row.status, row.message = "error", _text(error)
    except Exception as error:  # the row says what it was
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        row.status, row.message = "crash", f"{_text(error)} ({where})"
    return row


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]


def _pipeline(row: Row, *, onnx: bool) -> None:
    model, x = models.model_and_input(row.name)
    row.size = x.shape[-1]
    row.before = _parameters(model)
    clock = _Clock()
    graph = fxsvd.capture(model, x, check=True)
    row.capture_s = clock.lap()
    deps = fxsvd.analyze(graph)
    plan = Prune(ratio=0.5).propose(deps)
    small = rewrite(deps, plan)
    row.prune_s = clock.lap()
    row.after = _parameters(small)
    row.ratio = row.after / max(row.before, 1)
    row.frozen, row.reasons = _frozen(deps)
    row.error = verify_rewrite(deps, plan, small, x)
    row.verify_s = clock.lap()
    _check_batches(model, small, x)
    row.batches = "ok"
    row.status = _status(row, deps)
    if onnx:
        row.onnx = _export(model, small, x)


class _Clock:
    def __init__(self) -> None:
        self.last = time.perf_counter()

    def lap(self) -> float:
        before, self.last = self.last, time.perf_counter()
        return round(self.last - before, 2)


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _frozen(deps: fxsvd.Dependencies) -> tuple[int, str]:
    """The width of all frozen spaces, and the reasons with the most parameters behind them."""
    width = sum(space.width for space in deps.spaces if space.frozen)
    weight: Counter[str] = Counter()
    for known in deps.analysis.parameters.values():
        if isinstance(known.value, nn.Parameter):
            for why in {why for block in known.type.blocks for why in _why(deps, block)}:
                weight[why] += known.value.numel()
    total = sum(p.numel() for p in deps.analysis.graph.parameters())
    if unused := total - _used(deps):
        weight["nothing reads it in eval mode"] = unused
    most = [(why, n / max(total, 1)) for why, n in weight.most_common(6)]
    return width, "; ".join(f"{why} ({share:.0%})" for why, share in most if share >= 0.02)


def _used(deps: fxsvd.Dependencies) -> int:
    """The number of parameters that the graph reads."""
    known = (known.value for known in deps.analysis.parameters.values())
    return sum(value.numel() for value in known if isinstance(value, nn.Parameter))


def _why(deps: fxsvd.Dependencies, block: Block) -> set[str]:
    """Why an axis of a parameter stays."""
    return {space.frozen for space in _spaces(deps, block) if space.frozen}


def _spaces(deps: fxsvd.Dependencies, block: Block) -> list[fxsvd.Space]:
    """The spaces on an axis of a parameter (kernels and positions have none)."""
    found = {*deps.space_of[deps.channels.of[block.atoms]].ravel().tolist()} - {-1}
    return [deps.spaces[i] for i in found]


def _status(row: Row, deps: fxsvd.Dependencies) -> str:
    """Whether what is left is little, or the reasons account for it."""
    if row.ratio <= RATIO:
        return "pruned"
    attainable = _attainable(deps) / max(row.before, 1)
    row.message = f"reasons account for {attainable:.2f}"
    return "accounted" if row.ratio <= attainable + 0.02 else "large"


def _attainable(deps: fxsvd.Dependencies) -> float:
    """Parameters left where every axis of channels is halved but those frozen with a reason."""
    left = float(sum(p.numel() for p in deps.analysis.graph.parameters()) - _used(deps))
    for known in deps.analysis.parameters.values():
        if isinstance(known.value, nn.Parameter):
            live = [b for b in known.type.blocks if _spaces(deps, b) and not _why(deps, b)]
            left += known.value.numel() * 0.5 ** len(live)
    return left


def _check_batches(model: nn.Module, small: fx.GraphModule, x: Tensor) -> None:
    """The result runs at two batch sizes, sample by sample alike, in the original's shapes."""
    outputs = []
    for batch in BATCHES:
        inputs = torch.cat([x] * batch)[:batch]
        try:
            outputs.append(run(small.eval(), ((inputs,), {})))
        except Exception as error:
            raise BatchError(f"at batch size {batch}: {_text(error)}") from error
    with torch.no_grad():
        expected = run(model.eval(), ((torch.cat([x, x])[: BATCHES[-1]],), {}))
    if _shapes(expected) != _shapes(outputs[-1]):
        raise BatchError(f"shapes {_shapes(outputs[-1])}, of the original {_shapes(expected)}")
    first = _head(outputs[-1], BATCHES[0])
    if not difference(first, outputs[0]) < 1e-3:  # float32; a sample mispaired is far above
        raise BatchError(f"batch sizes {BATCHES} differ by {difference(first, outputs[0]):.1e}")


def _shapes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    items = value.values() if isinstance(value, dict) else value
    return [_shapes(v) for v in items] if isinstance(value, dict | tuple | list) else None


def _head(value: Any, count: int) -> Any:
    if isinstance(value, Tensor):
        return value[:count]
    items = value.values() if isinstance(value, dict) else value
    return [_head(v, count) for v in items] if isinstance(value, dict | tuple | list) else value


def _export(model: nn.Module, small: nn.Module, x: Tensor) -> str:
    """``ok``, or what the exporter said, and whether it takes the original."""
    said = _export_one(small, x)
    if said == "ok":
        return said
    original = "takes" if _export_one(model, x) == "ok" else "refuses"
    return f"{said} (the exporter {original} the original)"


def _export_one(module: nn.Module, x: Tensor) -> str:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            fxsvd.export_onnx(module, Path(folder, "model.onnx"), x)
        except Exception as error:  # the row says what it was
            return _text(error)
    return "ok"


# ---------------------------------------------------------------- all models


def _child(connection: Connection, name: str, onnx: bool) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    connection.send(examine(name, onnx=onnx))


def sweep(names: list[str], jobs: int, limit: float, exported: frozenset[str]) -> Iterator[Row]:
    """A row per model as it is done, each in a process of its own."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    waiting, running = deque(names), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.popleft()
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(there, name, name in exported))
            process.start()
            there.close()
            running[here] = (name, process, time.monotonic())
        ready = wait(list(running), timeout=1.0)
        for connection, (name, process, start) in list(running.items()):
            seconds = time.monotonic() - start
            if connection in ready or seconds > limit:
                yield _collect(connection, name, process, seconds)
                del running[connection]


def _collect(connection: Any, name: str, process: Any, seconds: float) -> Row:
    row = Row(name, name.partition(":")[0], message=f"stopped after {seconds:.0f} s")
    try:
        if connection.poll():
            row = connection.recv()
    except EOFError:
        row.message = "the process ended without an answer (memory?)"
    process.kill()
    process.join()
    return row


def read(path: Path) -> list[Row]:
    """The rows of a CSV file, the last one of each model."""
    kinds = {f.name: {"int": int, "float": float}.get(str(f.type), str) for f in fields(Row)}
    with path.open(newline="") as file:
        rows = [Row(**{k: kinds[k](v) for k, v in line.items()}) for line in csv.DictReader(file)]
    return list({row.name: row for row in rows}.values())


def _write(path: Path, rows: Iterable[Row], mode: str) -> None:
    with path.open(mode, newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        if mode == "w":
            writer.writeheader()
        writer.writerows({k: _short(v) for k, v in asdict(row).items()} for row in rows)


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def _bar(done: int, total: int, counts: Counter[str], start: float, name: str) -> None:
    """A progress bar on stderr, in place where it is a terminal."""
    width = 30
    filled = width * done // max(total, 1)
    found = " ".join(f"{s} {counts[s]}" for s in STATUSES if counts[s])
    seconds = time.monotonic() - start
    line = f"[{'#' * filled:<{width}}] {done}/{total} {seconds:.0f} s  {found}  {name}"
    end = "\r" if sys.stderr.isatty() else "\n"
    sys.stderr.write(f"\x1b[2K{line[:150]}{end}" if end == "\r" else line + end)
    sys.stderr.flush()


def summary(rows: list[Row]) -> str:
    """A table by source, and a line for every model that is not simply pruned."""
    lines = [f"{'':<14}{'models':>8}" + "".join(f"{s:>11}" for s in STATUSES) + f"{'kept':>8}"]
    sources = [*dict.fromkeys(row.source for row in rows), ""]
    for source in sources:
        mine = [r for r in rows if source in ("", r.source)]
        counts = Counter(r.status for r in mine)
        kept = sorted(r.ratio for r in mine if r.status in ("pruned", "accounted"))
        median = f"{kept[len(kept) // 2]:.3f}" if kept else "-"
        cells = "".join(f"{counts[s]:>11}" for s in STATUSES)
        lines.append(f"{source or 'all':<14}{len(mine):>8}{cells}{median:>8}")
    good = sum(r.status in ("pruned", "accounted") for r in rows)
    onnx = [r for r in rows if r.onnx]
    lines += [
        "",
        f"pruned or accounted for, verified: {good / max(len(rows), 1):.1%}; largest difference "
        f"{max((r.error for r in rows if r.error == r.error), default=0):.1e}; exported to ONNX: "
        f"{sum(r.onnx == 'ok' for r in onnx)} of {len(onnx)}",
        "",
    ]
    for row in sorted(rows, key=lambda r: STATUSES.index(r.status)):
        if row.status != "pruned":
            about = f"{row.message} | {row.reasons}"
            lines.append(f"{row.status:<10}{row.ratio:6.3f}  {row.name}: {about}")
    lines += [f"onnx: {r.name}: {r.onnx}" for r in onnx if r.onnx != "ok"]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command; the exit status is 1 where a model is wrong or crashed."""
    parser = argparse.ArgumentParser(prog="tests.zoo.sweep", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("zoo.csv"))
    parser.add_argument("--only", default="*", help="glob patterns, separated by commas")
    parser.add_argument("--resume", action="store_true", help="skip models that --out has")
    parser.add_argument("--again", default="", help="with --resume: statuses to redo")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds per model")
    parser.add_argument("--names", type=Path, help="a file with names, in place of the whole zoo")
    parser.add_argument("--summary", type=Path, help="print the table of a finished sweep")
    options = parser.parse_args(arguments)
    if options.summary:
        sys.stdout.write(summary(read(options.summary)) + "\n")
        return 0
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    say = lambda line: sys.stderr.write(f"{line}\n")  # noqa: E731
    if options.names:
        listed = [n for n in options.names.read_text().split() if models.matches(n, options.only)]
    else:
        listed = models.names(options.only, say)
    old = read(options.out) if options.resume and options.out.exists() else []
    done = {row.name for row in old if row.status not in options.again.split(",")}
    _write(options.out, (row for row in old if row.name in done), "w")
    todo = [name for name in listed if name not in done]
    counts = Counter(row.status for row in old if row.name in done)
    start, exported = time.monotonic(), frozenset(listed[::EVERY])
    models.load()
    for row in sweep(todo, options.jobs, options.limit, exported):
        _write(options.out, [row], "a")
        counts[row.status] += 1
        _bar(sum(counts.values()), len(todo) + len(done), counts, start, row.name)
    say("")
    sys.stdout.write(summary(read(options.out)) + "\n")
    return int(bool(counts["wrong"] + counts["crash"]))


if __name__ == "__main__":
    sys.exit(main())
