"""Twelve blocks on CIFAR-10: channels move to where they cost less, against widths that stay.

The network of 2.48 million parameters of *SVD evolutive CNN* (J. Dejaegher, 2021). One run keeps
its widths. The other, ``--at`` steps after it began, gets up to twice as many channels in the first
six blocks, where a channel has few parameters, and loses as many inside the others, those that are
worth least for what they cost (``fxsvd.Balance``), as have to go for ``--budget`` parameters in
all. Should that cost accuracy, it is undone and tried again as many steps later. Both take as many
steps, with the same rates, from the same weights. 5,000 training images are held out; the test set
is looked at once for each of the two.

    python examples/reproduce/evolve_cifar.py --data DIR --work DIR [--steps 2800] [--seeds 1]
"""

from __future__ import annotations

import argparse

import data
from evolutive import LAST_RATE, TASKS, Run
from torch.nn import functional as F

import fxsvd
from fxsvd.passes import Widen

BATCHES = 4  # of labelled images
CONSTANT = 0.5  # share of the steps before the rate falls
KEEP = 100  # steps; what was killed goes on from the last that was kept in WORK
WIDER = {
    "blocks.[123].one": 64,
    "blocks.0.two": 64,  # and block 1, which writes to the same channels
    "blocks.[23].two": 96,
    "blocks.[45].two": 112,
}
STAY = ("blocks.*.two", *(f"blocks.{block}.one" for block in range(6)))


def main() -> None:
    """Train with widths that stay and with widths that change, for every seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=2800, help="batches of 64 images")
    parser.add_argument("--at", type=int, default=50, help="the step of the resize")
    parser.add_argument("--budget", type=int, default=2_190_000, help="parameters, at most")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", choices=["fixed", "evolved"])
    options = data.parse(parser)
    if not 0 < options.at <= CONSTANT * options.steps:
        parser.error("--at is a step before the rate falls, that is in the first half of --steps")
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for kind in ("fixed", "evolved"):
            if options.only in (None, kind):
                _one(kind, seed, options)


def _one(kind: str, seed: int, options: argparse.Namespace) -> None:
    run = Run(TASKS["cifar10"], options.data, options.work, seed=seed)
    moved = (options.at, options.budget) if kind == "evolved" else ()
    name = "-".join(map(str, (kind, seed, options.steps, *moved)))
    kept = options.work / f"evolve-cifar-{name}.pt"
    if kept.exists():
        run.load(kept)
    half = int(CONSTANT * options.steps)
    for step in range(run.steps, options.steps):
        if kind == "evolved" and step % options.at == 0 and 0 < step <= half:
            _resize(run, options, half)
        fall = max(0, step - half) / (options.steps - half)
        rate = run.task.rate + (LAST_RATE - run.task.rate) * fall
        run.train(1, rate, rate)
        if run.steps % KEEP == 0:
            run.save(kept)
    held = run.right(run.evolver.model.eval())
    print(
        f"seed {seed}, {kind}: {run.size} parameters, {run.steps} steps, {held:.2f} % held out, "
        f"{run.test():.2f} % test",
        flush=True,
    )


def _resize(run: Run, options: argparse.Namespace, half: int) -> None:
    """Widen the early blocks, once, and bring those behind them within the budget."""
    if run.steps == options.at:
        print(run.evolver.resize(Widen(to=WIDER), step=run.steps))
    if run.size > options.budget:
        batches = [run.batch() for _ in range(BATCHES)]
        rate = (half - run.steps) * run.task.rate
        balance = fxsvd.Balance(options.budget, F.cross_entropy, batches, rate=rate, ignore=STAY)
        for step in balance(run.evolver.model, run.steps):
            print(run.evolver.resize(step, step=run.steps))
        spaces = fxsvd.analyze(run.evolver.model).spaces
        print({space.name: space.width for space in spaces}, flush=True)


if __name__ == "__main__":
    main()
