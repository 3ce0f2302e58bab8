"""What channels are worth to a network in training: what their loss costs, and what they learn.

Two numbers of a channel, both in units of the loss. Without it the loss rises by ½ E[(Σ h ∂l/∂h)²]
to second order, with the empirical Fisher information for the curvature and the gradient taken to
vanish on average (L. Theis et al., *Faster gaze prediction with dense networks and Fisher pruning*,
2018). With it the loss falls by η ‖∂L/∂w‖² in the time that is worth a learning rate η, where w is
what writes it: just what a new channel is promised (``fxsvd.growing.gradients``), so that one that
came a moment ago is worth what it was taken in for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxsvd.cost import evaluating
from fxsvd.data import ranks
from fxsvd.data.batches import losses
from fxsvd.data.readers import Reader, readers
from fxsvd.dependency import Dependencies
from fxsvd.errors import PlanError
from fxsvd.growing.pairs import paired
from fxsvd.importance import Scores


def prices(deps: Dependencies, loss: Any, data: Iterable[Any], rate: float) -> Scores:
    """What each channel is worth, in units of the loss; NaN where that is not known.

    It is known where nothing but linear layers and convolutions read a space. The network runs in
    eval mode.

    Args:
        deps: what ``fxsvd.analyze`` found.
        loss: ``loss(output, target)``, a mean over samples.
        data: batches ``(inputs, target)``.
        rate: η, a learning rate times a number of steps.

    Raises:
        PlanError: there is no batch, or the loss is not finite.

    >>> from fxsvd.capture import capture
    >>> from fxsvd.dependency import analyze
    >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False))
    >>> _ = nn.init.ones_(net[1].weight), net[0].weight.data.copy_(torch.tensor([[1.0], [2.0]]))
    >>> deps, batch = analyze(capture(net, torch.zeros(2, 1))), (torch.ones(5, 1), None)
    >>> worth = prices(deps, lambda y, _: y.mean(), [batch], 0.0)
    >>> worth[deps.spaces[0].channels].round(6).tolist()
    [0.5, 2.0]
    """
    layers = {r.weight.names[0]: r for r in readers(deps).values() if len(r.calls) == 1}
    seen = _Seen(deps, list(layers.values()))
    seen.run(loss, data)
    worth = seen.effects() / 2 + rate * seen.potentials()
    pairs = paired(deps)
    for space in deps.spaces:
        known = space.consumers and all(site.tensor in layers for site in space.consumers)
        if not known or pairs[space.channels].any():
            worth[space.channels] = np.nan
    return worth


@torch.no_grad()
def mean_loss(graph: nn.Module, loss: Any, data: Iterable[Any]) -> float:
    """The loss of a network in eval mode, the mean over batches and ranks.

    >>> batch = torch.ones(5, 1), None
    >>> mean_loss(nn.Identity(), lambda y, _: y.mean(), [batch, batch])
    1.0
    """
    total, count = 0.0, 0
    with evaluating(graph):
        for value, _ in losses(graph, loss, data):
            total, count = total + float(value), count + 1
    sums = ranks.gathered([total, count]).sum(0)
    return float(sums[0] / sums[1])


class _Seen:
    """Sums over data, per channel: squared effects on the loss, and gradients of what writes it."""

    def __init__(self, deps: Dependencies, layers: list[Reader]) -> None:
        self.deps, self.layers = deps, layers
        self.squares = torch.zeros(deps.channels.count, dtype=torch.float64)
        self.weights = [p for layer in layers for p in layer.module.parameters()]
        self.slopes = [torch.zeros_like(p, dtype=torch.float64) for p in self.weights]
        self.batches = self.samples = 0

    def run(self, loss: Any, data: Iterable[Any]) -> None:
        graph, inputs = self.deps.analysis.graph, dict[str, Tensor]()
        with ExitStack() as stack, torch.enable_grad():
            stack.enter_context(evaluating(graph))
            for layer in self.layers:
                hook = _keeping(layer.layer, inputs)
                stack.callback(layer.module.register_forward_pre_hook(hook).remove)
            for value, count in losses(graph, loss, data):
                if not bool(torch.isfinite(value)):
                    raise PlanError(f"the loss is {value.detach()}: nothing can be weighed by it")
                self._add(value, inputs, count)

    def _add(self, value: Tensor, inputs: Mapping[str, Tensor], count: int) -> None:
        trained = [p for p in self.weights if p.requires_grad]
        found: Any = torch.autograd.grad(value, [*inputs.values(), *trained], allow_unused=True)
        effects = torch.zeros(count, len(self.squares), dtype=torch.float64)
        slopes = dict(zip(inputs, found, strict=False))
        for layer in self.layers:
            slope = slopes.get(layer.layer)
            if slope is not None:
                both = inputs[layer.layer].detach() * slope
                part = _by_feature(layer.module, both, count).cpu().double()
                known = torch.from_numpy(np.flatnonzero(layer.channels >= 0))
                to = torch.from_numpy(layer.channels)[known]
                effects.index_add_(1, to, part[:, known])
        self.squares += (count * effects).square().sum(0)
        by_weight = dict(zip(map(id, trained), found[len(inputs) :], strict=True))
        for total, p in zip(self.slopes, self.weights, strict=True):
            slope = by_weight.get(id(p))
            total += torch.zeros_like(total) if slope is None else slope
        self.batches, self.samples = self.batches + 1, self.samples + count

    def effects(self) -> Scores:
        """E[(Σ h ∂l/∂h)²] for each channel, over samples."""
        count = float(ranks.gathered([self.samples]).sum())
        if not count:
            raise PlanError("weighing channels got no batch from its data")
        return np.asarray(ranks.summed(self.squares) / count, dtype=np.float64)

    def potentials(self) -> Scores:
        """‖∂L/∂w‖² for each channel, with the weights and biases that write it for w."""
        count = float(ranks.gathered([self.batches]).sum())
        out = np.zeros(len(self.squares))
        by_weight = dict(zip(map(id, self.weights), self.slopes, strict=True))
        for layer in self.layers:
            atoms = layer.weight.type.vector(0)
            for p in layer.module.parameters() if atoms is not None else ():
                slope = ranks.summed(by_weight[id(p)].clone()) / count
                rows = slope.reshape(len(slope), -1).square().sum(1).cpu().numpy()
                np.add.at(out, self.deps.channels.of[atoms], rows)
        return out


def _keeping(name: str, inputs: dict[str, Tensor]) -> Any:
    """A hook that lets a layer read a copy of its input, which is kept."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        own = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
        inputs[name] = own.clone()
        return (inputs[name], *args[1:])

    return hook


def _by_feature(module: nn.Module, values: Tensor, count: int) -> Tensor:
    """Sums over positions, ``[samples, features]``."""
    last = values if isinstance(module, nn.Linear) else values.movedim(1, -1)
    return last.reshape(count, -1, last.shape[-1]).sum(1)
