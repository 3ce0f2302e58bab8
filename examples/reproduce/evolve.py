"""Networks that shrink while they train, after J. Dejaegher, *SVD evolutive CNN*, 2021.

MNIST: six blocks, 1,971,308 parameters; Fashion-MNIST: six blocks, 476,370. Every so many steps all
spaces are narrowed by ``Select``, refitted to what their readers computed on training images; a
resize that costs more than one point of accuracy is undone, and half as much tried next. At
``--target`` parameters the network is trained on, and kept in WORK. With ``--floor`` it is shrunk
on, in the end channel by channel, trained to the end after each, until none can go without the
accuracy falling below; WORK keeps the smallest, from where the same command, run again, goes on
(and tries once more what was needed). Steered by 5,000 training images that are held out, where
more is asked for than the floor: the best of several trainings is partly luck. The test set is
looked at once for each of the two sizes.

    python examples/reproduce/evolve.py mnist --data DIR --target 12500 --floor 98.5
    python examples/reproduce/evolve.py fashion_mnist --data DIR --target 250000 --floor 90
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Collection
from typing import Any

import data
import torch
from evolutive import HELD_OUT, TASKS, Run

import fxsvd
from fxsvd.cost import parameters
from fxsvd.dependency import Dependencies
from fxsvd.passes import Prune, Select
from fxsvd.rewrite import rewrite

CALIBRATION = 1000
MARGIN = 1.2  # standard errors: so much is the best of five draws above what it stands for


class Shrinking:
    """Narrows all spaces alike, or one after the other where that costs too much."""

    def __init__(self, run: Run, ratio: float, pause: int) -> None:
        self.run, self.pause = run, pause
        self.first = self.ratio = ratio

    def until(self, target: int, resizes: int = 60) -> None:
        """Shrink and train in turns, so often at most."""
        while self.run.size > target and resizes:
            self._together(target) if self.ratio > self.first / 8 else self._apart(target)
            self.run.train(self.pause)
            resizes -= 1

    def _together(self, target: int) -> None:
        needed = 1 - (target / self.run.size) ** 0.5  # parameters go with the square of the widths
        event = _narrow(self.run, min(self.ratio, needed + 0.01))
        if event.undone:
            self.ratio /= 2
        elif not event.plan.edits:  # of so few channels, that share is none
            self.ratio = 0

    def _apart(self, target: int) -> None:
        """Every space loses a channel or an eighth of them, one after the other."""
        widths = _widths(fxsvd.analyze(self.run.evolver.model))
        for name, width in sorted(widths.items(), key=lambda item: -item[1]):
            if self.run.size > target:
                _narrow(self.run, {name: _eighth(width)})


def smallest(run: Run, options: argparse.Namespace) -> None:
    """Shrink until no channel can go any more: spaces together where they can, else one at a time.

    Few channels say much each, and what the network is without one is only known when it has been
    trained without it: the channel that costs most goes first. Where the accuracy is not held, the
    network becomes what it was, and that space keeps what it has. Weights are not refitted here:
    least squares on inputs that say nearly the same gives large ones, which train badly.
    """
    kept, needed = options.work / f"evolve-{options.task}-smallest.pt", set[str]()
    if kept.exists():
        run.restore(torch.load(kept, weights_only=False))
    least = options.floor + MARGIN * (options.floor * (100 - options.floor) / HELD_OUT) ** 0.5
    together = True  # spaces lose the same share, where all have enough channels for that
    while spare := _widths(deps := fxsvd.analyze(run.evolver.model), needed):
        shares = _dearest(deps, spare)
        alike = together and max(shares.values()) <= options.ratio
        if alike:
            shares = dict.fromkeys(spare, options.ratio)
        known = copy.deepcopy(run.evolver.state_dict())
        run.evolver.max_loss_increase = float("inf")
        _narrow(run, shares, refit=False)
        right = run.finish(options.epochs)
        print(f"{run.size} parameters: {right:.2f} % of those held out", flush=True)
        if right >= least:
            torch.save(run.evolver.state_dict(), kept)
            continue
        run.restore(known)
        if alike:
            together = False
        else:
            needed |= shares.keys()


def _dearest(deps: Dependencies, widths: dict[str, int]) -> dict[str, float]:
    """A channel or an eighth of them, from the space where that saves most parameters."""

    def left(share: dict[str, float]) -> int:
        return parameters(rewrite(deps, Prune(ratio=share).propose(deps)))

    return min(({name: _eighth(width)} for name, width in widths.items()), key=left)


def _widths(deps: Dependencies, needed: Collection[str] = ()) -> dict[str, int]:
    """Of the spaces that have a channel to lose, and are not needed as they are."""
    spare = (s for s in deps.spaces if s.frozen is None and s.name not in needed)
    return {s.name: s.width for s in spare if s.width > 1}


def _eighth(width: int) -> float:
    """The share of an eighth of so many channels, or of one."""
    return max(1, width // 8) / width


def _narrow(run: Run, ratio: Any, *, refit: bool = True) -> fxsvd.Event:
    start = time.perf_counter()
    select = Select(ratio=ratio, chaining="top-down", debias=refit)
    event = run.evolver.resize(select, data=run.samples(CALIBRATION), step=run.steps)
    print(f"{event}, {time.perf_counter() - start:.1f} s", flush=True)
    return event


def main() -> None:
    """Train, shrink, train on, and look at the test set."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("task", choices=["mnist", "fashion_mnist"])
    parser.add_argument("--target", type=int, required=True, help="parameters, at most")
    parser.add_argument("--floor", type=float, help="of the accuracy, for the smallest network")
    parser.add_argument("--ratio", type=float, default=0.25, help="of the channels, each time")
    parser.add_argument("--pause", type=int, default=150, help="steps from one time to the next")
    parser.add_argument("--first", type=int, default=150, help="steps before the first time")
    parser.add_argument("--epochs", type=float, default=12, help="at the sizes that are tested")
    options = data.parse(parser)
    start = time.perf_counter()
    run = Run(TASKS[options.task], options.data, options.work)
    print(f"{run.size} parameters")
    trained = options.work / f"evolve-{options.task}-{options.target}.pt"
    if trained.exists():
        run.restore(torch.load(trained, weights_only=False))
    else:
        run.train(options.first)
        Shrinking(run, options.ratio, options.pause).until(options.target)
        print(f"{run.finish(options.epochs):.2f} % of those held out")
        torch.save(run.evolver.state_dict(), trained)
    _show(run, start)
    if options.floor is not None:
        smallest(run, options)
        _show(run, start)


def _show(run: Run, start: float) -> None:
    minutes = (time.perf_counter() - start) / 60
    print(f"{run.size} parameters, {run.test():.2f} % of the test set, {minutes:.0f} minutes")


if __name__ == "__main__":
    main()
