"""Networks that shrink while they train, after J. Dejaegher, *SVD evolutive CNN*, 2021.

MNIST: six blocks, 1,971,308 parameters; Fashion-MNIST: six blocks, 476,370. Every so many steps all
spaces are narrowed by ``Select``, refitted to what their readers computed on training images; a
resize that costs more than one point of accuracy is undone, and half as much tried next. At
``--target`` parameters the network is trained on, and kept in WORK. With ``--floor`` it is shrunk
further and further, and what had that accuracy last, once trained, is shown; this can be repeated
from what WORK holds. Steered by 5,000 training images that are held out; the test set is looked at
once for each of the two sizes.

    python examples/reproduce/evolve.py mnist --data DIR --target 12500 --floor 98.5
    python examples/reproduce/evolve.py fashion_mnist --data DIR --target 250000 --floor 90
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import data
import torch
from evolutive import RATE, TASKS, Run
from torch.nn import functional as F

import fxsvd
from fxsvd.compile import Pass
from fxsvd.cost import parameters
from fxsvd.passes import Select

CALIBRATION = 1000
BATCHES = 8  # of labelled images, for new channels
FULL, FILLS = 0.95, 8  # what of a size has to be used, and how often channels may come for that
MARGIN = 0.1  # points above the floor on the images held out: the test set differs by chance
GENTLE = RATE / 2  # few channels, once trained to the end, do not bear the first rate any more


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
        deps = fxsvd.analyze(self.run.evolver.model)
        widths = {space.name: space.width for space in deps.spaces if space.frozen is None}
        for name, width in sorted(widths.items(), key=lambda item: -item[1]):
            if width > 1 and self.run.size > target:
                _narrow(self.run, {name: max(1, width // 8) / width})


def smallest(run: Run, options: argparse.Namespace) -> None:
    """Shrink until the accuracy cannot be held any more, and go back to what had it last.

    Few channels say much each, and not alike: one goes at a time, from the space where that costs
    least for what it saves, tried out on the held-out images. A channel of the stream may be half
    the network: what is then free below the goal goes to channels inside the blocks. What either
    costs, training wins back.
    """
    run.evolver.max_loss_increase = float("inf")
    while True:
        known = copy.deepcopy(run.evolver.state_dict())
        goal = int(run.size * options.step)
        while run.size > goal:
            _narrow(run, _cheapest(run))
            run.train(options.pause, GENTLE, GENTLE)
        for _ in range(FILLS):
            if run.size < FULL * goal:
                _fill(run, goal, options)
                run.train(options.pause, GENTLE, GENTLE)
        right = run.finish(options.epochs, GENTLE)
        print(f"{run.size} parameters: {right:.2f} % of those held out", flush=True)
        if right < options.floor + MARGIN:
            run.restore(known)
            return


def _fill(run: Run, goal: int, options: argparse.Namespace) -> None:
    """The blocks get the channels that promise most."""
    batches = [run.batch() for _ in range(BATCHES)]
    rate = options.pause * GENTLE
    fill = fxsvd.Balance(goal, F.cross_entropy, batches, rate=rate, most=0.5, ignore="*.two")
    for step in fill(run.evolver.model, run.steps):
        _resize(run, step)


def _narrow(run: Run, ratio: Any) -> fxsvd.Event:
    return _resize(run, _select(ratio), run.samples(CALIBRATION))


def _resize(run: Run, how: Pass, images: Any = None) -> fxsvd.Event:
    start = time.perf_counter()
    event = run.evolver.resize(how, data=images, step=run.steps)
    print(f"{event}, {time.perf_counter() - start:.1f} s", flush=True)
    return event


def _select(ratio: Any) -> Select:
    return Select(ratio=ratio, chaining="top-down")


def _cheapest(run: Run) -> dict[str, float]:
    """One channel of the space that loses least accuracy for the parameters that it saves."""
    model, images = run.evolver.model.eval(), run.samples(CALIBRATION)
    right, prices = run.right(model), dict[float, Any]()
    for space in fxsvd.analyze(model).spaces:
        if space.frozen is None and space.width > 1:
            small = fxsvd.compile(
                model,
                run.held[0][:2],
                passes=[_select({space.name: 1 / space.width})],
                data=images,
                verify=False,
                progress=False,
            )
            saved = max(run.size - parameters(small), 1)
            prices[(right - run.right(small.eval())) / saved] = {space.name: 1 / space.width}
    cheapest: dict[str, float] = prices[min(prices)]
    return cheapest


def main() -> None:
    """Train, shrink, train on, and look at the test set."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("task", choices=["mnist", "fashion_mnist"])
    parser.add_argument("--target", type=int, required=True, help="parameters, at most")
    parser.add_argument("--floor", type=float, help="of the accuracy, for the smallest network")
    parser.add_argument("--step", type=float, default=0.8, help="from a size to the next below")
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
