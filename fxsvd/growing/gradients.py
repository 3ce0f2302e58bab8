"""Growth by gradients: new channels whose first step lowers the loss most.

New channels write zeros and are read by columns that are not zero, so the outputs stay wherever
what lies between makes zeros of zeros. The gradient in a new row is then linear in its columns,
g = M v, with M = E[x δᵀ] through the kernels of both sides (x what the writers read, δ the loss'
gradient in what the readers put out); it is longest for the top singular vectors of M (U. Evci et
al., *GradMax: Growing Neural Networks using Gradient Information*, ICLR 2022). M is measured, not
modelled: in a copy of the network each number of a column has a trial channel of its own, whose row
gets the gradient M e_j. That is exact for pooling, flattening, and several writers or readers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fxsvd.axes import TensorType
from fxsvd.data.gradients import gradients
from fxsvd.dependency import Dependencies
from fxsvd.edits import Plan, Remap
from fxsvd.growing.ends import Ends, new, opened
from fxsvd.growing.obstacles import obstacles
from fxsvd.layers import layer_of
from fxsvd.rewrite import rewrite
from fxsvd.rules import RULES, normalization
from fxsvd.spaces import Space
from fxsvd.widening import Counts, Widening

SILENT = 1e-20
"""Of the largest gradient in a reader's columns; more, and new channels are not zeros."""
MOST_TRIALS = 5000
"""Numbers of a channel in all its readers, each of which gets a trial channel."""


@dataclass(frozen=True, eq=False)
class Prospects:
    """What new channels of a space can do for the loss.

    Attributes:
        ends: the layers around the space.
        gradients: norms of the gradients that their rows (with biases) get, largest first.
        columns: what reads each of them, ``[numbers of a channel, channels]``; orthogonal, and as
            long as a channel's columns are on average.
    """

    ends: Ends
    gradients: Tensor
    columns: Tensor

    def first(self, count: int, generator: torch.Generator) -> Tensor:
        """Columns for so many new channels; where the best are used up, of random directions."""
        best = self.columns[:, :count]
        shape = (len(best), count - best.shape[1])
        rest = torch.randn(shape, generator=generator, dtype=best.dtype).to(best.device)
        return torch.cat([best, self.columns[:, 0].norm() * rest / rest.norm(dim=0)], dim=1)


def prospects(deps: Dependencies, space: Space, loss: Any, data: Iterable[Any]) -> Prospects | str:
    """What new channels of a space can do for the loss, or why that is not known, in words.

    The network runs in eval mode; over several batches (and ranks) it is the mean.

    Args:
        deps: what ``fxsvd.analyze`` found, for growth (``deps.growing``).
        space: one of its spaces.
        loss: ``loss(output, target)``, a scalar.
        data: batches ``(inputs, target)``.

    Raises:
        PlanError: there is no batch.

    >>> from torch import nn
    >>> from fxsvd.capture import capture
    >>> from fxsvd.dependency import analyze
    >>> net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Tanh(), nn.Linear(3, 1, bias=False))
    >>> deps, _ = analyze(capture(net, torch.zeros(2, 2))), nn.init.ones_(net[2].weight)
    >>> batch = torch.tensor([[3.0, 4.0]]), None
    >>> prospects(deps, deps.spaces[0], lambda y, _: y.sum(), [batch]).gradients
    tensor([5.], dtype=torch.float64)
    """
    ends = Ends.of(deps, space)
    if isinstance(ends, str):
        return ends
    matrix = _noticed(deps, ends) or _measured(deps, ends, loss, data)
    if isinstance(matrix, str):
        return matrix
    if not bool(matrix.isfinite().all()):
        return "the gradient in new channels is not finite"
    if not bool(matrix.any()):
        return "no gradient reaches new channels (before a ReLU, that takes a layer with a bias)"
    _, values, rows = torch.linalg.svd(matrix, full_matrices=False)
    length = float(ends.lengths().mean()) or 1.0
    return Prospects(ends, length * values, length * rows.T)


def _noticed(deps: Dependencies, ends: Ends) -> str | None:
    """What would notice new channels, or spoil their gradient."""
    if sum(ends.parts) > MOST_TRIALS:
        return f"its readers hold more than {MOST_TRIALS} numbers for each channel"
    counts = np.ones(deps.channels.count, dtype=np.int64)
    counts[ends.space.channels] = 2
    met = obstacles(deps, counts, np.zeros(len(counts), dtype=bool))
    why = next((met[c] for c in ends.space.channels.tolist() if c in met), None)
    for node in deps.analysis.types if why is None else ():
        before = [deps.analysis.types.get(n) for n in node.all_input_nodes]
        if _divides(deps.analysis.graph, node) and any(_holds(deps, t, ends) for t in before):
            return f"`{node.name}` divides by a deviation or norm, and new channels have none"
    return why


def _divides(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node normalises something."""
    target: Any = node.target
    if node.op == "call_module":
        layer = layer_of(graph.get_submodule(str(node.target)))
        target = layer.op if layer is not None else None
    return getattr(RULES.get(target), "__module__", "") == normalization.__name__


def _holds(deps: Dependencies, t: object, ends: Ends) -> bool:
    blocks = t.blocks if isinstance(t, TensorType) else ()
    found = (np.isin(deps.channels.of[b.atoms], ends.space.channels).any() for b in blocks)
    return any(found)


def _measured(deps: Dependencies, ends: Ends, loss: Any, data: Iterable[Any]) -> Tensor | str:
    """M, ``[incoming numbers, numbers of a channel]``, or what is wrong with it."""
    space, size = ends.space, sum(ends.parts)
    counts: Counts = np.ones(deps.channels.count, dtype=np.int64)
    counts[space.channels[0]] += size
    widening = Widening(deps.channels.of, counts)
    keep = tuple(np.repeat(np.arange(space.width), counts[space.channels]).tolist())
    trials = opened(widening, [(ends, torch.eye(size, dtype=torch.float64))])
    plan = Plan((Remap(space.name, space.width, keep),), values=tuple(trials))
    behind = [r.weight for r in ends.readers]
    names = [p.names[0] for p in (*ends.incoming, *behind)]
    graph = rewrite(deps, plan).requires_grad_(False)
    wanted = [graph.get_parameter(name).requires_grad_() for name in names]
    found = dict(zip(names, gradients(graph, wanted, loss, data), strict=True))
    for known in behind:
        columns = found[known.names[0]].abs()
        seen = columns[:, new(widening, known.type, 1, space).flatten()]
        if float(seen.max()) > SILENT * float(columns.max()):
            return "what new channels write is not zero where they are read"
    rows = [found[p.names[0]][new(widening, p.type, 0, space)] for p in ends.incoming]
    return torch.cat([row.reshape(size, -1) for row in rows], dim=1).T
