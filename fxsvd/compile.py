"""The pipeline: capture, analyse, plan, rewrite, verify, report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import fx, nn

from fxsvd import cost
from fxsvd import verify as validation
from fxsvd.capture import capture, normalize_inputs
from fxsvd.data.batches import Data, require_batches
from fxsvd.dependency import Dependencies, analyze
from fxsvd.edits import Plan, chain, describe_inputs, make_inputs
from fxsvd.errors import PlanError
from fxsvd.measure import Site, measured, output_error
from fxsvd.naming import Names, listed
from fxsvd.progress import Say, quiet, sayer
from fxsvd.report import Report, SpaceRow, layer_rows
from fxsvd.rewrite import rewrite


class Pass(Protocol):
    """A frozen dataclass of options that proposes a plan."""

    def propose(self, deps: Dependencies, data: Data = None, say: Say = quiet) -> Plan:
        """What to do to a network, given batches of data where there are any.

        Args:
            deps: what ``fxsvd.analyze`` found.
            data: batches of inputs; may be read several times.
            say: is told how far the pass is.
        """


def compile(
    model: nn.Module,
    example_inputs: Any,
    *,
    passes: Sequence[Pass],
    data: Data = None,
    ignore: Names = (),
    round_to: int = 1,
    verify: bool = True,
    progress: bool | Say = True,
) -> fx.GraphModule:
    """A narrower copy of a model, verified, with a report.

    Args:
        model: any module; it is not changed.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments.
        passes: what to do, in order, such as ``[Prune(ratio=0.5)]``.
        data: batches of inputs for the passes that calibrate, such as a ``DataLoader``; labels
            behind the inputs are left out. It is read more than once: no generator.
        ignore: spaces that stay, for every pass: layer names, glob patterns or modules.
        round_to: widths become multiples of this, for every pass.
        verify: check the captured graph against the model and every rewrite against its original.
        progress: say on stderr what is going on, from the third second on; or a function to call
            with a line at each stage.

    Returns:
        A trainable ``fx.GraphModule``; ``.report`` is a ``Report``.

    Raises:
        CaptureError: the model cannot be captured.
        PlanError: options do not fit the model.
        VerificationError: the result would be wrong; nothing is returned.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> from fxsvd.passes import Prune
    >>> small = compile(net, torch.zeros(2, 4), passes=[Prune(ratio=0.5)])
    >>> small.get_submodule("0").out_features, small.report.after.parameters
    (4, 30)
    """
    if data is not None:
        require_batches(data)
    say = sayer(progress)
    say("capturing")
    original = graph = capture(model, example_inputs, check=verify)
    stages, worst = [], None
    sites: list[Site] = []
    first: Dependencies | None = None
    for options in _with_defaults(passes, ignore, round_to):
        deps, stage = _propose(graph, options, data, say)
        say("rewriting")
        narrowed = rewrite(deps, stage)
        if verify:
            say("verifying")
            error = validation.verify_rewrite(deps, stage, narrowed, example_inputs)
            worst = max(worst or 0.0, error)
        if data is not None and stage.estimates:
            say("measuring errors")
            sites += measured(deps, stage, narrowed, data)
        first, graph = first or deps, narrowed
        stages.append(stage)
    whole = replace(chain(stages), inputs=describe_inputs(normalize_inputs(example_inputs)))
    say("measuring")
    change = None if data is None else output_error(original, graph, data)
    graph.report = _report(  # type: ignore[assignment]
        original, graph, first, plan=whole, error=worst, sites=tuple(sites), change=change
    )
    return graph


def plan(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    passes: Sequence[Pass],
    data: Data = None,
    ignore: Names = (),
    round_to: int = 1,
) -> Plan:
    """A dry run: what ``compile`` would do, as data.

    Args:
        model: a module, or a graph that ``capture`` returned (then without inputs).
        example_inputs: as for ``compile``.
        passes: as for ``compile``.
        data: as for ``compile``.
        ignore: as for ``compile``.
        round_to: as for ``compile``.

    Raises:
        CaptureError: the model cannot be captured.
        PlanError: options do not fit the model.
    """
    if data is not None:
        require_batches(data)
    graph = model if _captured(model) else capture(model, example_inputs, check=False)
    assert isinstance(graph, fx.GraphModule)  # both branches
    described = (
        None if example_inputs is None else describe_inputs(normalize_inputs(example_inputs))
    )
    stages: list[Plan] = []
    for options in _with_defaults(passes, ignore, round_to):
        if stages:
            graph = rewrite(analyze(graph), stages[-1])
        stages.append(_propose(graph, options, data, quiet)[1])
    return replace(chain(stages), inputs=described)


def apply(model: nn.Module, plan: Plan) -> fx.GraphModule:
    """Apply a plan to a copy of a model or of a captured graph.

    Raises:
        PlanError: the plan was made for another network, or has no inputs to capture a model with.
    """
    if _captured(model):
        graph = model
    elif plan.inputs is None:
        raise PlanError("the plan does not say what inputs the model takes: apply it to a graph")
    else:
        graph = capture(model, _inputs(plan, model), check=False)
    assert isinstance(graph, fx.GraphModule)  # both branches
    stage: Plan | None = plan
    while stage is not None:
        graph = rewrite(analyze(graph), stage)
        stage = stage.then
    return graph


def _inputs(plan: Plan, model: nn.Module) -> Any:
    args, kwargs = make_inputs(plan.inputs)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    args, kwargs = _to(args, device), _to(kwargs, device)
    return kwargs or args


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {k: _to(v, device) for k, v in value.items()}
    return tuple(_to(v, device) for v in value) if isinstance(value, tuple) else value


def _captured(model: nn.Module) -> bool:
    return isinstance(model, fx.GraphModule) and all(
        "val" in node.meta for node in model.graph.nodes if node.op != "output"
    )


def _with_defaults(passes: Sequence[Pass], ignore: Names, round_to: int) -> Sequence[Pass]:
    """Options given for all passes reach those that have them."""
    if not passes:
        raise PlanError("passes is empty: say what to do, such as passes=[Prune(ratio=0.5)]")
    out = []
    for options in passes:
        changes: dict[str, Any] = {}
        if listed(ignore) and hasattr(options, "ignore"):
            changes["ignore"] = (*listed(options.ignore), *listed(ignore))
        if round_to != 1 and hasattr(options, "round_to"):
            changes["round_to"] = round_to
        out.append(replace(options, **changes) if changes else options)  # type: ignore[type-var]
    return out


def _propose(
    graph: fx.GraphModule, options: Pass, data: Data, say: Say
) -> tuple[Dependencies, Plan]:
    say("analysing")
    deps = analyze(graph)
    say(f"planning {type(options).__name__}")
    return deps, options.propose(deps, data, say)


def _report(
    before: fx.GraphModule, after: fx.GraphModule, deps: Dependencies | None, **rest: Any
) -> Report:
    assert deps is not None  # there is at least one pass
    return Report(
        before=cost.measure(before),
        after=cost.measure(after),
        spaces=_space_rows(deps, rest["plan"]),
        layers=layer_rows(before, after),
        notes=_notes(before, deps),
        **rest,
    )


def _space_rows(deps: Dependencies, whole: Plan) -> tuple[SpaceRow, ...]:
    kept: dict[str, int] = {}
    why: dict[str, str] = {}
    stage: Plan | None = whole
    while stage is not None:
        kept |= {edit.space: len(edit.keep) for edit in stage.edits}
        why |= {skip.space: skip.why for skip in stage.skips}
        stage = stage.then
    return tuple(
        SpaceRow(
            s.name,
            s.width,
            kept.get(s.name, s.width),
            s.layers,
            "" if s.name in kept else why.get(s.name, ""),
        )
        for s in (deps.growing if whole.widens else deps).spaces
    )


def _notes(graph: fx.GraphModule, deps: Dependencies) -> tuple[str, ...]:
    notes = [f"no rule: {what}" for what in deps.analysis.unknown.values()]
    if "train_graph" in graph.meta:
        notes.append(f"the result has no train mode: {graph.meta['train_graph']}")
    return tuple(dict.fromkeys(notes))
