"""Following a stream through a graph, to say what all that touches it becomes when it grows.

The stream's channels are multiplied by s = √(d' / d), and new ones are the mean of the others (or
zero, where no norm subtracts the mean). The mean over d' channels is then s μ, and the variance is
Σ (s x - s μ)² / d' = Σ (x - μ)² / d, what it was. So norms divide by what they divided by, epsilon
and all, and give values s times as large; their gains, or the readers behind them, are divided by
s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import fx
from torch.nn import functional as F

from fxsvd.analysis import in_place
from fxsvd.axes import Block, TensorType, dimension
from fxsvd.dependency import Dependencies
from fxsvd.growing.calls import Map, Norm, argument, drops, map_of, norm_of, squares
from fxsvd.growing.ledger import Again, Held, Ledger, Stays
from fxsvd.growing.marks import Mark
from fxsvd.nests import flatten
from fxsvd.rotating.commuting import PRODUCTS, SCALINGS, why_not

LINEAR = PRODUCTS | {F.linear, torch.addmm, torch.mm}


class Walk:
    """One space, followed through the graph."""

    def __init__(self, deps: Dependencies, number: int, ledger: Ledger) -> None:
        self.deps, self.number, self.ledger = deps, number, ledger
        self.graph, self.types = deps.analysis.graph, deps.analysis.types
        self.state: dict[fx.Node, Held] = {}
        self.statistics: dict[fx.Node, frozenset[fx.Node]] = {}
        self._found: dict[fx.Node, bool] = {}
        self._place = np.full(deps.channels.count, -1)
        self._place[deps.spaces[number].channels] = np.arange(deps.spaces[number].width)

    def follow(self) -> None:
        """Go through all nodes, from the beginning.

        Raises:
            Stays: something would notice the new channels.
            Again: the ledger has learnt something that changes what came before.
        """
        self.ledger.begin()
        self.state, self.statistics = {}, {}
        for node in self.graph.graph.nodes:
            if node.op not in ("placeholder", "output"):
                self._see(node)

    def _see(self, node: fx.Node) -> None:
        holders = [n for n in node.all_input_nodes if n in self.state]
        held = None
        if holders or self._holds(node):
            held = self._made(node, holders)
        seen = frozenset[fx.Node]().union(
            *(self.statistics.get(n, ()) for n in node.all_input_nodes)
        )
        if held is not None:
            behind = held if node.op == "get_attr" else replace(held, norms=held.norms | seen)
            self.state[node] = behind
            if in_place(node):
                self.state[node.args[0]] = behind  # type: ignore[index]  # a node by construction
        elif seen:
            self.statistics[node] = seen

    def _holds(self, node: fx.Node) -> bool:
        """Whether a value has the stream's channels: all of them, equally often.

        Raises:
            Stays: it has some of them.
        """
        if node not in self._found:
            types = flatten([self.types[node]])
            blocks = [self._whole(node, block) for t in types for block in t.blocks]
            self._found[node] = any(blocks)
        return self._found[node]

    def _whole(self, node: fx.Node, block: Block) -> bool:
        place = self._place[self.deps.channels.of[block.atoms].ravel()]
        if (place < 0).all():
            return False
        times = np.bincount(place[place >= 0], minlength=self.deps.spaces[self.number].width)
        if (place < 0).any() or (times != times[0]).any():
            raise Stays(f"`{node.name}` takes it apart")
        return True

    def _made(self, node: fx.Node, holders: Sequence[fx.Node]) -> Held | None:
        """What a node makes of the stream; nothing where its result has none of it."""
        if node.op == "get_attr":
            return Held(0, "free", stored=self.ledger.axis(str(node.target), self.number))
        made, norm = map_of(self.graph, node), norm_of(self.graph, node)
        if made is not None:
            return self._map(node, made)
        if norm is not None:
            return self._norm(node, norm)
        if not flatten([self.types[node]]):
            return None  # a size
        if not self._holds(node):
            if not self._reads(node, holders):
                self._statistic(node, holders)
            return None
        return self._between(node, holders)

    # ------------------------------------------------------------ maps and norms

    def _map(self, node: fx.Node, made: Map) -> Held | None:
        if made.input in self.state:
            source = self._written(self.state[made.input])
            self.ledger.read(made.weight, made.into, self._column(source), source.norms)
        if not self._holds(node):
            return None
        keys = [self.ledger.write(made.weight, made.out)]
        if self.ledger.has(made.bias):
            keys.append(self.ledger.write(made.bias, 0))
        return Held(1, self.ledger.mode, writers=frozenset(keys))

    def _reads(self, node: fx.Node, holders: Sequence[fx.Node]) -> bool:
        """A product with (a part of) a parameter reads the stream."""
        stored = [self.state[n].stored for n in holders if self.state[n].stored]
        others = [self.state[n] for n in holders if not self.state[n].stored]
        if node.target not in LINEAR or len(stored) != 1 or len(others) != 1:
            return False
        assert stored[0] is not None  # a key
        self.ledger.read(*stored[0], self._column(others[0]), others[0].norms)
        return True

    def _column(self, source: Held) -> Mark:
        """Columns of new channels that are zero can be anything: then what writes them learns."""
        return Mark(-source.power, "fresh" if source.new == "zero" else "zero")

    def _written(self, held: Held) -> Held:
        """A parameter that is added to the stream writes it."""
        if held.stored is None:
            return held
        key = self.ledger.write(*held.stored)
        return Held(1, self.ledger.mode, writers=frozenset([key]))

    def _norm(self, node: fx.Node, norm: Norm) -> Held:
        source = self._written(self.state[norm.input])
        if not self._over_channels(norm.input, [-1]) or len(norm.shape) > 1:
            raise Stays(f"`{node.name}` takes its statistics over more than the channels")
        if norm.centred and self.ledger.mode == "zero":
            self.ledger.mode = "mean"
            raise Again
        if source.power != 1 or source.new != self.ledger.mode:
            raise Stays(f"`{node.name}` is a norm of what a norm made")
        if not norm.centred and source.new == "mean":
            raise Stays(f"a norm subtracts its mean, but `{node.name}` does not")
        here, target = frozenset([node]), self.ledger.target(node)
        self.ledger.norms.add(node)
        gain, bias = self.ledger.has(norm.weight), self.ledger.has(norm.bias)
        if not gain:
            return Held(1, "zero", here)
        self.ledger.mark((self.ledger.first(norm.weight), 0), Mark(target - 1, "copy"))
        if bias:
            bent = node in self.ledger.bent
            mark = Mark(target, "one" if bent else "zero")
            self.ledger.mark((self.ledger.first(norm.bias), 0), mark)
            self.ledger.biased.add(node)
            return Held(target, "free" if bent else "zero", here)
        return Held(target, "zero", here)

    def _over_channels(self, node: fx.Node, dims: Sequence[int]) -> bool:
        """Whether the dimensions are that of the channels, each there once."""
        t = self.types[node]
        if not isinstance(t, TensorType) or len(dims) != 1:
            return False
        atoms = t.vector(dimension(dims[0], len(t.shape)))
        width = self.deps.spaces[self.number].width
        return atoms is not None and len(atoms) == width and self._holds(node)

    # ------------------------------------------------------------ everything else

    def _statistic(self, node: fx.Node, holders: Sequence[fx.Node]) -> None:
        """A mean of squares over the channels stays what it was; nothing else may use them up."""
        dims = argument(node, 1, "dim")
        listed = dims if isinstance(dims, (tuple, list)) else [dims]
        square = len(holders) == 1 and self.state[holders[0]] in (Held(2, "zero"),)
        named = getattr(node.target, "__name__", node.target) == "mean"
        if not (square and named and None not in listed):
            raise Stays(f"`{node.name}` uses it up and is no linear map")
        if not self._over_channels(holders[0], [int(d) for d in listed]):
            raise Stays(f"`{node.name}` takes its statistics over more than the channels")
        self.statistics[node] = frozenset([node])
        self.ledger.norms.add(node)

    def _between(self, node: fx.Node, holders: Sequence[fx.Node]) -> Held:
        helds = [self.state[n] for n in holders]
        why = "" if drops(self.graph, node) else why_not(self.graph, node, holders, stays=True)
        stored = [held for held in helds if held.stored is not None]
        if len(helds) == len(stored) == 1 and not why:
            return helds[0]
        if len(helds) == 2 and len(stored) == 1 and node.target in SCALINGS:
            other = next(held for held in helds if held.stored is None)
            return self._gain(node, other, stored[0])
        if why:
            return self._bent(node, helds, why)
        return self._sum(node, holders)

    def _sum(self, node: fx.Node, holders: Sequence[fx.Node]) -> Held:
        helds = [self._written(self.state[n]) for n in holders]
        first = helds[0]
        if any((held.power, held.new) != (first.power, first.new) for held in helds):
            raise Stays(f"`{node.name}` adds what a norm made of it to the stream")
        alone = all(
            len(n.users) == 1 and held.writers for n, held in zip(holders, helds, strict=True)
        )
        writers = frozenset[tuple[str, int]]().union(*(held.writers for held in helds))
        norms = frozenset[fx.Node]().union(*(held.norms for held in helds))
        return Held(first.power, first.new, norms, writers if alone else frozenset())

    def _gain(self, node: fx.Node, held: Held, gain: Held) -> Held:
        """A parameter that multiplies each channel: a norm's takes over s, others let it pass."""
        assert gain.stored is not None  # see _between
        if held.new != "mean":
            target = self.ledger.target(*held.norms) if held.norms and held.power else held.power
            self.ledger.mark(gain.stored, Mark(target - held.power, "copy"))
            return replace(held, power=target, writers=frozenset())
        if not held.writers:
            raise Stays(f"`{node.name}` multiplies each channel by a number of its own")
        self.ledger.weigh(held.writers, gain.stored)
        return replace(held, writers=frozenset())

    def _bent(self, node: fx.Node, helds: Sequence[Held], why: str) -> Held:
        """Something that is not linear: the square of a norm, or behind a norm."""
        if any(held.stored is not None for held in helds):
            raise Stays(why)
        first = helds[0]
        if squares(node) and (first.power, first.new) == (1, "zero"):
            return Held(2, "zero")
        if any(held.power for held in helds):
            raise Stays(why)
        norms = frozenset[fx.Node]().union(*(held.norms for held in helds))
        self.ledger.bend(norms)
        zero = all(held.new == "zero" for held in helds)
        kept = all(block.zero for t in flatten([self.types[node]]) for block in t.blocks)
        return Held(0, "zero" if zero and kept else "free", norms)
