"""Running networks for comparison: in float64, in a given mode, with nothing random."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxsvd.capture import Switch, normalize_inputs

SCALE = 1e-6
"""The least size that differences are relative to: what computes zeros differs by rounding."""


def double_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs in float64 with at least two samples; constant ones are replaced by seeded noise."""
    args, kwargs = normalize_inputs(example_inputs)
    return _double(tuple(args)), _double(dict(kwargs))


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _double_tensor(value)
    if isinstance(value, dict):
        return {k: _double(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_double(v) for v in value)
    return value


def _double_tensor(value: Tensor) -> Tensor:
    if value.dim() and value.shape[0] == 1:
        value = torch.cat([value, value])
    if value.dim() and value.shape[0] > 3:
        value = value[:3]
    if not value.is_floating_point():
        return value
    generator = torch.Generator().manual_seed(value.numel())
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.device)
    return value.double() + noise * (value.double().std() + 0.1 if value.numel() > 1 else 1.0)


def doubled(graph: Any) -> Any:
    """The module itself, computing in float64, also where its graph names another float type."""
    for node in graph.graph.nodes if isinstance(graph, fx.GraphModule) else ():
        node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), _double_type)
        if node.op == "call_method" and node.target in ("float", "half", "bfloat16"):
            node.target = "double"
    if isinstance(graph, fx.GraphModule):
        graph.recompile()
    return graph.double()


def _double_type(value: Any) -> Any:
    return torch.float64 if value in (torch.float32, torch.float16, torch.bfloat16) else value


def is_random(name: str) -> bool:
    """Whether a layer or function of that name is random in train mode."""
    return "drop" in name.lower() or "stochastic" in name.lower()


@contextmanager
def deterministic(graph: nn.Module, training: bool) -> Iterator[None]:
    """The mode, with everything random switched off."""
    before = {m: m.training for m in graph.modules()}
    graph.train(training)
    for module in graph.modules():
        random = is_random(type(module).__name__)
        rates = isinstance(module, nn.RNNBase | nn.MultiheadAttention) and module.dropout > 0
        if random or rates or isinstance(module, Switch):
            module.training = False
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def run(graph: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    """One forward pass without gradients."""
    with torch.no_grad():
        args, kwargs = cloned(inputs)
        return graph(*args, **kwargs)


def cloned(value: Any) -> Any:
    """A copy of a nest of tensors (a deep copy of a view would copy all that it is a view of).

    >>> rows = torch.zeros(1000, 2)
    >>> cloned((rows[:1], {"n": 1}))[0].untyped_storage().nbytes()
    8
    """
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {k: cloned(v) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(cloned(v) for v in value)
    return copy.deepcopy(value)


def placed(graph: Any, inputs: Any) -> list[Any]:
    """Arguments by position, as an interpreter wants them."""
    args, kwargs = cloned(inputs)
    names = [n for n in graph.graph.nodes if n.op == "placeholder"]
    rest = names[len(args) :]
    return [*args, *(kwargs.get(n.target, n.args[0] if n.args else None) for n in rest)]


def placeholder_values(graph: fx.GraphModule, inputs: Any) -> dict[fx.Node, Any]:
    """A copy of the inputs by placeholder, as an interpreter's environment."""
    names = [n for n in graph.graph.nodes if n.op == "placeholder"]
    return dict(zip(names, placed(graph, inputs), strict=True))


def computes_numbers(outputs: Any) -> bool:
    """Whether there is a finite number among the outputs (or nothing at all)."""
    found = [t for t in leaves(outputs) if t.numel()]
    return not found or any(bool(t.isfinite().any()) for t in found)


def run_with(
    module: nn.Module,
    make: Callable[[Tensor], Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
) -> Any:
    """Call a module with other tensors in the places of its parameters and buffers.

    Args:
        module: it has its own again afterwards, also a layer with two names in it (in which
            ``torch.func.functional_call`` would leave what it found under the second).
        make: makes one of each.
        args: of the call.
        kwargs: likewise.

    >>> run_with(nn.Linear(2, 1), torch.ones_like, (torch.ones(1, 2),)).item()
    3.0
    """
    made: dict[int, Tensor] = {}
    places: dict[str, Tensor] = {}
    for path, part in module.named_modules():
        tensors = chain(
            part.named_parameters(recurse=False, remove_duplicate=False),
            part.named_buffers(recurse=False, remove_duplicate=False),
        )
        for name, tensor in tensors:
            if id(tensor) not in made:
                made[id(tensor)] = make(tensor)
            places[f"{path}.{name}" if path else name] = made[id(tensor)]
    return torch.func.functional_call(module, places, args, kwargs, tie_weights=False)


def difference(actual: Any, expected: Any) -> float:
    """The largest difference of two nests of tensors, relative to the largest expected value.

    >>> difference(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]))
    0.25
    """
    a, b = leaves(actual), leaves(expected)
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        return float("inf")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.numel():
            worst = max(worst, _distance(x, y))
    return worst


def _distance(x: Tensor, y: Tensor) -> float:
    """The largest difference of two tensors; values that are no numbers have to be the same."""
    finite = y[y.isfinite()]
    same = (x == y) | (x.isnan() & y.isnan())
    error = float(torch.where(same, 0.0, x - y).abs().max())
    if not finite.numel() or math.isnan(error):
        return math.inf
    return error / max(float(finite.abs().max()), SCALE)


def leaves(value: Any) -> list[Tensor]:
    """The tensors of a nest, in float64."""
    if isinstance(value, Tensor):
        return [value.double() if not value.is_complex() else torch.view_as_real(value)]
    items = value.values() if isinstance(value, dict) else value
    return [t for v in items for t in leaves(v)] if isinstance(value, (dict, tuple, list)) else []
