"""A network that is too small grows while it trains, against one that has its final size at once.

MNIST, the six blocks of *SVD evolutive CNN* (J. Dejaegher, 2021) with two or three channels each.
Every growth adds half as many channels again (the last one a quarter) and computes what the network
did before. A network that has the widths that come of it from its first step trains for as many
multiply-accumulates in all. Both have the same rate over their own time. The test set is looked at
once for each of the two.

    python examples/reproduce/evolve_grow.py --data DIR [--seeds 3]
"""

from __future__ import annotations

import argparse

import data
from evolutive import BATCH, LAST_RATE, TASKS, Run, Widths

from fxsvd import cost
from fxsvd.passes import Widen

SMALL: Widths = ((1, 2, 2), (2, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 2), (2, 2, 2))
RATIOS = (0.5, 0.5, 0.25)


def main() -> None:
    """Grow, and train at the final widths from the start, for every seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=1, help="of compute, at the final size")
    parser.add_argument("--init", default="orthogonal", choices=["orthogonal", "split"])
    parser.add_argument("--shares", type=float, nargs=3, default=(0.01, 0.02, 0.05))
    options = data.parse(parser)
    work = _work(options)
    for seed in range(options.seeds):
        run = Run(TASKS["mnist"], options.data, options.work, SMALL, seed)
        _grow(run, work, options)
        _show(f"seed {seed}, grown", run)
        run = Run(TASKS["mnist"], options.data, options.work, _widths(run), seed)
        run.train(work // _macs(run), end=LAST_RATE)
        _show(f"seed {seed}, fixed", run)


def _show(what: str, run: Run) -> None:
    held = run.right(run.evolver.model.eval())
    print(
        f"{what}: {run.size} parameters, {held:.2f} % held out, {run.test():.2f} % test", flush=True
    )


def _macs(run: Run) -> int:
    return cost.measure(run.evolver.model).macs


def _grow(run: Run, work: int, options: argparse.Namespace) -> None:
    """Train and grow in turns, for so many steps times multiply-accumulates in all."""
    for share, ratio in zip(options.shares, RATIOS, strict=True):
        run.train(int(share * work / _macs(run)))
        widen = Widen(ratio=ratio, init=options.init)
        print(run.evolver.resize(widen, step=run.steps), flush=True)
    run.train(int((1 - sum(options.shares)) * work / _macs(run)), end=LAST_RATE)


def _work(options: argparse.Namespace) -> int:
    """Multiply-accumulates of so many epochs at the final size, for one image of every batch."""
    run = Run(TASKS["mnist"], options.data, options.work, SMALL)
    for ratio in RATIOS:
        run.evolver.resize(Widen(ratio=ratio))
    return int(options.epochs * len(run.images) / BATCH) * _macs(run)


def _widths(run: Run) -> Widths:
    blocks = [
        (block.get_submodule("one").weight, block.get_submodule("two").weight)
        for block in run.evolver.model.get_submodule("blocks").children()
    ]
    return tuple((one.shape[1], one.shape[0], two.shape[0]) for one, two in blocks)


if __name__ == "__main__":
    main()
