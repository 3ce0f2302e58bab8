"""The walk over a captured graph that gives every node its type.

Every node is visited once, in order; its op's rule relates the types of inputs, parameters and
outputs. What has no rule freezes what it touches, with the reason in words.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxsvd.axes import Block, TensorType
from fxsvd.capture import CustomFunction
from fxsvd.layers import Layer, layer_of
from fxsvd.nests import attribute, flatten, has_tensor, plain, shapes_of, shapes_of_types
from fxsvd.relations import Atoms, Relations
from fxsvd.rules import RULES, Call, contraction
from fxsvd.rules.registry import fixed

# What a rule raises when the call has a form it was not written for.
UNFIT = (TypeError, ValueError, LookupError, AssertionError, NotImplementedError)


@dataclass(eq=False)
class Site:
    """One axis of one parameter (or buffer): where channels are stored.

    Attributes:
        tensor: the first name of the parameter.
        dim: the parameter's axis.
        atoms: the atoms created for it.
        role: ``producer`` writes the channels, ``consumer`` contracts them, ``follower`` is
            something per channel in between.
    """

    tensor: str
    dim: int
    atoms: Atoms
    role: str = "follower"


@dataclass(eq=False)
class Parameter:
    """A parameter or buffer with all its names and its type."""

    names: list[str]
    value: torch.Tensor
    type: TensorType


@dataclass(eq=False)
class Analysis:
    """Types of all nodes and parameters of a graph, and the relations between their atoms."""

    graph: fx.GraphModule
    relations: Relations = field(default_factory=Relations)
    types: dict[fx.Node, Any] = field(default_factory=dict)
    parameters: dict[int, Parameter] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)
    _starts: list[int] = field(default_factory=list)

    def run(self) -> Analysis:
        """Type every node."""
        for node in self.graph.graph.nodes:
            self.types[node] = self._visit(node)
        return self

    def parameter(
        self, name: str, value: torch.Tensor, make: Callable[[], TensorType] | None = None
    ) -> TensorType:
        """The type of a parameter: each axis has atoms of its own, shared by all its uses."""
        known = self.parameters.get(id(value))
        if known is None:
            t = make() if make else self._separate(value)
            known = self.parameters[id(value)] = Parameter([], value, t)
            self._add_sites(name, t)
        if name not in known.names:
            known.names.append(name)
        return known.type

    def _separate(self, value: torch.Tensor) -> TensorType:
        shape = tuple(value.shape)
        if not value.is_floating_point():
            return TensorType(shape)
        blocks = (Block((d,), self.relations.fresh(n)) for d, n in enumerate(shape) if n > 1)
        return TensorType(shape, tuple(blocks), stored=True)

    def _add_sites(self, name: str, t: TensorType) -> None:
        for block in t.blocks:
            self._starts.append(int(block.atoms.flat[0]))
            self.sites.append(Site(name, block.dims[-1], block.atoms))

    # ------------------------------------------------------------ nodes

    def _visit(self, node: fx.Node) -> Any:
        shapes = shapes_of(node.meta.get("val"))
        if node.op == "placeholder":
            return fixed(shapes)
        if node.op == "get_attr":
            return self._get_attr(node)
        if node.op == "output":
            return self._output(node)
        if not has_tensor(shapes) and not _writes(node):
            return shapes
        if isinstance(node.target, type):  # a record of results
            return self._resolve((node.args, node.kwargs))
        call = Call(
            self.relations,
            node.name,
            shapes,
            node,
            consumed=self._role("consumer"),
            produced=self._role("producer"),
        )
        return self._apply(call, node)

    def _get_attr(self, node: fx.Node) -> Any:
        value = attribute(self.graph, str(node.target))
        return self.parameter(str(node.target), value) if isinstance(value, torch.Tensor) else value

    def _output(self, node: fx.Node) -> None:
        for t in flatten(self._resolve(node.args)):
            for block in t.blocks:
                self.relations.freeze(block.atoms, "it is the network's output")

    def _apply(self, call: Call, node: fx.Node) -> Any:
        args, kwargs = self._resolve(node.args), self._resolve(node.kwargs)
        try:
            out = self._dispatch(call, node, args, kwargs)
        except UNFIT as e:
            return self._give_up(call, node, (args, kwargs), f"has a form without a rule ({e})")
        if not _writes(node) and shapes_of_types(out) != plain(call.out):
            return self._give_up(call, node, (args, kwargs, out), "has a form without a rule")
        if in_place(node):
            self.types[node.args[0]] = out  # type: ignore[index]  # a node by construction
        return out

    def _dispatch(self, call: Call, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "call_module":
            return self._layer(call, node, args, kwargs)
        found = RULES.get(node.target)
        if found is None:
            return self._give_up(call, node, (args, kwargs), "has no rule")
        return found(call, *args, **kwargs)

    def _give_up(self, call: Call, node: fx.Node, inputs: Any, why: str) -> Any:
        what = getattr(node.target, "__name__", str(node.target))
        if node.op == "call_module":
            module = self.graph.get_submodule(str(node.target))
            kind = module.function if isinstance(module, CustomFunction) else type(module)
            what = kind.__name__
            self._touch(module, node, f"`{node.name}`: {what} {why}")
        if any(t.blocks for t in flatten(inputs)):
            self.unknown[node.name] = f"{what} {why}"
        for t in flatten(inputs):
            for block in t.blocks:
                self.relations.freeze(block.atoms, f"`{node.name}`: {what} {why}")
        return call.fixed()

    def _layer(self, call: Call, node: fx.Node, args: Any, kwargs: Any) -> Any:
        module = self.graph.get_submodule(str(node.target))
        if isinstance(module, CustomFunction) and module.function in RULES:
            return RULES[module.function](call, *args, **kwargs)
        layer = layer_of(module)
        if layer is None:
            why = "has no row in the layer table (see fxsvd.register_layer)"
            return self._give_up(call, node, (args, kwargs), why)
        named = self._layer_parameters(call, str(node.target), module, layer)
        rule = RULES[layer.op]
        if layer.arguments is not None:
            return rule(call, **layer.arguments(module, named, *args, **kwargs))
        before = [getattr(module, name) for name in layer.before]
        operands = [named.get(name) for name in layer.operands]
        options = {name: getattr(module, name) for name in layer.options}
        return rule(call, *args[:1], *before, *operands, **options)

    def _layer_parameters(
        self, call: Call, path: str, module: nn.Module, layer: Layer
    ) -> dict[str, TensorType]:
        tensors = dict(module.named_parameters()) | dict(module.named_buffers())
        wanted = layer.operands or tuple(tensors)
        return {
            name: self.parameter(
                f"{path}.{name}", tensors[name], _maker(call, module, name, tensors[name])
            )
            for name in wanted
            if name in tensors
        }

    def _touch(self, module: nn.Module, node: fx.Node, reason: str) -> None:
        """Parameters of a layer that has no rule are known and frozen."""
        for name, value in module.named_parameters():
            t = self.parameter(f"{node.target}.{name}", value)
            for block in t.blocks:
                self.relations.freeze(block.atoms, reason)

    def _resolve(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self.types[value]
        if isinstance(value, dict):
            return {k: self._resolve(v) for k, v in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(self._resolve(v) for v in value)
        if isinstance(value, slice):
            return slice(*(self._resolve(v) for v in (value.start, value.stop, value.step)))
        return value

    def _role(self, role: str) -> Callable[[TensorType, Sequence[int]], None]:
        def note(t: TensorType, dims: Sequence[int]) -> None:
            if not t.stored:
                return
            for block in t.touches(dims):
                site = self.site_of(block.atoms)
                if site is not None and site.role == "follower":
                    site.role = role

        return note

    def by_name(self, name: str) -> Parameter:
        """The parameter of that (first) name.

        Raises:
            KeyError: the graph uses none.
        """
        for known in self.parameters.values():
            if known.names[0] == name:
                return known
        raise KeyError(name)

    def site_of(self, atoms: Atoms) -> Site | None:
        """The parameter axis that created an atom array's first atom."""
        first = int(atoms.flat[0])
        place = bisect_right(self._starts, first) - 1
        site = self.sites[place] if place >= 0 else None
        return site if site is not None and first <= int(site.atoms.flat[-1]) else None


def _maker(
    call: Call, module: nn.Module, name: str, value: torch.Tensor
) -> Callable[[], TensorType] | None:
    groups = getattr(module, "groups", 1)
    if name != "weight" or groups == 1 or groups in (module.in_channels, value.shape[0]):
        return None
    order = "io" if getattr(module, "transposed", False) else "oi"
    return lambda: contraction.grouped_weight(call, tuple(value.shape), int(groups), order)


def in_place(node: fx.Node) -> bool:
    """Whether a node overwrites its first argument and returns it."""
    name = str(getattr(node.target, "__name__", node.target))
    if node.op == "call_module" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.op == "call_function" and getattr(node.target, "__module__", "") == "_operator":
        return name.startswith("i") and name not in ("is_", "is_not", "inv", "invert", "index")
    return (name.endswith("_") and not name.endswith("__")) or bool(node.kwargs.get("inplace"))


def _writes(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "setitem"
