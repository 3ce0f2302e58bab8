"""What layers put out: mean and a square root of the covariance, streamed in one pass over data.

A root Z with ZᵀZ = Σ (y − ȳ)(y − ȳ)ᵀ has the singular values of the centred rows themselves, to
every digit, where a covariance has only their squares; and while rows are fewer than outputs it is
no larger than the rows. That is all a factorisation needs to know of a layer's data: every W' = T W
errs by (I − T) y.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

from fxsvd.cost import evaluating
from fxsvd.data.batches import batches, losses, samples
from fxsvd.errors import FxsvdError
from fxsvd.progress import Say, quiet

Watch = Callable[[Tensor, Tensor], Tensor]
"""Rows ``[rows, groups, size]`` of a layer's input and output."""
SLACK = 2
"""A root is compressed to its size once it has this many times as many rows."""


@dataclass(eq=False)
class Outputs:
    """Mean and scatter of rows, one block per group, in float64.

    Attributes:
        count: rows seen.
        mean: ``[groups, size]``.
        root: Z with ZᵀZ = Σ (y − mean)(y − mean)ᵀ, ``[groups, rows, size]``.

    >>> outputs = Outputs()
    >>> outputs.add(torch.tensor([[[1.0]], [[3.0]]]))
    >>> outputs.add(torch.tensor([[[5.0]]]))
    >>> outputs.mean.item(), round(outputs.root.square().sum().item(), 9)
    (3.0, 8.0)
    """

    count: int = 0
    mean: Tensor | None = None
    root: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """See more rows, ``[rows, groups, size]``."""
        chunk = max(4 * rows.shape[2], 4096)
        for part in rows.split(chunk) if len(rows) else ():
            exact = part.double()
            mean = exact.mean(0)
            self.merge(Outputs(len(part), mean, (exact - mean).transpose(0, 1)))

    def merge(self, other: Outputs) -> None:
        """See the rows of another one (Chan, Golub and LeVeque, 1979, on roots)."""
        if other.mean is None or other.root is None:
            return
        roots = [other.root]
        if self.mean is None or self.root is None:
            self.count, self.mean = other.count, other.mean
        else:
            total = self.count + other.count
            shift = other.mean - self.mean
            weight = math.sqrt(self.count * other.count / total)
            roots = [self.root, other.root, weight * shift.unsqueeze(1)]
            self.mean = self.mean + (other.count / total) * shift
            self.count = total
        root = torch.cat(roots, dim=1)
        long = root.shape[1] > SLACK * root.shape[2]
        self.root = torch.linalg.qr(root, mode="r").R if long else root

    @property
    def energy(self) -> float:
        """Σ ‖y − mean‖²."""
        assert self.root is not None  # something was added
        return float(self.root.square().sum())

    def reduced(self) -> Outputs:
        """The same over the rows of all ranks (of ``torch.distributed``, where it runs)."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return self
        parts: list[Outputs | None] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, self._on("cpu"))  # every rank may have a device of its own
        out = Outputs()
        for part in parts:
            assert part is not None  # every rank gave one
            out.merge(part)
        return out if self.root is None else out._on(self.root.device)

    def _on(self, device: torch.device | str) -> Outputs:
        if self.mean is None or self.root is None:
            return self
        return Outputs(self.count, self.mean.to(device), self.root.to(device))


def watch(
    graph: fx.GraphModule,
    data: Iterable[Any],
    watches: Mapping[str, Mapping[str, Watch]],
    say: Say = quiet,
) -> dict[tuple[str, str], Outputs]:
    """One pass over data, adding up what is watched of every call of some layers.

    Args:
        graph: a captured graph; it runs in eval mode, without gradients.
        data: batches, see ``fxsvd.data.batches``.
        watches: by layer, named functions of its input and output.
        say: is told how far it is.

    Returns:
        By layer and name.

    Raises:
        FxsvdError: there is no batch, or a layer's output is not finite.

    >>> from fxsvd.capture import capture
    >>> graph = capture(nn.Sequential(nn.Linear(3, 4)), torch.zeros(2, 3))
    >>> seen = watch(graph, [torch.ones(5, 3)], {"0": {"y": lambda x, y: y.unsqueeze(1)}})
    >>> seen["0", "y"].count
    5
    """
    found = {(layer, name): Outputs() for layer, named in watches.items() for name in named}

    def hook(layer: str) -> Any:
        def see(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            for name, rows in watches[layer].items():
                found[layer, name].add(rows(args[0], out))

        return see

    seen = 0
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(evaluating(graph))
        for layer in watches:
            module = graph.get_submodule(layer)
            stack.callback(module.register_forward_hook(hook(layer)).remove)
        for args, kwargs in batches(data, graph):
            graph(*args, **kwargs)
            seen += samples((args, kwargs))
            say(f"watching outputs: {seen} samples")
    return {key: checked(key[0], outputs.reduced()) for key, outputs in found.items()}


def watch_gradients(
    graph: fx.GraphModule,
    data: Iterable[Any],
    rows: Mapping[str, Callable[[Tensor], Tensor]],
    loss: Callable[[Any, Any], Tensor],
) -> dict[str, Tensor]:
    """A root of the second moment of the loss' gradients in the outputs of some layers.

    Args:
        graph: a captured graph; it runs in eval mode.
        data: batches ``(inputs, target)``.
        rows: by layer, ``[rows, groups, size]`` of its output (or of a gradient in it).
        loss: ``loss(output, target)``, a scalar.

    Returns:
        By layer, Z with ZᵀZ = Σ g gᵀ, ``[groups, rows, size]``.

    Raises:
        FxsvdError: there is no batch, or a gradient is not finite.

    >>> from fxsvd.capture import capture
    >>> graph = capture(nn.Sequential(nn.Linear(3, 1)), torch.zeros(2, 3))
    >>> def loss(y, target):
    ...     return (target * y).sum()
    >>> batch = torch.ones(5, 3), 2.0
    >>> found = watch_gradients(graph, [batch], {"0": lambda g: g.unsqueeze(1)}, loss)
    >>> round(found["0"].square().sum().item(), 9)
    20.0
    """
    found = {layer: Outputs() for layer in rows}

    def hook(layer: str) -> Any:
        def see(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            if out.requires_grad:
                out.register_hook(lambda g: found[layer].add(rows[layer](g)))

        return see

    with ExitStack() as stack, torch.enable_grad():
        stack.enter_context(evaluating(graph))
        for layer in rows:
            module = graph.get_submodule(layer)
            stack.callback(module.register_forward_hook(hook(layer)).remove)
        for value, _ in losses(graph, loss, data):
            wanted = [p for p in graph.parameters() if p.requires_grad]
            torch.autograd.grad(value, wanted, allow_unused=True)
    return {layer: _uncentred(checked(layer, out.reduced())) for layer, out in found.items()}


def _uncentred(outputs: Outputs) -> Tensor:
    assert outputs.root is not None  # checked
    assert outputs.mean is not None
    mean = math.sqrt(outputs.count) * outputs.mean.unsqueeze(1)
    return torch.cat([outputs.root, mean], dim=1)


def checked(layer: str, outputs: Outputs) -> Outputs:
    """The outputs themselves.

    Raises:
        FxsvdError: there are none, or they are not finite.

    >>> seen = Outputs()
    >>> seen.add(torch.ones(5, 1, 2))
    >>> checked("fc", seen) is seen
    True
    """
    if outputs.root is None:
        raise FxsvdError(f"the data has no batch that reaches {layer}: nothing can be fitted to it")
    if not bool(outputs.root.isfinite().all()):
        raise FxsvdError(f"{layer} puts out numbers that are not finite: check the data")
    return outputs
