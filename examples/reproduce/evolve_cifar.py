"""Twelve blocks on CIFAR-10: channels move to where they say more, against widths that stay.

The network of 2.48 million parameters of *SVD evolutive CNN* (J. Dejaegher, 2021). One run keeps
its widths. The other is brought to ``--budget`` parameters at the first resize, a quarter of the
way; at the next, half of the way, a few channels go where they are worth least for what they cost,
and come where they promise most (``fxsvd.Balance``). Both take as many steps, with the same rates,
from the same weights. 5,000 training images are held out; the test set is looked at once for each
of the two.

    python examples/reproduce/evolve_cifar.py --data DIR [--steps 1400] [--seeds 1] [--first-seed 0]
"""

from __future__ import annotations

import argparse
import time

import data
from evolutive import LAST_RATE, RATE, TASKS, Run
from torch.nn import functional as F

import fxsvd

BATCHES = 4  # of labelled images
CONSTANT = 0.5  # share of the steps before the rate falls; the last resize is then


def main() -> None:
    """Train with widths that stay and with widths that change, for every seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1400, help="batches of 64 images")
    parser.add_argument("--resizes", type=int, default=2)
    parser.add_argument("--budget", type=int, default=2_190_000, help="parameters, at most")
    parser.add_argument("--most", type=float, default=0.02, help="of a space's channels, each time")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", choices=["fixed", "evolved"])
    options = data.parse(parser)
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for kind in ("fixed", "evolved"):
            if options.only in (None, kind):
                _one(kind, seed, options)


def _one(kind: str, seed: int, options: argparse.Namespace) -> None:
    start = time.perf_counter()
    run = Run(TASKS["cifar10"], options.data, options.work, seed=seed)
    pause = int(CONSTANT * options.steps / options.resizes)
    for _ in range(options.resizes):
        run.train(pause)
        if kind == "evolved":
            _resize(run, options, pause)
    run.train(options.steps - run.steps, end=LAST_RATE)
    held, minutes = run.right(run.evolver.model.eval()), (time.perf_counter() - start) / 60
    print(
        f"seed {seed}, {kind}: {run.size} parameters, {run.steps} steps, {held:.2f} % held out, "
        f"{run.test():.2f} % test, {minutes:.0f} minutes",
        flush=True,
    )


def _resize(run: Run, options: argparse.Namespace, pause: int) -> None:
    batches = [run.batch() for _ in range(BATCHES)]
    balance = fxsvd.Balance(
        options.budget,
        F.cross_entropy,
        batches,
        rate=pause * RATE,
        most=options.most,
    )
    for step in balance(run.evolver.model, run.steps):
        print(run.evolver.resize(step, step=run.steps), flush=True)
    spaces = fxsvd.analyze(run.evolver.model).spaces
    print({space.name: space.width for space in spaces}, flush=True)


if __name__ == "__main__":
    main()
