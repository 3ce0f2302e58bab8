"""Refitting layers one after the other, each on what the layers before it have become.

The network and its compressed twin (in the original's shapes, dropped channels silent) run side by
side, a node at a time over all batches. A layer that is reached is refitted, from the inputs that
it sees in the twin to the outputs that it has in the original, before the twin goes on: errors are
corrected where they arise. Where the layer's output is added to something that differs already (a
residual stream), the target takes that difference along.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fxsvd.batches import Batch, batches
from fxsvd.calibrate import Positions, checked, chosen_rows
from fxsvd.cost import evaluating
from fxsvd.dependency import Dependencies
from fxsvd.fit import Fit, Mask, fit
from fxsvd.joins import join_behind, schedule
from fxsvd.moments import Moment
from fxsvd.narrowing import Narrowing
from fxsvd.progress import Say, quiet
from fxsvd.readers import Reader, input_rows, output_rows
from fxsvd.reference import silenced
from fxsvd.rewrite import add_bias
from fxsvd.running import placeholder_values


def refit_chained(
    deps: Dependencies,
    narrowing: Narrowing,
    wanted: dict[str, Reader],
    data: Iterable[Any],
    *,
    positions: Positions = "auto",
    seed: int = 0,
    say: Say = quiet,
) -> Iterator[Fit]:
    """Refit layers in order of execution.

    Args:
        deps: the analysis of the original graph.
        narrowing: which channels stay.
        wanted: the layers to refit.
        data: batches; all are held, with what is alive of their activations, twice.
        positions: rows per sample, see ``fxsvd.calibrate``.
        seed: of the choice of rows.
        say: is told how far it is.

    Yields:
        The fit of each layer, once the twin computes with it.
    """
    values = {id(p.value): p.value.detach() for p in deps.analysis.parameters.values()}
    twin = silenced(deps, narrowing, values, double=False)
    graph = deps.analysis.graph
    with torch.no_grad(), evaluating(graph), evaluating(twin):
        pair = _Pair(graph, twin, list(batches(data, graph)))
        for node in schedule(twin, wanted):
            own = pair.own.get(node.name)  # a twin has nodes more than the original: masks
            if own is not None:
                pair.original.run(own)
            reader = wanted.get(str(node.target)) if node.op == "call_module" else None
            if reader is not None:
                say(f"refitting {reader.layer}")
                moment = pair.moment(node, reader, positions, seed).reduced()
                checked({reader.layer: moment})
                found = fit(reader, moment, alive(reader, deps, narrowing))
                _install(twin, found)
                yield found
            pair.twin.run(node)
            pair.twin.leave(node)
            if own is not None:
                pair.original.leave(own)


def alive(reader: Reader, deps: Dependencies, narrowing: Narrowing) -> Mask:
    """Which entries of a reader's rows stay, ``[groups, row]``."""
    stays = np.ones(deps.channels.count + 1, dtype=bool)  # the last one for what nobody narrows
    stays[deps.channels.of] = narrowing.atoms
    out: Mask = stays[reader.entries()]
    return out


def _install(twin: fx.GraphModule, found: Fit) -> None:
    """Let the twin compute with a fit."""
    tensors = dict(twin.named_parameters()) | dict(twin.named_buffers())
    for assign in found.assigns(twin):
        if assign.parameter in tensors:
            tensors[assign.parameter].copy_(assign.value)
        else:
            add_bias(twin.get_submodule(found.reader.layer), assign.value)


class _Lane:
    """A graph that runs a node at a time over all batches."""

    def __init__(self, graph: fx.GraphModule, data: list[Batch]) -> None:
        self.interpreter = fx.Interpreter(graph, garbage_collect_values=False)
        self.values = [placeholder_values(graph, batch) for batch in data]
        self.waiting = {node: len(node.users) for node in graph.graph.nodes}

    def run(self, node: fx.Node) -> None:
        """Compute a node."""
        if node.op in ("placeholder", "output"):
            return
        for values in self.values:
            self.interpreter.env = values
            values[node] = self.interpreter.run_node(node)

    def leave(self, node: fx.Node) -> None:
        """Forget the values that only this node was waiting for."""
        for source in node.all_input_nodes:
            self.waiting[source] -= 1
        for gone in (n for n in (*node.all_input_nodes, node) if self.waiting[n] == 0):
            for values in self.values:
                values.pop(gone, None)


class _Pair:
    """The original and its twin."""

    def __init__(self, graph: fx.GraphModule, twin: fx.GraphModule, data: list[Batch]) -> None:
        self.original, self.twin = _Lane(graph, data), _Lane(twin, data)
        self.own = {n.name: n for n in graph.graph.nodes}

    def moment(self, node: fx.Node, reader: Reader, positions: Positions, seed: int) -> Moment:
        """Inputs that a layer sees in the twin, paired with the outputs that it should have."""
        own, join, moment = self.own[node.name], join_behind(node), Moment()
        lanes = zip(self.original.values, self.twin.values, strict=True)
        for number, (before, after) in enumerate(lanes):
            x: Tensor = after[node.all_input_nodes[0]]
            where = chosen_rows(reader, x, positions, (seed, number))
            y = output_rows(reader.module, before[own], where)
            if join is not None and join.other in after:
                change = before[self.own[join.other.name]] - after[join.other]
                y = y + output_rows(reader.module, join.behind(change), where)
            rows = input_rows(reader.module, x, where)
            moment.add(rows, y.reshape(len(y), reader.groups, -1))
        return moment
