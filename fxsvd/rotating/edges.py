"""Linear edges: spaces between whose producers and consumers nothing but linear maps stands.

There any change of basis is free: the producers write E z, not z, and the consumers read D (E z).
An operation may stand in between only if it commutes with every matrix across the channels
(``fxsvd.rotating.commuting``). What is not known to is refused, with its name.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxsvd.analysis import Parameter
from fxsvd.axes import Block
from fxsvd.data.readers import Reader, readers
from fxsvd.dependency import Dependencies
from fxsvd.nests import flatten
from fxsvd.relations import Atoms, runs
from fxsvd.rotating.commuting import why_not
from fxsvd.spaces import Space


@dataclass(frozen=True, eq=False)
class Edge:
    """A space whose basis may change.

    Attributes:
        space: the space.
        blocks: its channels, in the sets that may be mixed (in attention, a set per head).
        producers: the maps that write it.
        consumers: the maps that read it.
    """

    space: Space
    blocks: tuple[Atoms, ...]
    producers: tuple[Reader, ...]
    consumers: tuple[Reader, ...]


def linear_maps(deps: Dependencies) -> dict[str, Reader]:
    """Linear layers, convolutions, and calls of ``F.linear`` with parameters.

    A call of ``F.linear`` goes by the name of its weight.

    >>> from fxsvd.capture import capture
    >>> from fxsvd.dependency import analyze
    >>> attention = nn.MultiheadAttention(4, 2, batch_first=True)
    >>> x = torch.zeros(2, 3, 4)
    >>> graph = capture(attention, {"query": x, "key": x, "value": x})
    >>> list(linear_maps(analyze(graph)))
    ['out_proj.weight']
    """
    found = readers(deps)
    tensors = {name: p for p in deps.analysis.parameters.values() for name in p.names}
    for node in deps.analysis.graph.graph.nodes:
        name = weight_of(node)
        if name and len(tensors[name].names) == 1 and _calls(node) == 1:
            found[name] = _functional(deps, node, tensors[name])
    return found


def weight_of(node: fx.Node) -> str:
    """The parameter by which a call of ``F.linear`` multiplies; empty for any other node."""
    weight = node.args[1] if node.target is F.linear and len(node.args) > 1 else None
    return str(weight.target) if isinstance(weight, fx.Node) and weight.op == "get_attr" else ""


def _calls(node: fx.Node) -> int:
    return sum(weight_of(n) == weight_of(node) for n in node.graph.nodes)


def _functional(deps: Dependencies, node: fx.Node, weight: Parameter) -> Reader:
    """The call as if a layer made it."""
    out, width = weight.value.shape
    module = nn.Linear(width, out, bias=False, device="meta")
    module.weight = nn.Parameter(weight.value.detach(), requires_grad=False)
    bias = bias_name(deps, node)
    if bias:
        value = deps.analysis.by_name(bias).value.detach()
        module.bias = nn.Parameter(value, requires_grad=False)
    atoms = weight.type.vector(1)
    channels = np.full(width, -1) if atoms is None else deps.channels.of[atoms]
    return Reader(weight.names[0], module, (node,), weight, channels, None)


def bias_name(deps: Dependencies, call: fx.Node) -> str:
    """The first name of the bias that a call of a linear map adds; empty where it has none."""
    if call.op == "call_module":
        names = f"{call.target}.bias"
    else:
        bias = call.args[2] if len(call.args) > 2 else call.kwargs.get("bias")
        names = str(bias.target) if isinstance(bias, fx.Node) else ""
    known = (p for p in deps.analysis.parameters.values() if names in p.names)
    return next((p.names[0] for p in known), "")


def input_of(call: fx.Node) -> fx.Node:
    """The value that a call of a layer or function of one input is given."""
    value = call.args[0] if call.args else call.kwargs.get("input")
    assert isinstance(value, fx.Node)  # such calls compute with it
    return value


def is_layer(reader: Reader) -> bool:
    """Whether a map is a layer, not a call of ``F.linear``."""
    return reader.calls[0].op == "call_module"


def linear_edges(deps: Dependencies) -> tuple[tuple[Edge, ...], dict[str, str]]:
    """The spaces whose basis may change, and for all others, by name, why it may not.

    >>> from fxsvd.capture import capture
    >>> from fxsvd.dependency import analyze
    >>> net = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> edges, why = linear_edges(analyze(capture(net, torch.zeros(2, 3))))
    >>> [(e.space.name, [r.layer for r in e.consumers]) for e in edges], why["1"]
    ([('0', ['1'])], '`_2` (ReLU) stands in between and is not linear')
    """
    maps = linear_maps(deps)
    walk = Walk(deps, maps)
    for node in deps.analysis.graph.graph.nodes:
        if node.op not in ("output", "get_attr"):
            walk.visit(node)
    edges = [walk.edge(i) for i in range(len(deps.spaces))]
    why = {s.name: walk.why[i] for i, s in enumerate(deps.spaces) if i in walk.why}
    return tuple(e for e in edges if e is not None), why


class Walk:
    """What a walk over the graph finds out about every space."""

    def __init__(self, deps: Dependencies, maps: dict[str, Reader]) -> None:
        self.deps, self.maps = deps, maps
        self.why = {i: s.frozen for i, s in enumerate(deps.spaces) if s.frozen}
        self.writers: dict[int, dict[str, Reader]] = {i: {} for i in range(len(deps.spaces))}
        self.readers: dict[int, dict[str, Reader]] = {i: {} for i in range(len(deps.spaces))}
        self.labels = {i: np.zeros(s.width, dtype=np.int64) for i, s in enumerate(deps.spaces)}
        self.place = np.zeros(deps.channels.count, dtype=np.int64)
        for space in deps.spaces:
            self.place[space.channels] = np.arange(space.width)

    def visit(self, node: fx.Node) -> None:
        """See one node."""
        before = {n: self.held(n) for n in node.all_input_nodes}
        into, out = set().union(*before.values()), self.held(node)
        reader = self.maps.get(str(node.target) if node.op == "call_module" else weight_of(node))
        for i in (into | out) - self.why.keys():
            if reader is None:
                holders = [n for n, held in before.items() if i in held]
                part = getattr(node.target, "__name__", "") == "getitem"  # of several results
                why = why_not(self.deps.analysis.graph, node, holders, part or i in out)
            else:
                why = self._by_map(i, reader, i in into, i in out)
            why = why or (self.split(i, node) if i in out else "")
            if why:
                self.why[i] = why

    def held(self, node: fx.Node) -> set[int]:
        """The spaces of which a node's value holds channels; parameters do not count."""
        held: set[int] = set()
        for t in flatten([self.deps.analysis.types[node]]):
            for block in t.blocks if not t.stored else ():
                held |= set(np.unique(self._spaces(block)).tolist())
        return held - {-1}

    def _spaces(self, block: Block) -> Atoms:
        return self.deps.space_of[self.deps.channels.of[block.atoms]]

    def _by_map(self, i: int, reader: Reader, reads: bool, writes: bool) -> str:
        if reads:
            self.readers[i][reader.layer] = reader
        if writes:
            self.writers[i][reader.layer] = reader
        if reader.groups > 1:
            kind = "is depthwise" if reader.depthwise else "has groups"
            return f"`{reader.layer}` {kind}: it mixes some channels only"
        lacks = reads and not is_layer(reader) and reader.module.bias is None
        return f"`{reader.layer}` has no bias that could take over the mean" if lacks else ""

    def split(self, i: int, node: fx.Node) -> str:
        """Only channels of one row (a head) of a tensor mix, and only all of them: why not."""
        for t in flatten([self.deps.analysis.types[node]]):
            blocks = [b for b in t.blocks if (self._spaces(b) == i).any()]
            for block in blocks:
                seen = np.flatnonzero(self._spaces(block).ravel() == i)
                place = self.place[self.deps.channels.of[block.atoms].ravel()[seen]]
                counts = np.bincount(place, minlength=self.deps.spaces[i].width)
                if (counts != counts[0]).any() or len(blocks) > 1:
                    return f"`{node.name}` takes it apart"
                self._refine(i, seen, place, block)
        return ""

    def _refine(self, i: int, seen: Atoms, place: Atoms, block: Block) -> None:
        """Split the sets by the row in which each channel occurs first."""
        if len(block.dims) > 1:
            row = np.zeros_like(self.labels[i])
            row[place[::-1]] = seen[::-1] // block.atoms.shape[-1]
            pairs = np.stack([self.labels[i], row])
            self.labels[i] = np.unique(pairs, axis=1, return_inverse=True)[1].ravel()

    def edge(self, i: int) -> Edge | None:
        """The edge that a space is, unless there is a reason against it."""
        if i not in self.why:
            self.why |= {i: why} if (why := self._misplaced(i)) else {}
        if i in self.why:
            return None
        space, labels = self.deps.spaces[i], self.labels[i]
        blocks = tuple(space.channels[labels == one] for one in np.unique(labels))
        return Edge(space, blocks, tuple(self.writers[i].values()), tuple(self.readers[i].values()))

    def _misplaced(self, i: int) -> str:
        """Whether a parameter holds the channels that is none of the maps'."""
        space = self.deps.spaces[i]
        if not self.readers[i]:
            return "no linear map reads it"
        writers = self.writers[i].values()
        known = {(r.weight.names[0], 0) for r in writers}
        known |= {(bias_name(self.deps, r.calls[0]), 0) for r in writers}
        known |= {(r.weight.names[0], 1) for r in self.readers[i].values()}
        for site in (*space.producers, *space.consumers, *space.followers):
            if (site.tensor, site.dim) not in known:
                return f"`{site.tensor}` holds a number for each channel"
        return ""


def places(entries: Atoms, channels: Atoms) -> Tensor:
    """Where each channel stands among the entries of an axis: ``[channels, times]``.

    Raises:
        ValueError: channels stand there unequally often.

    >>> places(np.array([7, 5, 7, 5]), np.array([5, 7])).tolist()
    [[1, 3], [0, 2]]
    """
    order, first, times = runs(entries, channels)
    if len(set(times.tolist())) != 1:
        raise ValueError("some channels stand in this axis more often than others")
    return torch.from_numpy(order[first[:, None] + np.arange(int(times[0]))])


def stand_evenly(entries: Atoms, channels: Atoms) -> bool:
    """Whether all channels stand equally often among the entries of an axis.

    >>> stand_evenly(np.array([5, 7, 5]), np.array([5, 7]))
    False
    """
    *_, times = runs(entries, channels)
    return len(set(times.tolist())) == 1
