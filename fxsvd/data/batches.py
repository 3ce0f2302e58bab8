"""Batches of data as a graph takes them: any iterable of tensors, tuples or dictionaries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxsvd.capture import normalize_inputs
from fxsvd.capture.inputs import map_tensors
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
        FxsvdError: the data is a single batch, or can be read only once, or a batch lacks an input.

    >>> from fxsvd.capture import capture
    >>> graph = capture(torch.nn.Linear(3, 2), torch.zeros(2, 3))
    >>> [args[0].shape for args, _ in batches([(torch.zeros(5, 3), torch.zeros(5))], graph)]
    [torch.Size([5, 3])]
    """
    require_batches(data)
    inputs = [n for n in graph.graph.nodes if n.op == "placeholder"]
    names = [str(n.target) for n in inputs]
    needed = {str(n.target) for n in inputs if not n.args}
    device = next((t.device for t in graph.parameters()), torch.device("cpu"))
    for number, batch in enumerate(data):
        args, kwargs = normalize_inputs(batch)
        args = args[: len(names)]
        known = {k: v for k, v in kwargs.items() if k in names}
        missing = needed - set(names[: len(args)]) - known.keys()
        if missing:
            raise FxsvdError(_missing(number, missing, args, kwargs))
        yield moved((args, known), device)


def require_batches(data: Any) -> None:
    """Raise unless data is an iterable of batches that can be read again.

    Raises:
        FxsvdError: it is not.

    >>> require_batches([torch.zeros(2, 3)])
    """
    if isinstance(data, Tensor | Mapping):
        raise FxsvdError("data is an iterable of batches: give [batch] for a single one")
    if isinstance(data, Iterator):
        raise FxsvdError(
            f"data is a {type(data).__name__}, which can be read only once, and it is read more "
            "often: give a list or a DataLoader"
        )
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise FxsvdError(
            f"data is a {type(data).__name__}: give an iterable of batches, such as a list or a "
            "DataLoader"
        )


def _missing(number: int, missing: set[str], args: Any, kwargs: Any) -> str:
    there = ", ".join([*(type(a).__name__ for a in args), *map(repr, kwargs)]) or "nothing"
    wanted = ", ".join(sorted(missing))
    return f"batch {number} of the data has {there}, but the network also needs {wanted}"


def moved(value: Any, device: torch.device) -> Any:
    """A nest of tensors on a device.

    >>> moved({"x": (torch.zeros(2), 1)}, torch.device("meta"))["x"][0].device
    device(type='meta')
    """
    return map_tensors(lambda t: t.to(device), value)


def losses(graph: nn.Module, loss: Any, data: Iterable[Any]) -> Iterator[tuple[Tensor, int]]:
    """The loss of a network on each batch, and how many samples there were in it.

    Args:
        graph: a captured graph.
        loss: ``loss(output, target)``, a scalar.
        data: batches ``(inputs, target)``.

    >>> batch = torch.ones(5, 2), 1
    >>> list(losses(torch.nn.Identity(), lambda y, target: y.sum() + target, [batch]))
    [(tensor(11.), 5)]
    """
    device = next((t.device for t in graph.parameters()), torch.device("cpu"))
    for batch in data:
        inputs, target = moved(batch, device)
        args, kwargs = normalize_inputs(inputs)
        yield loss(graph(*args, **kwargs), target), samples((args, kwargs))


def samples(batch: Batch) -> int:
    """The number of samples: the first size of the first tensor.

    >>> samples(((torch.zeros(5, 3),), {}))
    5
    """
    values = [*batch[0], *batch[1].values()]
    return next((len(v) for v in values if isinstance(v, Tensor) and v.dim()), 1)
