"""Residual streams that only norms read: spaces whose basis may turn, though a norm stands between.

RMS(x Q) = RMS(x) Q for orthogonal Q, so that a stream that maps write and add to, and that RMSNorms
read for further maps, may be rotated as a whole once the norms' gains are folded into those maps
(S. Ashkboos et al., *SliceGPT*, 2024). A LayerNorm subtracts the mean as well: it commutes with the
orthogonal matrices that keep means zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import fx, nn
from torch.nn import functional as F

from fxsvd.data.readers import Reader
from fxsvd.dependency import Dependencies
from fxsvd.rotating.commuting import why_not
from fxsvd.rotating.edges import Walk, bias_name, input_of, is_layer, linear_maps, weight_of
from fxsvd.spaces import Space


@dataclass(frozen=True, eq=False)
class Norm:
    """A call of a norm over the channels of a stream.

    Attributes:
        node: the call.
        centred: whether it subtracts the mean.
        weight: the first name of its gain; empty where it has none.
        bias: the first name of its bias; empty where it has none.
    """

    node: fx.Node
    centred: bool
    weight: str
    bias: str


@dataclass(eq=False)
class Stream:
    """A space that maps and parameters write, and norms read.

    Attributes:
        space: the space.
        writers: parameters that write it, each with the axis along which they hold its channels.
        norms: the norms that read it.
        readers: the maps that read it, each with the norm in between, or None.
    """

    space: Space
    writers: dict[tuple[str, int], None] = field(default_factory=dict)
    norms: list[Norm] = field(default_factory=list)
    readers: dict[str, tuple[Reader, Norm | None]] = field(default_factory=dict)

    @property
    def centred(self) -> bool:
        """Whether its norms subtract the mean."""
        return any(norm.centred for norm in self.norms)


def streams(deps: Dependencies) -> tuple[tuple[Stream, ...], dict[str, str]]:
    """The residual streams of a network, and for all other spaces, by name, why they are none.

    >>> from fxsvd.capture import capture
    >>> from fxsvd.dependency import analyze
    >>> import torch
    >>> layers = nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2)
    >>> found, why = streams(analyze(capture(nn.Sequential(*layers), torch.zeros(2, 3))))
    >>> [(s.space.name, len(s.norms), list(s.readers)) for s in found], why
    ([('0', 1, ['2'])], {'2': "it is the network's output"})
    """
    maps = linear_maps(deps)
    walk = Walk(deps, maps)
    found, why = [], {}
    for i, space in enumerate(deps.spaces):
        stream = _Stream(deps, walk, maps, i)
        reason = space.frozen or stream.follow() or stream.misplaced()
        if reason:
            why[space.name] = reason
        else:
            found.append(stream.stream)
    return tuple(found), why


class _Stream:
    """Follows one space through the graph."""

    def __init__(
        self, deps: Dependencies, walk: Walk, maps: dict[str, Reader], number: int
    ) -> None:
        self.deps, self.walk, self.maps, self.number = deps, walk, maps, number
        self.stream = Stream(deps.spaces[number])
        self.state: dict[fx.Node, Norm | None] = {}

    def follow(self) -> str:
        """Go through all nodes; why the space is no stream, or nothing."""
        for node in self.deps.analysis.graph.graph.nodes:
            why = self._see(node)
            if why:
                return why
        return ""

    def _see(self, node: fx.Node) -> str:
        holders = [n for n in node.all_input_nodes if n in self.state]
        written = node.op not in ("output", "get_attr") and self.number in self.walk.held(node)
        if node.op == "get_attr" or not (holders or written):
            return self._parameter(node) if node.op == "get_attr" else ""
        module = self._module(node)
        reader = self.maps.get(str(node.target) if module is not None else weight_of(node))
        if reader is not None:
            return self._map(node, reader, written)
        if isinstance(module, nn.Embedding):
            return self._embedding(node, module)
        if _is_norm(node, module):
            return self._norm(node, module)
        return self._between(node, holders, written)

    def _module(self, node: fx.Node) -> nn.Module | None:
        graph = self.deps.analysis.graph
        return graph.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _parameter(self, node: fx.Node) -> str:
        """A parameter that may be added to the stream; whether it is shows where it is used."""
        t = self.deps.analysis.types[node]
        for block in getattr(t, "blocks", ()):
            numbers = self.deps.space_of[self.deps.channels.of[block.atoms]]
            used_as_weight = any(weight_of(user) for user in node.users)
            if (numbers == self.number).all() and len(block.dims) == 1 and not used_as_weight:
                if all(_is_norm(user, None) for user in node.users):
                    return ""
                self.state[node] = None
                self._writes(str(node.target), block.dims[0])
        return ""

    def _writes(self, name: str, dim: int) -> None:
        known = (p for p in self.deps.analysis.parameters.values() if name in p.names)
        for parameter in known:
            self.stream.writers[parameter.names[0], dim] = None

    def _map(self, node: fx.Node, reader: Reader, written: bool) -> str:
        if input_of(node) in self.state:
            norm = self.state[input_of(node)]
            if reader.patch > 1 or reader.groups > 1:
                return f"`{reader.layer}` reads it by patches or groups"
            if self.stream.readers.setdefault(reader.layer, (reader, norm))[1] is not norm:
                return f"`{reader.layer}` reads it twice, through different norms"
            bare = reader.module.bias is None and not is_layer(reader)
            if norm is not None and norm.bias and bare:
                return f"`{reader.layer}` has no bias that could take over that of the norm"
        if written:
            if reader.groups > 1:
                return f"`{reader.layer}` has groups: it mixes some channels only"
            self.state[node] = None
            self._writes(reader.weight.names[0], 0)
            self._writes(bias_name(self.deps, node), 0)
        return ""

    def _embedding(self, node: fx.Node, module: nn.Embedding) -> str:
        if module.max_norm is not None or len(module._forward_hooks):
            return f"`{node.name}` rescales its rows as they are looked up"
        self.state[node] = None
        self._writes(f"{node.target}.weight", 1)
        return ""

    def _norm(self, node: fx.Node, module: nn.Module | None) -> str:
        if input_of(node) not in self.state or self.state[input_of(node)] is not None:
            return f"`{node.name}` is a norm of something else than the stream"
        shape = _argument(node, module, 1, "normalized_shape")
        if list(shape) != [self.stream.space.width]:
            return f"`{node.name}` takes its statistics over more than the channels"
        names = [self._name(node, module, i, n) for i, n in ((2, "weight"), (3, "bias"))]
        centred = _layer_norm(node, module)
        norm = Norm(node, centred, names[0], names[1] if centred else "")
        self.stream.norms.append(norm)
        self.state[node] = norm
        return self.walk.split(self.number, node)

    def _name(self, node: fx.Node, module: nn.Module | None, place: int, name: str) -> str:
        value = _argument(node, module, place, name)
        target = f"{node.target}.{name}" if module is not None else getattr(value, "target", "")
        known = (p.names[0] for p in self.deps.analysis.parameters.values() if target in p.names)
        return next(known, "")

    def _between(self, node: fx.Node, holders: list[fx.Node], written: bool) -> str:
        part = getattr(node.target, "__name__", "") == "getitem"  # of several results
        stored = all(getattr(self.deps.analysis.types[n], "stored", False) for n in holders)
        stays = written or part or (stored and node.op != "output")
        why = why_not(self.deps.analysis.graph, node, holders, stays)
        states = [self.state[n] for n in holders]
        if not why and any(state is not states[0] for state in states):
            return f"`{node.name}` adds what a norm made of it to the stream"
        self.state[node] = states[0] if states else None
        return why or (self.walk.split(self.number, node) if written else "")

    def misplaced(self) -> str:
        """Why the space is no stream, seen as a whole."""
        found, i = self.stream, self.number
        if not found.norms:
            return "no norm reads it"
        if len(np.unique(self.walk.labels[i])) > 1:
            return "it is taken apart into heads"
        raw = [r.layer for r, norm in found.readers.values() if norm is None]
        if found.centred and (raw or not all(norm.centred for norm in found.norms)):
            return f"a norm subtracts its mean, but {raw or 'another'} does not"
        known = set(found.writers) | {(r.weight.names[0], 1) for r, _ in found.readers.values()}
        known |= {(name, 0) for norm in found.norms for name in (norm.weight, norm.bias)}
        for site in (*found.space.producers, *found.space.consumers, *found.space.followers):
            if (site.tensor, site.dim) not in known:
                return f"`{site.tensor}` holds a number for each channel"
        return ""


def _is_norm(node: fx.Node, module: nn.Module | None) -> bool:
    if module is not None:
        hooked = module._forward_hooks or module._forward_pre_hooks
        return type(module) in (nn.LayerNorm, nn.RMSNorm) and not hooked
    return node.op == "call_function" and node.target in (F.layer_norm, F.rms_norm)


def _layer_norm(node: fx.Node, module: nn.Module | None) -> bool:
    return isinstance(module, nn.LayerNorm) or node.target is F.layer_norm


def _argument(node: fx.Node, module: nn.Module | None, place: int, name: str) -> Any:
    if module is not None:
        return getattr(module, name, None)
    return node.args[place] if len(node.args) > place else node.kwargs.get(name)
