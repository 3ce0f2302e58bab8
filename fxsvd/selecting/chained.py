"""Refitting layers one after the other, each on what the layers before it have become.

The network and its compressed twin (in the original's shapes, dropped channels silent) run side by
side, a node at a time over all batches. A layer that is reached is refitted, from the inputs that
it sees in the twin to the outputs that it has in the original, before the twin goes on: errors are
corrected where they arise. Where the layer's output is added to something that differs already (a
residual stream), the target takes that difference along.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fxsvd.calibrate import Positions, checked, chosen_rows, rows_per_sample
from fxsvd.cost import evaluating
from fxsvd.data import ranks
from fxsvd.data.batches import Batch, batches, samples
from fxsvd.data.lanes import Lane
from fxsvd.data.moments import Moment
from fxsvd.data.readers import Reader, input_rows, output_rows
from fxsvd.data.statistics import Statistics, warned
from fxsvd.dependency import Dependencies
from fxsvd.errors import FxsvdError
from fxsvd.narrowing import Narrowing
from fxsvd.progress import Say, quiet
from fxsvd.reference import silenced
from fxsvd.rewrite import add_bias
from fxsvd.selecting.fit import Fit, Mask, fit
from fxsvd.selecting.joins import join_behind, schedule

Choose = Callable[[Moment], Mask]
ENOUGH = 96
"""With positions="auto": rows in all, for every entry of a row, at least."""
MORE = 2
"""With positions="auto": rows relative to those that ``fxsvd.calibrate`` takes, at least."""


def refit_chained(
    deps: Dependencies,
    narrowing: Narrowing,
    wanted: dict[str, Reader],
    data: Iterable[Any],
    *,
    choosing: Mapping[str, Choose] | None = None,
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
        choosing: by layer, what decides which entries of its rows stay (``[groups, row]``) where
            that is left until the layer is reached, from the moment that it is then fitted to.
        positions: rows per sample, see ``fxsvd.calibrate``; "auto" takes at least ``ENOUGH``.
        seed: of the choice of rows.
        say: is told how far it is.

    Yields:
        The fit of each layer, once the twin computes with it. Its error is that of the outputs
        that the layer had in the original, whatever its target was.

    Warns:
        UserWarning: a layer saw fewer rows than a row has entries.
    """
    values = {id(p.value): p.value.detach() for p in deps.analysis.parameters.values()}
    twin = silenced(deps, narrowing, values, double=False)
    graph, choosing = deps.analysis.graph, choosing or {}
    with torch.no_grad(), evaluating(graph), evaluating(twin):
        pair = _Pair(graph, twin, list(batches(data, graph)))
        seen = Statistics({}, int(ranks.gathered([pair.samples]).sum()))
        for node in schedule(twin, wanted):
            own = pair.own.get(node.name)  # a twin has nodes more than the original: masks
            if own is not None:
                pair.original.run(own)
            reader = wanted.get(str(node.target)) if node.op == "call_module" else None
            if reader is not None:
                say(f"refitting {reader.layer}")
                moment, own_moment = _halves(pair.moment(node, reader, positions, seed).reduced())
                checked({reader.layer: moment})
                seen[reader.layer] = Moment(moment.count, moment.mean)
                choose = choosing.get(reader.layer)
                stays = choose(moment) if choose else alive(reader, deps, narrowing)
                found = fit(reader, moment, stays).judged(own_moment)
                _install(twin, found)
                yield found
            pair.twin.run(node)
            pair.twin.leave(node)
            if own is not None:
                pair.original.leave(own)
    warned(seen)


def downstream(
    deps: Dependencies, found: dict[str, Reader], loses: dict[str, Reader]
) -> dict[str, Reader]:
    """The layers from the first that loses an input on, called once each."""
    first = {r.calls[0] for r in loses.values()}
    changed = set()
    for node in deps.analysis.graph.graph.nodes:
        if node in first or any(n in changed for n in node.all_input_nodes):
            changed.add(node)
    return {
        n: r
        for n, r in found.items()
        if n in loses or (len(r.calls) == 1 and r.calls[0] in changed)
    }


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


class _Pair:
    """The original and its twin."""

    def __init__(self, graph: fx.GraphModule, twin: fx.GraphModule, data: list[Batch]) -> None:
        self.original, self.twin = Lane(graph, data), Lane(twin, data)
        self.own = {n.name: n for n in graph.graph.nodes}
        self.samples = sum(map(samples, data))

    def moment(self, node: fx.Node, reader: Reader, positions: Positions, seed: int) -> Moment:
        """Inputs that a layer sees in the twin, paired with the outputs that it should have.

        Behind these, as many outputs again: those of the original.
        """
        own, join, moment = self.own[node.name], join_behind(node), Moment()
        lanes = zip(self.original.values, self.twin.values, strict=True)
        for number, (before, after) in enumerate(lanes):
            x: Tensor = after[node.all_input_nodes[0]]
            wanted = self._enough(reader, x) if positions == "auto" else positions
            where = chosen_rows(reader, x, wanted, (seed, number))
            y = target = output_rows(reader.module, before[own], where)
            if join is not None and join.other in after:
                change = before[self.own[join.other.name]] - after[join.other]
                target = y + output_rows(reader.module, join.behind(change), where)
            both = [t.reshape(len(y), reader.groups, -1) for t in (target, y)]
            moment.add(input_rows(reader.module, x, where), torch.cat(both, dim=-1))
            if not moment.finite:
                raise FxsvdError(
                    f"{reader.layer} sees numbers that are not finite in batch {number} of the "
                    "data: check the data and the weights"
                )
        return moment

    def _enough(self, reader: Reader, x: Tensor) -> int:
        """Rows of every sample that suffice for a fit."""
        row = int(reader.entries().shape[1])
        fewest = math.ceil(ENOUGH * row / self.samples)
        return max(fewest, MORE * rows_per_sample(reader, x, "auto"))


def _halves(moment: Moment) -> tuple[Moment, Moment]:
    """The moments of the first half of the outputs, and of the second."""
    if moment.mean_y is None or moment.cross is None or moment.scatter_y is None:
        return moment, moment  # of no rows
    sides = zip(
        moment.mean_y.chunk(2, -1),
        moment.cross.chunk(2, 1),
        moment.scatter_y.chunk(2, -1),
        strict=True,
    )
    one, two = (replace(moment, mean_y=m, cross=c, scatter_y=s) for m, c, s in sides)
    return one, two
