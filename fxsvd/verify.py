"""Translation validation: the narrowed network against the original with dropped channels silenced.

Both run in float64, in eval and in train mode. The reference has the original's shapes: its
parameters are zeroed where a channel goes, and norms and statistics count the survivors alone
(``fxsvd.survivors``). Everything else is the original's own code, so a channel that was mispaired
anywhere shows as a difference. Parameters that are constant (a head that starts at zero) are
perturbed on both sides, lest they hide one.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxsvd import reference
from fxsvd.blame import first_difference
from fxsvd.capture import Switch, capture
from fxsvd.dependency import Dependencies, analyze
from fxsvd.edits import Plan, make_inputs
from fxsvd.errors import PlanError, VerificationError
from fxsvd.narrowing import Narrowing
from fxsvd.rewrite import add_bias, rewrite
from fxsvd.running import computes_numbers, deterministic, difference, double_inputs, doubled, run
from fxsvd.substitution import in_full, merged
from fxsvd.widening import Resizing, Widening, resizing

TOLERANCE = 1e-8
_NO_NUMBERS = (
    "the network with silenced channels computes no finite number, so nothing can be compared: "
    "check the weights and the example inputs (verify=False skips this check)"
)


def verify(model: nn.Module, small: nn.Module, example_inputs: Any) -> float:
    """Check that ``small`` computes what its plan promises.

    Args:
        model: the original.
        small: what ``compile`` made of it; it must not have been trained since.
        example_inputs: as for ``compile``.

    Returns:
        The largest difference met, relative to the largest output.

    Raises:
        VerificationError: the networks differ.
        PlanError: ``small`` carries no report.
    """
    report = getattr(small, "report", None)
    if report is None:
        raise PlanError("verify needs a network that compile returned: it reads its plan")
    graph, stage, worst = capture(model, example_inputs), report.plan, 0.0
    while stage is not None:
        deps = analyze(graph)
        graph = rewrite(deps, stage)
        worst = max(worst, verify_rewrite(deps, stage, graph, example_inputs))
        stage = stage.then
    inputs, twin = double_inputs(example_inputs), doubled(copy.deepcopy(small))
    with deterministic(doubled(graph), False), deterministic(twin, False):
        error = difference(run(twin, inputs), run(graph, inputs))
    if not error <= TOLERANCE:
        raise VerificationError(f"the network differs from its plan by {error:.1e} of its output")
    return max(worst, error)


def mask(model: nn.Module, plan: Plan) -> nn.Module:
    """The original class in its original shapes, with the channels that a plan drops silenced.

    Raises:
        PlanError: the plan has several stages, says no inputs, or does not fit the model.
    """
    if plan.then is not None or plan.inputs is None:
        raise PlanError("mask takes a plan of one stage that fxsvd.plan made with example inputs")
    args, kwargs = make_inputs(plan.inputs)
    deps = analyze(capture(model, kwargs or args, check=False))
    return reference.mask(model, deps, Narrowing.of(deps, plan))


def verify_rewrite(
    deps: Dependencies, plan: Plan, small: fx.GraphModule, example_inputs: Any
) -> float:
    """Compare a narrowed graph with its silenced original.

    Args:
        deps: the analysis of the original graph.
        plan: one stage of a plan.
        small: the original graph, rewritten by the plan.
        example_inputs: as for ``fxsvd.capture``.

    Returns:
        The largest difference met, relative to the largest output.

    Raises:
        VerificationError: the networks differ; the message names the first layer where they do.
    """
    how = resizing(deps, plan)
    _check_values(deps, how, small)
    values = _values(deps, perturbed=not plan.exact)
    silent = reference.silenced(deps, _promised(deps, plan, how, small), values)
    candidate = _with_values(deps, how, small, values)
    if plan.exact:  # what it computes is promised, not how its numbers are rounded
        in_full(candidate, plan.substitutes)
    inputs, worst = double_inputs(example_inputs), 0.0
    modes = (False,) if plan.exact and not plan.widens else _modes(deps.analysis.graph)
    for training in modes:
        with deterministic(silent, training), deterministic(candidate, training):
            expected = run(silent, inputs)
            if not computes_numbers(expected):
                raise VerificationError(_NO_NUMBERS)
            error = difference(run(candidate, inputs), expected)
            worst = max(worst, error)
            if not error <= TOLERANCE:
                where = first_difference(deps, how, silent, candidate, inputs, TOLERANCE)
                raise VerificationError(_message(error, training, where))
    return worst


def _promised(deps: Dependencies, plan: Plan, how: Resizing, small: fx.GraphModule) -> Narrowing:
    """What the original has to become: itself, or silenced, with substitutes merged back."""
    if plan.exact or isinstance(how, Widening):
        return Narrowing(np.ones(len(deps.channels.of), dtype=bool))
    values = {}
    for edit in plan.substitutes:
        weight, bias = merged(small.get_submodule(edit.layer).children())
        values[f"{edit.layer}.weight"] = weight
        if bias is not None or deps.analysis.graph.get_submodule(edit.layer).bias is not None:
            values[f"{edit.layer}.bias"] = weight.new_zeros(len(weight)) if bias is None else bias
    return how.assigning(deps, values)


def _check_values(deps: Dependencies, how: Resizing, small: fx.GraphModule) -> None:
    """Every surviving number is bit-identical and under its own name."""
    tensors = dict(small.named_parameters(remove_duplicate=False))
    for known in deps.analysis.parameters.values():
        for name in known.names:
            expected = how.after(known, known.value.detach())
            if name in tensors and not _identical(tensors[name].detach(), expected):
                raise VerificationError(f"{name} does not hold the numbers that survive the plan")


def _identical(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _values(deps: Dependencies, perturbed: bool) -> reference.Values:
    """Copies of all parameters and buffers, in float64: train mode overwrites some.

    Constant ones are perturbed, upwards (variances too).
    """
    generator = torch.Generator().manual_seed(0)
    values = {}
    for key, known in deps.analysis.parameters.items():
        value = known.value.detach().clone()
        if value.is_floating_point():
            value = value.double()
            if perturbed and value.numel() and bool((value == value.flatten()[0]).all()):
                noise = torch.rand(value.shape, generator=generator, dtype=torch.float64)
                value = value + 0.1 * noise.to(value.device)
        values[key] = value
    return values


def _with_values(
    deps: Dependencies, how: Resizing, small: fx.GraphModule, values: reference.Values
) -> fx.GraphModule:
    """A float64 copy of the narrowed graph that holds the survivors of ``values``."""
    tensors: dict[str, Tensor] = dict(small.named_parameters(remove_duplicate=False))
    tensors |= small.named_buffers(remove_duplicate=False)
    memo: dict[int, Any] = {}
    for key, known in deps.analysis.parameters.items():
        if known.value.is_floating_point() and known.names[0] in tensors:
            value = how.after(known, values[key])
            memo[id(tensors[known.names[0]])] = reference.like(known.value, value)
    twin: fx.GraphModule = doubled(copy.deepcopy(small, memo))
    for layer, (bias, stays) in how.biases.items():
        add_bias(twin.get_submodule(layer), bias[torch.from_numpy(stays)])
    return twin


def _modes(graph: fx.GraphModule) -> tuple[bool, ...]:
    """Eval mode, and train mode where the graph has one and a norm behaves differently in it."""
    moody = any(isinstance(m, nn.modules.batchnorm._NormBase | Switch) for m in graph.modules())
    return (False, True) if moody and "train_graph" not in graph.meta else (False,)


def _message(error: float, training: bool, where: str) -> str:
    mode = "train" if training else "eval"
    return (
        f"the narrowed network differs from the silenced original by {error:.1e} of its output in "
        f"{mode} mode, first at {where}; please report the model (verify=False skips this check)"
    )
