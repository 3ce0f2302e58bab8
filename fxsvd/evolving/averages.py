"""Averages of a network's parameters over its training (EMA, SWA) are resized with the network.

Channels go and are copied in the average as in the network, so that what is left of it is the
average that it was. What numbers it gets besides:

* Growth. The average has, for new channels, the numbers that the network has (zeros where nothing
  may change yet), as if it had had them all along; for the others its own. Where growth changes
  those too (shares of them, scales), its numbers are made of the average's as they were of the
  network's. Either way the averaged network computes what it did, and that is verified.
* Parameters that were fitted anew, and layers that took the place of others, begin at the network's
  numbers: a past that was fitted to other channels is no part of their average.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from fxsvd.data.batches import moved
from fxsvd.dependency import Dependencies, analyze
from fxsvd.edits import Assign, Plan
from fxsvd.errors import FxsvdError, PlanError, VerificationError
from fxsvd.evolving.carrying import copies
from fxsvd.passes import Widen
from fxsvd.rewrite import rewrite
from fxsvd.verify import verify_rewrite
from fxsvd.widening import Widening


def averaged_network(average: nn.Module, model: fx.GraphModule) -> fx.GraphModule:
    """The network that an average holds.

    Args:
        average: an ``AveragedModel`` or another module with the network in ``module``, or the
            network itself.
        model: the network in training.

    Raises:
        FxsvdError: it holds another network.

    >>> from fxsvd.capture import capture
    >>> from torch.optim.swa_utils import AveragedModel
    >>> model = capture(nn.Linear(2, 3), torch.zeros(2, 2))
    >>> averaged_network(AveragedModel(model), model).weight.shape
    torch.Size([3, 2])
    """
    held = average if isinstance(average, fx.GraphModule) else getattr(average, "module", None)
    if not isinstance(held, fx.GraphModule) or _outline(held) != _outline(model) or held is model:
        raise FxsvdError(
            "this is no average of the network in training: make it of evolver.model as it is "
            "now, AveragedModel(evolver.model, ...)"
        )
    return held


def _outline(graph: fx.GraphModule) -> tuple[Any, ...]:
    shapes = [(name, tuple(p.shape)) for name, p in graph.named_parameters()]
    return shapes, [(node.op, str(node.target)) for node in graph.graph.nodes]


def resized_average(
    held: fx.GraphModule,
    before: Dependencies,
    plan: Plan,
    options: Any,
    example_inputs: Any = None,
) -> fx.GraphModule:
    """The averaged network after a resize; the one before stays as it is.

    Args:
        held: the averaged network.
        before: the analysis of the network in training, as it was.
        plan: what is done to the network in training, with the numbers that this one gets.
        options: the pass that proposed it; None where only shapes matter.
        example_inputs: to verify growth with; None: do not.

    Raises:
        PlanError: the pass gives old channels new numbers in a way that only it knows.
        VerificationError: the average would not compute what it did.
    """
    deps = analyze(held)
    own = replace(plan, values=_values(deps, before, plan, options)) if plan.widens else plan
    result = rewrite(deps, own)
    if plan.widens and plan.exact and example_inputs is not None:
        device = next((p.device for p in held.parameters()), torch.device("cpu"))
        try:
            verify_rewrite(deps, own, result, moved(example_inputs, device))
        except VerificationError as error:
            raise VerificationError(
                f"an average cannot follow this {type(options).__name__}, and nothing was changed "
                f"(evolver.averages holds those that follow): {error}"
            ) from error
    return result


def _values(
    own: Dependencies, before: Dependencies, plan: Plan, options: Any
) -> tuple[Assign, ...]:
    """What the parameters of an average get where channels get copies."""
    theirs, how = Widening.by(before, plan), Widening.by(own, plan)
    if all(_only_copies(before, theirs, assign) for assign in plan.values):
        return tuple(_with_own(own, how, assign) for assign in plan.values)
    if not isinstance(options, Widen):
        raise PlanError(
            f"{type(options).__name__} changes channels that were there, so an average cannot "
            "follow: take it out of evolver.averages, and begin another after the resize"
        )
    return options.copying(own.growing, how.counts, {}).values


def _only_copies(before: Dependencies, how: Widening, assign: Assign) -> bool:
    """Whether all numbers stay but those of copies."""
    known = before.analysis.by_name(assign.parameter)
    old = known.value.detach()
    new, old = how.after(known, old), how.spread(old, known.type)
    return bool(((new == old) | copies(how, known).to(old.device)).all())


def _with_own(own: Dependencies, how: Widening, assign: Assign) -> Assign:
    """The average's numbers, and for copies those of the network."""
    known = own.analysis.by_name(assign.parameter)
    old = how.spread(known.value.detach(), known.type)
    new = how.after(known, known.value.detach())
    return replace(assign, value=torch.where(copies(how, known).to(old.device), new, old))
