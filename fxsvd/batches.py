"""Batches of data as a graph takes them: any iterable of tensors, tuples or dictionaries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxsvd.capture import normalize_inputs
from fxsvd.errors import FxsvdError

Batch = tuple[tuple[Any, ...], dict[str, Any]]
Data = Iterable[Any] | None


def batches(data: Iterable[Any], graph: fx.GraphModule) -> Iterator[Batch]:
    """The batches of some data, on the graph's device, without what the graph does not take.

    Args:
        data: an iterable of batches, such as a ``DataLoader``; each a tensor, a tuple of arguments
            or a dictionary of keyword arguments. Labels behind the inputs are left out.
        graph: a captured graph.

    Raises:
        FxsvdError: a single tensor was given in place of an iterable of batches.

    >>> from fxsvd.capture import capture
    >>> graph = capture(torch.nn.Linear(3, 2), torch.zeros(2, 3))
    >>> [args[0].shape for args, _ in batches([(torch.zeros(5, 3), torch.zeros(5))], graph)]
    [torch.Size([5, 3])]
    """
    if isinstance(data, Tensor | Mapping):
        raise FxsvdError("data is an iterable of batches: give [batch] for a single one")
    names = [str(n.target) for n in graph.graph.nodes if n.op == "placeholder"]
    device = next((t.device for t in graph.parameters()), torch.device("cpu"))
    for batch in data:
        args, kwargs = normalize_inputs(batch)
        known = {k: v for k, v in kwargs.items() if k in names}
        yield moved((args[: len(names)], known), device)


def moved(value: Any, device: torch.device) -> Any:
    """A nest of tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {k: moved(v, device) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(moved(v, device) for v in value)
    return value


def samples(batch: Batch) -> int:
    """The number of samples: the first size of the first tensor."""
    values = [*batch[0], *batch[1].values()]
    return next((len(v) for v in values if isinstance(v, Tensor) and v.dim()), 1)
