"""The only mutator: applies a plan to a copy of a graph.

Parameters are resized first; the copy is made around the resized ones, so the original is never
touched and never duplicated. Then literals in the graph and attributes of layers follow the types.
"""

from __future__ import annotations

import copy
import itertools
import math
import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn

from fxsvd.axes import Shape, TensorType
from fxsvd.dependency import Dependencies
from fxsvd.edits import Plan
from fxsvd.layers import layer_of
from fxsvd.nests import attribute, flatten, shapes_of_types
from fxsvd.rules import LITERALS
from fxsvd.substitution import substitute
from fxsvd.widening import Resizing, resizing

Made = dict[tuple[Any, ...], torch.Tensor]


def rewrite(deps: Dependencies, plan: Plan) -> fx.GraphModule:
    """A copy of the analysed graph, resized by one stage of a plan.

    Args:
        deps: the analysis of a captured graph.
        plan: which channels its spaces keep (``plan.then`` is not applied).

    Raises:
        PlanError: the plan does not fit the network.
    """
    how = resizing(deps, plan)
    graph = deps.analysis.graph
    result = copy.deepcopy(graph, _resized(deps, how))
    twin = dict(zip(result.graph.nodes, graph.graph.nodes, strict=True))
    for node, original in list(twin.items()):
        _mend(node, original, twin, deps, how)
    _set_shapes(twin, deps, how)
    for layer, (bias, stays) in how.biases.items():
        add_bias(result.get_submodule(layer), bias[torch.from_numpy(stays)])
    for edit in plan.substitutes:
        substitute(result, edit)
    result.graph.lint()
    result.recompile()
    return result


def _resized(deps: Dependencies, how: Resizing) -> dict[int, Any]:
    """A deepcopy memo that puts the resized parameters in place of the originals."""
    memo: dict[int, Any] = {}
    for known in deps.analysis.parameters.values():
        if how.changes(known):
            with torch.no_grad():
                value = how.after(known, known.value)
            if isinstance(known.value, nn.Parameter):
                value = nn.Parameter(value, requires_grad=known.value.requires_grad)
            memo[id(known.value)] = value
    return memo


def add_bias(layer: nn.Module, bias: torch.Tensor) -> None:
    """Give a layer without a bias one, of its weight's type."""
    weight = layer.get_parameter("weight")
    value = bias.to(weight.device, weight.dtype, copy=True)
    layer.register_parameter("bias", nn.Parameter(value, requires_grad=weight.requires_grad))


def _mend(
    node: fx.Node,
    original: fx.Node,
    twin: dict[fx.Node, fx.Node],
    deps: Dependencies,
    how: Resizing,
) -> None:
    types = deps.analysis.types
    if node.op == "call_module":
        _resize_layer(node, original, types, how)
    elif node.op in ("call_function", "call_method") and node.target in LITERALS:
        edit = _Edit(node, original, twin, types, how)
        if any(how.touches(t) for t in edit.around()):
            LITERALS[node.target](edit)


def _resize_layer(
    node: fx.Node, original: fx.Node, types: dict[fx.Node, Any], how: Resizing
) -> None:
    module = node.graph.owning_module.get_submodule(str(node.target))  # type: ignore[union-attr]
    layer = layer_of(module)
    if layer is None or not original.all_input_nodes:
        return
    before = types[original.all_input_nodes[0]]
    after = _first(types[original])
    if isinstance(before, TensorType) and after is not None:
        layer.resize(module, how.shape(before), how.shape(after))


def _first(t: Any) -> TensorType | None:
    return (
        t if isinstance(t, TensorType) else next((x for x in t if isinstance(x, TensorType)), None)
    )


@dataclass(frozen=True, eq=False)
class _Edit:
    """What a literal's rule sees (``fxsvd.rules.registry.Edit``)."""

    node: fx.Node
    original: fx.Node
    twin: dict[fx.Node, fx.Node]
    types: dict[fx.Node, Any]
    how: Resizing

    @property
    def out(self) -> Any:
        return self.types[self.original]

    def around(self) -> list[TensorType]:
        """The types of the inputs and the output."""
        return flatten([self.out, *(self.types[n] for n in self.original.all_input_nodes)])

    def type_of(self, arg: Any) -> Any:
        return self.types[self.twin[arg]] if isinstance(arg, fx.Node) else arg

    def shape(self, t: TensorType) -> Shape:
        return self.how.shape(t)

    def alive(self, t: TensorType, dim: int) -> npt.NDArray[Any]:
        return self.how.along(t, dim)

    def order(self, t: TensorType, dim: int) -> npt.NDArray[np.int64]:
        return self.how.order(t, dim)

    def size(self, entry: Any, before: int, after: int) -> Any:
        if before == after:
            return entry
        if not isinstance(entry, fx.Node):
            return after
        common = math.gcd(before, after)
        with self.node.graph.inserting_before(self.node):
            if after // common > 1:
                entry = self.node.graph.call_function(operator.mul, (entry, after // common))
            return self.node.graph.call_function(operator.floordiv, (entry, before // common))

    def constant(self, name: str, value: torch.Tensor) -> fx.Node:
        root = self.node.graph.owning_module
        assert root is not None  # a copy of a captured graph
        number = next(i for i in itertools.count() if not hasattr(root, f"_{name}{i}"))
        device = next((p.device for p in root.parameters()), torch.device("cpu"))
        root.register_buffer(f"_{name}{number}", value.to(device), persistent=False)
        with self.node.graph.inserting_before(self.node):
            return self.node.graph.get_attr(f"_{name}{number}")

    def buffer(self, node: fx.Node, value: torch.Tensor) -> fx.Node:
        readers = [n for n in node.graph.nodes if n.op == "get_attr" and n.target == node.target]
        if len(readers) > 1 or len(node.users) > 1:
            return self.constant("order", value)
        path, _, name = str(node.target).rpartition(".")
        owner = attribute(node.graph.owning_module, path) if path else node.graph.owning_module  # type: ignore[arg-type]
        setattr(owner, name, value)
        return node


def _set_shapes(twin: dict[fx.Node, fx.Node], deps: Dependencies, how: Resizing) -> None:
    """Meta values of the resized shapes, the symbolic batch kept."""
    types = deps.analysis.types
    made: Made = {}
    for node, original in twin.items():
        t, value = types[original], original.meta.get("val")
        node.meta = dict(original.meta)
        if value is not None and shapes_of_types(t) is not None:
            node.meta["val"] = _resized_value(value, t, how, made)


def _resized_value(value: Any, t: Any, how: Resizing, made: Made) -> Any:
    if isinstance(value, torch.Tensor) and isinstance(t, TensorType):
        return _resized_tensor(value, t, how, made) if how.touches(t) else value
    if isinstance(value, (tuple, list)) and isinstance(t, tuple):
        pairs = zip(value, t, strict=True)
        return type(value)(_resized_value(v, s, how, made) for v, s in pairs)
    return value


def _resized_tensor(value: torch.Tensor, t: TensorType, how: Resizing, made: Made) -> torch.Tensor:
    """A tensor without data, one for all nodes of a shape: symbolic sizes are slow to make."""
    after = how.shape(t)
    sizes: tuple[Any, ...] = tuple(value.shape)
    before = tuple(old if isinstance(old, int) else old.node.expr for old in sizes)
    key = (before, after, value.dtype, value.device)
    if key not in made:
        new = [
            old if a == b else old * a // b  # a symbolic size stays symbolic
            for old, a, b in zip(sizes, after, t.shape, strict=True)
        ]
        made[key] = value.new_empty(new)
    return made[key]
