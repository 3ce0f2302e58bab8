"""Evolver: a network that is resized while it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.optim import Optimizer

from fxsvd import cost
from fxsvd.capture import capture
from fxsvd.compile import Pass
from fxsvd.data import ranks
from fxsvd.data.batches import Data
from fxsvd.dependency import Dependencies, analyze
from fxsvd.edits import Plan
from fxsvd.errors import PlanError
from fxsvd.evolving.carrying import carry, require_owner
from fxsvd.evolving.replacing import become
from fxsvd.rewrite import rewrite
from fxsvd.verify import verify_rewrite

Policy = Callable[[fx.GraphModule, int], Sequence[Pass]]
Loss = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class Event:
    """One resize.

    Attributes:
        step: when it was.
        plan: what was done, without the numbers.
        parameters: how many the network has now.
        before: the loss before, where there is one.
        after: the loss after.
        undone: whether it cost more than was allowed, and the network is as before.
    """

    step: int
    plan: Plan
    parameters: int
    before: float | None
    after: float | None
    undone: bool

    def __str__(self) -> str:
        """``step 3: 1234 parameters, loss 0.21 -> 0.22``."""
        loss = "" if self.after is None else f", loss {self.before:.4g} -> {self.after:.4g}"
        end = " (undone)" if self.undone else ""
        return f"step {self.step}: {self.parameters} parameters{loss}{end}"


class Evolver:
    """Resizes a network in the middle of training; the optimizer goes on with what it remembers.

    Train ``evolver.model``, with the optimizer that is given here: both stay the same objects, so
    loops, schedulers and gradient scalers that hold them need not know. What is decided (a policy)
    and what is done (``resize``) are apart: either can be used alone.

    Under ``DistributedDataParallel`` every rank has an evolver of its own, with the same policy and
    seeds; losses are averaged over the ranks, so that all decide alike. Wrap ``evolver.model``, and
    wrap it anew after each resize.

    Args:
        model: the network; its parameters are used, not copied.
        example_inputs: as for ``fxsvd.compile``.
        optimizer: of its parameters.
        policy: says which passes to apply at a step, often none; a function of the network and the
            step (``fxsvd.Schedule`` and ``fxsvd.Spectral`` are such).
        every: how many steps there are from one question to the policy to the next.
        data: batches for the policy's passes that calibrate.
        loss: a number for the network, on samples that are held out; a resize that increases it
            too much is undone.
        max_loss_increase: relative to the loss before.
        verify: check every rewrite against the network before it (see ``fxsvd.compile``).

    Attributes:
        model: the graph to train.
        history: the resizes so far; a pass that found nothing to do is none.

    Raises:
        CaptureError: the model cannot be captured.
        FxsvdError: the optimizer has parameters that are not the model's.

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
        data: Data = None,
        loss: Loss | None = None,
        max_loss_increase: float = 0.1,
        verify: bool = True,
    ) -> None:
        if every < 1:
            raise PlanError(f"every is a number of steps, 1 or more; got {every}")
        self.model = capture(model, example_inputs).train(model.training)
        require_owner(optimizer, self.model)
        self.example_inputs, self.optimizer = example_inputs, optimizer
        self.policy, self.every, self.verify = policy, every, verify
        self.data = data
        self.loss, self.max_loss_increase = loss, max_loss_increase
        self.history: list[Event] = []

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
        for options in self.policy(self.model, number):
            self.resize(options, data=self.data, step=number)
        return self.history[known:]

    def resize(self, options: Pass, *, data: Data = None, step: int = 0) -> Event:
        """Apply a pass to the network in training; undone where it costs too much.

        Args:
            options: the pass.
            data: batches for a pass that calibrates.
            step: for the history.

        Raises:
            PlanError: the pass does not fit the network; nothing was changed.
            VerificationError: the result would be wrong; nothing was changed.
        """
        before = self._judge(self.model)
        deps = analyze(self.model)
        plan = options.propose(deps, data)
        wanted = rewrite(deps, plan).train(self.model.training)
        if self.verify:
            verify_rewrite(deps, plan, wanted, self.example_inputs)
        after = self._judge(wanted)
        undone = self._too_much(before, after)
        plan = _without_numbers(plan, self.model)
        if not undone:
            self._become(deps, plan, wanted)
        event = Event(step, plan, cost.parameters(self.model), before, after, undone)
        if plan.edits or plan.substitutes or plan.values:
            self.history.append(event)
        return event

    def state_dict(self) -> dict[str, Any]:
        """Widths, weights and what the optimizer remembers, for ``torch.save``."""
        return {
            "events": [vars(event) | {"plan": event.plan.to_json()} for event in self.history],
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was called: every resize since the model was made is repeated.

        Args:
            state: what ``state_dict`` returned, for the same model, given as it was then.

        Raises:
            PlanError: this network was resized already, or the state is another network's.
        """
        if self.history:
            raise PlanError("this network was resized already: load into a new Evolver")
        for stored in state["events"]:
            event = Event(**{**stored, "plan": Plan.from_json(stored["plan"])})
            if not event.undone:
                deps = analyze(self.model)
                self._become(deps, event.plan, rewrite(deps, event.plan))
            self.history.append(event)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _become(self, deps: Dependencies, plan: Plan, wanted: fx.GraphModule) -> None:
        carry(self.optimizer, deps, plan, self.model, wanted)
        become(self.model, wanted)

    @torch.no_grad()
    def _judge(self, network: fx.GraphModule) -> float | None:
        if self.loss is None:
            return None
        training = network.training
        try:
            own = float(self.loss(network.eval()))
            return float(ranks.gathered([own]).mean())  # all ranks decide alike
        finally:
            network.train(training)

    def _too_much(self, before: float | None, after: float | None) -> bool:
        if before is None or after is None:
            return False
        return not after <= before + self.max_loss_increase * abs(before)


def _without_numbers(plan: Plan, graph: fx.GraphModule) -> Plan:
    """What a plan does to shapes: of its numbers, only biases that are new."""
    names = {name for name, _ in graph.named_parameters(remove_duplicate=False)}
    names |= {name for name, _ in graph.named_buffers(remove_duplicate=False)}
    return replace(plan, values=tuple(v for v in plan.values if v.parameter not in names))
