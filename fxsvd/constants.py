"""Constant propagation: what a network computes whatever its input is.

An ``fx.Interpreter`` over pairs (value, unknown): entries whose ``unknown`` is not 0 depend on the
input. Data movement acts on both alike, a convolution knows an output all of whose non-zero weights
read known inputs, a batch norm whose scale is zero knows its shift. Anything else is unknown. What
is known holds in eval and in train mode.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from fxsvd.layers import BATCH_NORMS, CONVOLUTIONS, layer_of
from fxsvd.nests import attribute
from fxsvd.rules import RULES, elementwise, indexing, joining, movement, spatial
from fxsvd.running import is_random

MOVEMENTS = {movement.__name__, joining.__name__, indexing.__name__}
SAMPLES = 2


class Known(NamedTuple):
    """A tensor and, of the same shape, where it depends on the input (not 0)."""

    value: Tensor
    unknown: Tensor


def constant_inputs(graph: fx.GraphModule) -> dict[str, Tensor]:
    """What is known of the inputs of linear and convolution layers.

    Returns:
        By layer: a vector of its input features, NaN where a feature is not constant over samples
        and positions. A layer that is called twice knows what both calls agree on.
    """
    interpreter = _Propagation(copy.deepcopy(graph).double().train(False))
    with torch.no_grad():
        interpreter.run(*(_nothing_known(n) for n in graph.graph.nodes if n.op == "placeholder"))
    return interpreter.inputs


def _nothing_known(node: fx.Node) -> Any:
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return value
    sizes: tuple[Any, ...] = tuple(value.shape)
    shape = [size if isinstance(size, int) else SAMPLES for size in sizes]
    return Known(torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64))


class _Propagation(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.inputs: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op in ("placeholder", "output"):
            return super().run_node(n)
        if n.op == "get_attr":
            value = attribute(self.module, str(n.target))
            return Known(value, torch.zeros_like(value)) if _is_float(value) else value
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        found = self._step(n, args, kwargs)
        return _unknown_like(n) if found is None else found

    def _step(self, n: fx.Node, args: Any, kwargs: Any) -> Any:
        if n.op == "call_module":
            return self._layer(str(n.target), args)
        rule = RULES.get(n.target)
        apply = getattr(torch.Tensor, n.target) if isinstance(n.target, str) else n.target
        return _carry(rule, apply, args, kwargs) if rule else None

    def _layer(self, path: str, args: Any) -> Any:
        module = self.submodules[path] if path in self.submodules else self.fetch_attr(path)
        x = args[0] if args else None
        if not isinstance(x, Known):
            return None
        if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            self._note(path, x, -1 if isinstance(module, nn.Linear) else 1)
            return _affine(module, x)
        if isinstance(module, BATCH_NORMS):
            return _batch_norm(module, x)
        if is_random(type(module).__name__):
            return _dropped(x)
        layer = layer_of(module)
        return _carry(RULES[layer.op], module, args, {}) if layer else None

    def _note(self, path: str, x: Known, dim: int) -> None:
        value, unknown = (t.movedim(dim, 0).flatten(1) for t in x)
        known = (unknown == 0).all(1) & (value == value[:, :1]).all(1)
        feature = torch.where(known, value[:, 0], torch.nan)
        before = self.inputs.get(path, feature)
        self.inputs[path] = torch.where(before == feature, feature, torch.nan)


def _carry(rule: Any, apply: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """An op of a family whose unknowns can be told; None for any other."""
    if is_random(getattr(apply, "__name__", "")):
        return _dropped(args[0]) if isinstance(args[0], Known) else None
    if rule in (elementwise.keeps_zero, elementwise.moves_zero):
        return _pointwise(apply, args, kwargs)
    if rule in (elementwise.add, elementwise.mul):
        return _binary(rule is elementwise.mul, apply, *args[:2]) if len(args) == 2 else None
    if rule.__module__ in MOVEMENTS and rule is not indexing.setitem:
        return _both(apply, args, kwargs)
    if rule.__module__ == spatial.__name__ and rule is not spatial.grid_sample:
        return _both(apply, args, kwargs)
    return None


def _dropped(x: Known) -> Known:
    """In train mode only zeros are certain to stay what they are."""
    return Known(x.value, x.unknown + (x.value != 0))


def _pointwise(apply: Callable[..., Any], args: Any, kwargs: Any) -> Known | None:
    x = args[0]
    if not isinstance(x, Known):
        return None
    value = apply(x.value.clone(), *args[1:], **kwargs)
    return Known(value, x.unknown) if _is_float(value) else None


def _binary(product: bool, apply: Callable[..., Any], a: Any, b: Any) -> Known | None:
    a, b = (x if isinstance(x, Known) else _certain(x) for x in (a, b))
    if a is None or b is None:
        return None
    value = apply(a.value.clone(), b.value)
    if not product:
        return Known(value, (a.unknown + b.unknown).expand_as(value))
    known_zero = ((a.unknown == 0) & (a.value == 0)) | ((b.unknown == 0) & (b.value == 0))
    return Known(value * ~known_zero, (a.unknown + b.unknown) * ~known_zero)


def _certain(x: Any) -> Known | None:
    if not isinstance(x, (int, float)):
        return None
    value = torch.tensor(float(x), dtype=torch.float64)
    return Known(value, torch.zeros_like(value))


def _both(apply: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The op applied to the values, and to what is unknown of them."""
    parts = [apply(*_part(args, i), **_part(kwargs, i)) for i in (0, 1)]
    return _zip(*parts)


def _part(value: Any, index: int) -> Any:
    if isinstance(value, Known):
        return value[index].clone()
    if isinstance(value, dict):
        return {k: _part(v, index) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_part(v, index) for v in value)
    return value


def _zip(value: Any, unknown: Any) -> Any:
    if isinstance(value, Tensor):
        return Known(value, unknown) if _is_float(value) else value
    if isinstance(value, (tuple, list)):
        return tuple(_zip(v, u) for v, u in zip(value, unknown, strict=True))
    return value


def _affine(module: Any, x: Known) -> Known:
    """An output is known where no weight other than zero reads an unknown input."""
    out = module(torch.where(x.unknown != 0, 0.0, x.value))
    probe = copy.copy(module)
    probe._parameters = {"weight": (module.weight != 0).double(), "bias": None}
    return Known(out, probe((x.unknown != 0).double()))


def _batch_norm(module: Any, x: Known) -> Known | None:
    """A scale of zero leaves the shift; any other output differs between the modes."""
    if module.weight is None:
        return None
    shape = (-1, *(1 for _ in x.value.shape[2:]))
    off = (module.weight == 0).double().reshape(shape)
    shift = module.bias.reshape(shape) if module.bias is not None else torch.zeros_like(off)
    return Known((off * shift).expand_as(x.value), (1 - off).expand_as(x.value))


def _unknown_like(node: fx.Node) -> Any:
    return _unknown(node.meta.get("val"))


def _unknown(value: Any) -> Any:
    if isinstance(value, Tensor):
        sizes: tuple[Any, ...] = tuple(value.shape)
        hint = [size if isinstance(size, int) else _at(size) for size in sizes]
        if not value.is_floating_point():
            return torch.zeros(hint, dtype=value.dtype)
        return Known(torch.zeros(hint).double(), torch.ones(hint).double())
    if isinstance(value, dict):
        return {k: _unknown(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_unknown(v) for v in value)
    return _at(value) if isinstance(value, torch.SymInt) else value


def _at(size: torch.SymInt) -> int:
    """A symbolic size at the number of samples."""
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, SAMPLES)))


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
