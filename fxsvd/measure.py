"""What edits did cost: the outputs of layers before and after, on the same data."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxsvd.cost import evaluating
from fxsvd.data.batches import batches
from fxsvd.dependency import Dependencies
from fxsvd.edits import Plan
from fxsvd.narrowing import Narrowing
from fxsvd.running import leaves


@dataclass(frozen=True)
class Site:
    """A layer whose output an edit changes: what was predicted, and what came.

    Attributes:
        layer: its path in the original.
        edit: what was done to it, or in front of it.
        predicted: the variance of its output that the edit loses, relative.
        measured: the same in the rewritten network, where the edits before it count too.
    """

    layer: str
    edit: str
    predicted: float
    measured: float


class _Lost:
    """E‖d − E d‖² and E‖y − E y‖² of outputs y and their change d, added up."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: list[Tensor] = []

    def add(self, y: Tensor, d: Tensor) -> None:
        y, d = y.double(), d.double()
        new = [y.sum(0), d.sum(0), y.square().sum(0), d.square().sum(0)]
        self.sums = [a + b for a, b in zip(self.sums, new, strict=True)] if self.sums else new
        self.count += len(y)

    @property
    def share(self) -> float:
        y, d, yy, dd = self.sums
        total = float((yy - y.square() / self.count).sum())
        return max(float((dd - d.square() / self.count).sum()), 0.0) / max(total, 1e-300)


def measured(
    deps: Dependencies, plan: Plan, small: fx.GraphModule, data: Iterable[Any]
) -> tuple[Site, ...]:
    """Predicted and measured error of every layer for which a plan gives an estimate.

    Args:
        deps: the analysis of the original graph.
        plan: one stage of a plan.
        small: what it made of the graph.
        data: the batches that the plan was fitted to, or others.
    """
    layers = dict.fromkeys(e.layer for e in plan.estimates)
    narrowing = Narrowing.of(deps, plan)
    graph = deps.analysis.graph
    weights = {p.names[0]: p for p in deps.analysis.parameters.values()}
    stays = {
        layer: torch.from_numpy(np.flatnonzero(narrowing.along(weights[f"{layer}.weight"].type, 0)))
        for layer in layers
    }
    lost = {layer: _Lost() for layer in layers}
    for batch in batches(data, graph):
        before, after = (_outputs(g, layers, batch) for g in (graph, small))
        for layer in layers:
            for a, b in zip(before[layer], after[layer], strict=True):
                y = a.index_select(-1, stays[layer].to(a.device))
                lost[layer].add(y, b - y)
    return tuple(Site(e.layer, e.edit, e.error, lost[e.layer].share) for e in plan.estimates)


def output_error(before: fx.GraphModule, after: fx.GraphModule, data: Iterable[Any]) -> float:
    """‖f(x) − g(x)‖² / ‖f(x)‖² of two networks over all batches and outputs."""
    change = size = 0.0
    with torch.no_grad(), evaluating(before), evaluating(after):
        for args, kwargs in batches(data, before):
            pairs = (leaves(g(*args, **kwargs)) for g in (before, after))
            for a, b in zip(*pairs, strict=True):
                change += float((a - b).square().sum())
                size += float(a.square().sum())
    return change / max(size, 1e-300)


def _outputs(graph: fx.GraphModule, layers: Iterable[str], batch: Any) -> dict[str, list[Tensor]]:
    """Outputs of layers (or of the last layer of what took their place): ``[rows, out]``."""
    seen: dict[str, list[Tensor]] = {layer: [] for layer in layers}

    def hook(layer: str) -> Any:
        def see(module: nn.Module, args: Any, out: Tensor) -> None:
            features = out if isinstance(module, nn.Linear) else out.movedim(1, -1)
            seen[layer].append(features.flatten(0, -2).clone())

        return see

    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(evaluating(graph))
        for layer in layers:
            module = graph.get_submodule(layer)
            module = module[-1] if isinstance(module, nn.Sequential) else module
            stack.callback(module.register_forward_hook(hook(layer)).remove)
        args, kwargs = batch
        graph(*args, **kwargs)
    return seen
