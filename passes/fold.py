"""Fold: what a neighbour can take over, it takes over; the outputs stay what they are.

In eval mode: a batch norm goes into the layer in front of it or behind it, linear maps with nothing
between them become one where that saves parameters, a pool that only copies goes into the linear
layer behind, channels that are dead or constant go. In train mode a norm that was folded keeps the
statistics it had.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

from torch import fx, nn

from fxsvd.data.batches import Data
from fxsvd.data.readers import Reader
from fxsvd.dependency import Dependencies
from fxsvd.edits import Assign, Left, Part, Plan, Substitute
from fxsvd.folding.absorbing import (
    TRANSPOSED,
    Numbers,
    affine,
    copying_pool,
    norm_after,
    norm_before,
)
from fxsvd.folding.composing import Run, composed, double_copy, partition, runs
from fxsvd.folding.picking import chosen_layers
from fxsvd.folding.plain import alone, calls_of, plain_layers
from fxsvd.importance import require_numbers
from fxsvd.layers import BATCH_NORMS
from fxsvd.naming import Names
from fxsvd.passes.prune import Prune
from fxsvd.progress import Say, quiet
from fxsvd.substitution import linear_part

_FIRST = "dead channels go first: run Fold() again"


@dataclass(frozen=True)
class Fold:
    """Fold batch norms, linear maps in a row, copying pools and dead channels, exactly.

    Layers that are called twice, share weights, have hooks or whose value somebody else sees stay.

    Attributes:
        only: names, glob patterns or modules that may be changed.
        ignore: likewise, what stays.
        dead: also drop channels that are dead or constant (``Prune(criterion="dead")``); where
            there are some, linear maps wait for a further ``Fold()``.

    >>> Fold().dead
    True
    """

    only: Names = ()
    ignore: Names = ()
    dead: bool = True

    def propose(self, deps: Dependencies, data: Data = None, say: Say = quiet) -> Plan:
        """The plan; nothing is touched.

        Args:
            deps: what ``fxsvd.analyze`` found.
            data: not needed.
            say: not needed.

        Raises:
            PlanError: a name means nothing.
        """
        require_numbers(deps)
        graph = deps.analysis.graph
        plain, left = plain_layers(deps, last=True)
        norms = list(dict.fromkeys(calls_of(graph, BATCH_NORMS)))
        every = [*plain, *left, *norms]
        stays = chosen_layers(graph, every, self.only, self.ignore)
        dead = Plan()
        if self.dead:
            dead = Prune(criterion="dead", only=self.only, ignore=self.ignore).propose(deps)
        folding = _Folding(graph, {n: r for n, r in plain.items() if n not in stays}, dead)
        folding.norms([n for n in norms if n not in stays], left)
        if not dead.edits:
            folding.pools()
            folding.merges()
        gone = {edit.layer for edit in folding.substitutes}
        why = {n: "no plain layer beside it can take it over" for n in norms if n not in gone}
        why |= dict.fromkeys(folding.waiting(), _FIRST) if dead.edits else {}
        return Plan(
            edits=dead.edits,
            values=folding.values(dead),
            substitutes=tuple(folding.substitutes),
            exact=True,
            left=tuple(Left(n, w) for n, w in (why | stays).items()),
        )


@dataclass(eq=False)
class _Folding:
    """The numbers that layers are going to have, and what goes."""

    graph: fx.GraphModule
    plain: dict[str, Reader]
    dead: Plan
    numbers: dict[str, Numbers] = field(default_factory=dict)
    substitutes: list[Substitute] = field(default_factory=list)

    def of(self, layer: str) -> Numbers:
        """What a layer is going to hold; constants of dead channels are in its bias already."""
        if layer not in self.numbers:
            self.numbers[layer] = Numbers.of(self.graph.get_submodule(layer))
            for value in self.dead.values:
                if value.parameter == f"{layer}.bias":
                    self.numbers[layer].bias = value.value.double()
        return self.numbers[layer]

    def norms(self, wanted: list[str], odd: dict[str, str]) -> None:
        """Batch norms into the layers in front of them, else into those behind."""
        for layer in [*self.plain, *self._transposed(odd)]:
            found = norm_after(self.graph, layer)
            if found is not None and found in wanted:
                module, norm = (self.graph.get_submodule(n) for n in (layer, found))
                self.of(layer).scale_outputs(module, *affine(norm))
                self._remove(found, f"folded into {layer}")
        for layer, reader in self.plain.items():
            norm_path = norm_before(self.graph, reader)
            if norm_path in wanted and norm_path not in self._gone():
                norm = self.graph.get_submodule(norm_path)
                self.of(layer).scale_inputs(reader.groups, *affine(norm))
                self._remove(norm_path, f"folded into {layer}")

    def _transposed(self, odd: dict[str, str]) -> Iterator[str]:
        """Transposed convolutions with a bias that can take a shift."""
        for layer in odd:
            module = self.graph.get_submodule(layer)
            hooked = module._forward_hooks or module._forward_pre_hooks
            usual = type(module) in TRANSPOSED and not hooked and module.bias is not None
            if usual and alone(self.graph, layer):
                yield layer

    def pools(self) -> None:
        """Pools that copy single pixels into the linear layers that read the copies."""
        for layer, reader in self.plain.items():
            found = copying_pool(self.graph, reader)
            if found is not None:
                pool, copies = found
                self.of(layer).merge_copies(copies)
                self._remove(pool, f"its {copies} copies are added up in {layer}")

    def merges(self) -> None:
        """Linear maps in a row into one; layers whose shape has changed into new ones."""
        taken = set()
        for run, chunk in self._chunks():
            layers = run.layers[chunk.start : chunk.stop]
            part = composed([self._copy(n) for n in layers])
            *first, last = layers
            between = run.between[chunk.start : chunk.stop - 1]
            for path in (*first, *chain.from_iterable(between)):
                if path not in self._gone():
                    self._remove(path, f"merged into {last}")
            self._replace(last, part, f"merged with {', '.join(first)}")
            taken |= set(layers)
        for layer in self.numbers.keys() - taken:
            held = self.numbers[layer]
            if held.weight.shape != self.graph.get_parameter(f"{layer}.weight").shape:
                part = linear_part(held.weight, held.bias)
                self._replace(layer, part, "reads every copy once")

    def waiting(self) -> list[str]:
        """Layers that a further pass would merge."""
        return [n for run, chunk in self._chunks() for n in run.layers[chunk.start : chunk.stop]]

    def _chunks(self) -> Iterator[tuple[Run, range]]:
        for run in runs(self.graph, self.plain, self._gone()):
            for chunk in partition([self._copy(n) for n in run.layers]):
                if len(chunk) > 1:
                    yield run, chunk

    def _copy(self, layer: str) -> nn.Module:
        held = self.of(layer)
        return double_copy(self.graph.get_submodule(layer), held.weight, held.bias)

    def _gone(self) -> frozenset[str]:
        return frozenset(edit.layer for edit in self.substitutes if not edit.parts)

    def _remove(self, layer: str, why: str) -> None:
        self.substitutes.append(Substitute(layer, (), why))

    def _replace(self, layer: str, part: Part, why: str) -> None:
        self.substitutes.append(Substitute(layer, (part,), why))

    def values(self, dead: Plan) -> tuple[Assign, ...]:
        """New numbers of the layers that stay."""
        replaced = {edit.layer for edit in self.substitutes}
        out = {value.parameter: value for value in dead.values}
        for layer, held in self.numbers.items():
            if held.touched and layer not in replaced:
                why = "takes over its neighbours"
                out[f"{layer}.weight"] = Assign(f"{layer}.weight", held.weight, why)
                if held.bias is not None:
                    out[f"{layer}.bias"] = Assign(f"{layer}.bias", held.bias, why)
        return tuple(out.values())
