"""Evolver: a network that is resized while it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import fx, nn
from torch.optim import Optimizer

from fxsvd import cost
from fxsvd.capture import capture
from fxsvd.compile import Pass
from fxsvd.data.batches import Data
from fxsvd.dependency import Dependencies, analyze
from fxsvd.edits import Plan
from fxsvd.errors import PlanError
from fxsvd.evolving.agreeing import agreed_on, agreed_plan, share_buffers
from fxsvd.evolving.averages import averaged_network, resized_average
from fxsvd.evolving.carrying import carry, require_owner
from fxsvd.evolving.history import (
    Event,
    History,
    restored,
    stored,
    widths_of,
    without_numbers,
)
from fxsvd.evolving.judging import Loss, judged, too_much
from fxsvd.evolving.operators import residual_spectra
from fxsvd.evolving.policies import require_passes
from fxsvd.evolving.recent import Recent
from fxsvd.evolving.replacing import become
from fxsvd.evolving.sharding import require_whole
from fxsvd.rewrite import rewrite
from fxsvd.verify import verify_rewrite

Policy = Callable[[fx.GraphModule, int], Sequence[Pass]]
Average = TypeVar("Average", bound=nn.Module)


class Evolver:
    """Resizes a network in the middle of training; the optimizer goes on with what it remembers.

    Train ``evolver.model``, with the optimizer that is given here: both stay the same objects, so
    loops, schedulers and gradient scalers that hold them need not know. What is decided (a policy)
    and what is done (``resize``) are apart: either can be used alone.

    Under ``DistributedDataParallel`` every rank has an evolver of its own, with the same policy and
    seeds; losses are averaged over the ranks, buffers and new numbers are those of the first, so
    that all decide alike. Wrap ``evolver.model``, and wrap it anew after each resize. For FSDP2 see
    ``fxsvd.Sharded``.

    Args:
        model: the network; its parameters are used, not copied.
        example_inputs: as for ``fxsvd.compile``.
        optimizer: of its parameters.
        policy: says which passes to apply at a step, often none; a function of the network and the
            step (``fxsvd.Schedule`` and ``fxsvd.Spectral`` are such).
        every: how many steps there are from one question to the policy to the next.
        data: batches for passes that calibrate; or a number: that many of the samples that the
            network was trained on last.
        loss: a number for the network, on samples that are held out; a resize that increases it
            too much is undone.
        max_loss_increase: relative to the loss before.
        verify: check every rewrite against the network before it (see ``fxsvd.compile``).
        advice: note at every resize what the spectra of residual branches say of width and depth
            (see ``fxsvd.residual_spectra``); an SVD per branch.

    Attributes:
        model: the graph to train.
        history: the resizes so far, a list that can be printed as a table and plotted (see
            ``fxsvd.evolving.history``); a pass that found nothing to do is none.
        averages: of the network's parameters, such as ``AveragedModel``: resized as it is.

    Raises:
        CaptureError: the model cannot be captured.
        FxsvdError: the optimizer has parameters that are not the model's, or they are sharded.

    >>> import torch
    >>> from fxsvd.passes import Widen
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    >>> evolver = Evolver(net, torch.zeros(2, 4), optimizer)
    >>> print(evolver.resize(Widen(ratio=0.5)))
    step 0: 86 parameters
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        optimizer: Optimizer,
        *,
        policy: Policy | None = None,
        every: int = 1,
        data: Data | int = None,
        loss: Loss | None = None,
        max_loss_increase: float = 0.1,
        verify: bool = True,
        advice: bool = False,
    ) -> None:
        if every < 1:
            raise PlanError(f"every is a number of steps, 1 or more; got {every}")
        require_whole(model)
        self.model = capture(model, example_inputs)
        if model.training and not self.model.training:
            self.model.train()  # says why it cannot
        require_owner(optimizer, self.model)
        self.example_inputs, self.optimizer = example_inputs, optimizer
        self.policy, self.every, self.verify = policy, every, verify
        self.data: Data = Recent(self.model, data) if isinstance(data, int) else data
        self.advice = advice
        self.loss, self.max_loss_increase = loss, max_loss_increase
        self.history = History()
        self.averages: list[nn.Module] = []

    def step(self, number: int) -> list[Event]:
        """Ask the policy at every ``every``-th step, and do what it says.

        Args:
            number: of the epoch or step, from 1 on.

        Returns:
            What was done.
        """
        if self.policy is None or number % self.every:
            return []
        known = len(self.history)
        share_buffers(self.model)
        for options in agreed_on(require_passes(self.policy(self.model, number))):
            self.resize(options, step=number)
        return self.history[known:]

    def follow(self, average: Average) -> Average:
        """Let an average of the network's parameters (EMA, SWA) be resized as the network is.

        See ``fxsvd.evolving.averages`` for the numbers that it gets.

        Args:
            average: ``AveragedModel(evolver.model, ...)``, or another copy of ``evolver.model``.

        Returns:
            The same.

        Raises:
            FxsvdError: it is of another network.

        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> evolver = Evolver(net, torch.zeros(2, 4), torch.optim.SGD(net.parameters(), lr=0.1))
        >>> ema = evolver.follow(torch.optim.swa_utils.AveragedModel(evolver.model))
        """
        averaged_network(average, self.model)
        self.averages.append(average)
        return average

    def resize(self, options: Pass, *, data: Data = None, step: int = 0) -> Event:
        """Apply a pass to the network in training; undone where it costs too much.

        Args:
            options: the pass.
            data: batches for a pass that calibrates; the evolver's own where there are none.
            step: for the history.

        Raises:
            FxsvdError: ranks propose to do different things; nothing was changed.
            PlanError: the pass does not fit the network; nothing was changed.
            VerificationError: the result would be wrong; nothing was changed.
        """
        require_passes((options,))
        require_whole(self.model)
        share_buffers(self.model)
        before = judged(self.loss, self.model)
        deps = analyze(self.model)
        plan = agreed_plan(options.propose(deps, self.data if data is None else data), options)
        wanted = rewrite(deps, plan)
        if self.verify:
            verify_rewrite(deps, plan, wanted, self.example_inputs)
        after = judged(self.loss, wanted)
        undone = too_much(before, after, self.max_loss_increase)
        changes = bool(plan.edits or plan.substitutes or plan.values)
        widths = widths_of(deps, plan, undone) if changes else ()
        branches = residual_spectra(deps) if changes and self.advice else ()
        if not undone:
            self._become(deps, plan, wanted, options)
        event = Event(
            step,
            without_numbers(plan, deps),
            cost.parameters(self.model),
            before,
            after,
            undone,
            cost.macs(self.model),
            widths,
            tuple(branch.advice() for branch in branches),
        )
        if changes:
            self.history.append(event)
        return event

    def state_dict(self) -> dict[str, Any]:
        """Widths, weights and what the optimizer remembers, for ``torch.save``.

        And the samples that it was trained on last, where they are kept.
        """
        return {
            "recent": list(self.data) if isinstance(self.data, Recent) else [],
            "averages": [average.state_dict() for average in self.averages],
            "events": [stored(event) for event in self.history],
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was called: every resize since the model was made is repeated.

        Args:
            state: what ``state_dict`` returned, for the same model, given as it was then.

        Raises:
            PlanError: this network was resized already, the state is another network's, or as many
                averages as it had do not follow this one.
        """
        if self.history:
            raise PlanError("this network was resized already: load into a new Evolver")
        averages = state.get("averages", ())
        if len(averages) != len(self.averages):
            raise PlanError(
                f"the state is of {len(averages)} averages, {len(self.averages)} follow: call "
                "evolver.follow(...) for each of them first"
            )
        for event in map(restored, state["events"]):
            if not event.undone:
                deps = analyze(self.model)
                self._become(deps, event.plan, rewrite(deps, event.plan))
            self.history.append(event)
        for average, numbers in zip(self.averages, averages, strict=True):
            average.load_state_dict(numbers)
        if isinstance(self.data, Recent):
            self.data.restore(state.get("recent", ()))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _become(
        self, deps: Dependencies, plan: Plan, wanted: fx.GraphModule, options: Pass | None = None
    ) -> None:
        inputs = self.example_inputs if self.verify and options is not None else None
        held = [averaged_network(average, self.model) for average in self.averages]
        followed = [resized_average(graph, deps, plan, options, inputs) for graph in held]
        carry(self.optimizer, deps, plan, self.model, wanted)
        become(self.model, wanted)
        for graph, result in zip(held, followed, strict=True):
            become(graph, result)
