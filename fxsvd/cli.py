"""The ``fxsvd`` command: ``demo``, ``compress``, ``inspect``.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 an ``FxsvdError`` (its
message says what to do), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from torch import nn

from fxsvd import demo, models
from fxsvd.capture import capture
from fxsvd.compile import compile as compile_
from fxsvd.compile import plan as plan_
from fxsvd.cost import latencies, measure
from fxsvd.dependency import analyze
from fxsvd.errors import FxsvdError
from fxsvd.export import export_onnx
from fxsvd.passes import Prune
from fxsvd.progress import Stages

CRITERIA = ("l1", "l2", "bn", "random", "dead")  # "taylor" needs a loss and data: Python only
MODEL = "timm:NAME, torchvision:NAME, or package.module:factory"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Raises:
        SystemExit: wrong usage (code 2), or help was asked for (code 0).

    >>> main(["inspect", "torch.nn:Idendity", "--input-size", "8"])
    1
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if getattr(arguments, "dry_run", False) and (arguments.onnx or arguments.save_report):
        parser.error("--dry-run only makes a plan: it goes without --onnx and --save-report")
    try:
        arguments.run(arguments, Stages(quiet=0.0))
    except FxsvdError as error:
        print(f"fxsvd: error: {error}", file=sys.stderr)
        return 1
    return 0


# ---------------------------------------------------------------- what can be asked


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("fxsvd", description="Makes neural networks narrower.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands.add_parser("demo", help="train, compress and export a small network"))
    _add_compress(commands.add_parser("compress", help="prune a model, verify it, export it"))
    _add_inspect(commands.add_parser("inspect", help="show what can be narrowed, and what cannot"))
    return parser


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="default: here")
    parser.add_argument("--epochs", type=_positive, default=6, help="of training (default 6)")
    parser.set_defaults(run=_demo)


def _add_compress(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    what = parser.add_argument_group("what to remove")
    add = what.add_argument
    add("--ratio", type=float, default=0.5, help="fraction of channels removed (default 0.5)")
    add("--criterion", choices=CRITERIA, default="l2", help="which channels go first (default l2)")
    add("--scope", choices=("local", "global"), default="local", help="rank within a space or all")
    add("--heads", action="store_true", help="remove attention heads, not features inside them")
    add("--round-to", type=_positive, default=1, metavar="N", help="widths are multiples of N")
    for option, text in (("--ignore", "layers that stay"), ("--only", "no layers but these")):
        add(option, nargs="+", action="extend", default=[], metavar="PATTERN", help=text)
    out = parser.add_argument_group("what to write")
    add = out.add_argument
    add("--onnx", type=Path, metavar="OUT", help="the narrower network, checked in ONNX Runtime")
    add("--save-report", type=Path, metavar="OUT.json", help="the report as JSON")
    add("--plan", type=Path, metavar="OUT.json", help="the plan, for fxsvd.apply")
    parser.add_argument("--no-verify", action="store_true", help="skip the equivalence check")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.set_defaults(run=_compress)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.set_defaults(run=_inspect)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    add = parser.add_argument_group("the model").add_argument
    add("--input-size", type=_size, metavar="3,224,224", help="shape of one sample")
    add("--batch", type=_positive, default=1, metavar="B", help="example batch (default 1)")
    add("--pretrained", action="store_true", help="fetch timm's or torchvision's weights")
    add("--weights", type=Path, metavar="FILE", help="a state dict, .safetensors or .pt")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _size(text: str) -> tuple[int, ...]:
    try:
        return tuple(_positive(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape such as 3,224,224") from error


# ---------------------------------------------------------------- what is done


def _demo(arguments: argparse.Namespace, stages: Stages) -> None:
    arguments.out.mkdir(parents=True, exist_ok=True)
    print(demo.run(arguments.out, stages, epochs=arguments.epochs))


def _compress(arguments: argparse.Namespace, stages: Stages) -> None:
    prune = Prune(
        ratio=arguments.ratio,
        criterion=arguments.criterion,
        scope=arguments.scope,
        round_to=arguments.round_to,
        only=tuple(arguments.only),
        ignore=tuple(arguments.ignore),
        heads=arguments.heads,
    )
    _check_folders(arguments)
    model, inputs = _load(arguments, stages)
    if arguments.dry_run:
        stages("planning")
        plan = plan_(model, inputs, passes=[prune])
        print(plan)
        _write(arguments.plan, plan.to_json())
        return
    verify = not arguments.no_verify
    small = compile_(model, inputs, passes=[prune], verify=verify, progress=stages)
    report: Any = small.report
    print(report)
    _write(arguments.plan, report.plan.to_json())
    _write(arguments.save_report, report.to_json())
    stages("measuring latency")
    before, after = (1000 * s for s in latencies([model, small], inputs, runs=5, warmup=1))
    print(f"\nlatency: {before:.1f} ms before, {after:.1f} ms after (batch of {arguments.batch})")
    if arguments.onnx:
        stages("exporting")
        difference = export_onnx(small, arguments.onnx, inputs)
        print(f"wrote {arguments.onnx}, equal in ONNX Runtime to {difference:.1e}")


def _inspect(arguments: argparse.Namespace, stages: Stages) -> None:
    model, inputs = _load(arguments, stages)
    stages("capturing")
    graph = capture(model, inputs)
    stages("analysing")
    deps = analyze(graph)
    live = sum(space.frozen is None for space in deps.spaces)
    print(f"{measure(graph)}\n{live} of {len(deps.spaces)} channel spaces can be narrowed\n")
    print(deps)


def _load(arguments: argparse.Namespace, stages: Stages) -> tuple[nn.Module, Any]:
    stages(f"loading {arguments.model}")
    with redirect_stdout(sys.stderr):  # what hubs and factories print is no result of ours
        return models.load(
            arguments.model,
            pretrained=arguments.pretrained,
            weights=arguments.weights,
            size=arguments.input_size,
            batch=arguments.batch,
        )


def _check_folders(arguments: argparse.Namespace) -> None:
    """A wrong path must not cost the minutes before it is written."""
    for path in (arguments.onnx, arguments.save_report, arguments.plan):
        if path is not None and not path.parent.is_dir():
            raise FxsvdError(f"cannot write {path}: there is no folder {path.parent}")


def _write(path: Path | None, text: str) -> None:
    if path is not None:
        path.write_text(text + "\n")
        print(f"wrote {path}")
