"""Gradients of a loss over data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxsvd.cost import evaluating
from fxsvd.data import ranks
from fxsvd.data.batches import losses
from fxsvd.errors import PlanError


def gradients(
    graph: fx.GraphModule, wanted: Sequence[Tensor], loss: Any, data: Iterable[Any]
) -> list[Tensor]:
    """Gradients of a loss in some parameters, the mean over batches and ranks, in float64.

    Args:
        graph: a captured graph; it runs in eval mode, and its ``.grad`` stay as they are.
        wanted: parameters of it that are trained.
        loss: ``loss(output, target)``, a scalar.
        data: batches ``(inputs, target)``.

    Raises:
        PlanError: no parameter is wanted, or there is no batch.

    >>> graph = fx.symbolic_trace(torch.nn.Linear(2, 1))
    >>> batch = torch.tensor([[3.0, 4.0]]), None
    >>> gradients(graph, [graph.weight], lambda y, _: y.sum(), [batch])
    [tensor([[3., 4.]], dtype=torch.float64)]
    """
    if not wanted:
        raise PlanError("no parameter requires a gradient: call requires_grad_() on some")
    sums = [torch.zeros_like(p, dtype=torch.float64) for p in wanted]
    seen = 0
    with evaluating(graph), torch.enable_grad():
        for value, _ in losses(graph, loss, data):
            found: Any = torch.autograd.grad(value, wanted, allow_unused=True)
            for total, part in zip(sums, found, strict=True):
                total += torch.zeros_like(total) if part is None else part
            seen += 1
    count = float(ranks.gathered([seen]).sum())
    if not count:
        raise PlanError("the loss got no batch from its data, so there is no gradient")
    return [ranks.summed(s) / count for s in sums]
