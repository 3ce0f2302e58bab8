"""Factorising one layer after the other, each on what the layers before it have become.

The network and its factorised twin run side by side, a node at a time over all batches. A layer
whose input differs in the twin is fitted to the outputs that it has in the original, by
reduced-rank regression on the inputs that it gets (A. Izenman, *Reduced-Rank Regression*, 1975):
M is the fit of y to x̂, and its principal outputs are kept, U Uᵀ M. A layer whose input is the
original's is best as it is: the same formula, with M = W.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxsvd.calibrate import LARGEST, Positions, chosen_rows
from fxsvd.cost import evaluating
from fxsvd.data.batches import batches
from fxsvd.data.lanes import Lane
from fxsvd.data.readers import Reader, input_rows, output_rows
from fxsvd.factoring.candidates import Candidate, stacked
from fxsvd.factoring.maps import Metric, principal
from fxsvd.factoring.outputs import Outputs, checked
from fxsvd.linalg.low_rank import RIDGES, fit_near
from fxsvd.linalg.reconstruction import CONSTANT
from fxsvd.progress import Say, quiet
from fxsvd.substitution import build


def chained(
    graph: fx.GraphModule,
    chosen: Mapping[str, Candidate],
    data: Iterable[Any],
    *,
    positions: Positions = "auto",
    seed: int = 0,
    balanced: bool = False,
    say: Say = quiet,
) -> dict[str, Candidate]:
    """Splits by channel, of the same ranks, each fitted to what the splits before it leave.

    Args:
        graph: a captured graph; it runs in eval mode.
        chosen: by layer, the split that the layer gets by itself. It stays where the layer's input
            is the original's, and where a layer is called more than once.
        data: batches; all are held, with what is alive of their activations, twice.
        positions: rows per sample, see ``fxsvd.calibrate``.
        seed: of the choice of rows.
        balanced: give both factors equal norms.
        say: is told how far it is.

    Raises:
        FxsvdError: there is no batch, or a layer's rows are not finite.

    >>> from fxsvd.capture import capture
    >>> chained(capture(nn.Sequential(nn.Linear(3, 4)), torch.zeros(2, 3)), {}, [torch.ones(5, 3)])
    {}
    """
    held, out = list(batches(data, graph)), dict(chosen)
    with torch.no_grad(), evaluating(graph):
        pair, changed = (Lane(graph, held), Lane(graph, held)), set[fx.Node]()
        for node in graph.graph.nodes:
            own, twin = pair
            own.run(node)
            layer = str(node.target) if node.op == "call_module" else ""
            differs = not changed.isdisjoint(node.all_input_nodes)
            if layer in chosen and differs and len(chosen[layer].reader.calls) == 1:
                say(f"factorizing {layer} on what it gets")
                rows = _rows(node, chosen[layer].reader, pair, positions, seed)
                out[layer] = refitted_to_rows(chosen[layer], rows, balanced)
            if layer in chosen:
                _substituted(node, out[layer], twin)
            else:
                twin.run(node)
            if differs or layer in chosen:
                changed.add(node)
            for lane in pair:
                lane.leave(node)
    return out


def _rows(
    node: fx.Node, reader: Reader, pair: tuple[Lane, Lane], positions: Positions, seed: int
) -> Outputs:
    """Rows of what a layer reads in the twin beside those that it puts out in the original."""
    seen, (own, twin) = Outputs(), pair
    for number, (before, after) in enumerate(zip(own.values, twin.values, strict=True)):
        x: Tensor = after[node.all_input_nodes[0]]
        every = chosen_rows(reader, x, positions, (seed, number))
        for where in every.split(max(1, LARGEST // reader.entries().size)):
            y = output_rows(reader.module, before[node], where)
            both = [input_rows(reader.module, x, where), y.reshape(len(y), reader.groups, -1)]
            seen.add(torch.cat(both, dim=2))
    return checked(reader.layer, seen.reduced())


def _substituted(node: fx.Node, candidate: Candidate, twin: Lane) -> None:
    """What the twin computes in place of a layer."""
    like = candidate.reader.weight.value
    chain = nn.Sequential(*(build(part, like) for part in candidate.parts())).eval()
    for values in twin.values:
        values[node] = chain(values[node.all_input_nodes[0]])


def refitted_to_rows(candidate: Candidate, seen: Outputs, balanced: bool = False) -> Candidate:
    """A split by channel of the same rank, fitted to rows of other inputs.

    Args:
        candidate: by channel.
        seen: rows of the layer's input, and of the output it should have, side by side.
        balanced: give both factors equal norms.

    >>> from fxsvd.factoring.candidates import by_channel
    >>> from fxsvd.factoring.maps import Map
    >>> from fxsvd.folding.plain import reader_of
    >>> layer, seen = reader_of(nn.Linear(2, 2), torch.zeros(2, 2)), Outputs()
    >>> one = torch.ones(2, 1)
    >>> candidate = by_channel(layer, [Map(one, one.T, one.T)], None, None)
    >>> x = torch.randn(9, 1, 1)
    >>> seen.add(torch.cat([x, 0 * x, 2 * x, 3 * x], 2))
    >>> refitted_to_rows(candidate, seen).error < 1e-9
    True
    """
    assert seen.mean is not None  # checked
    reader, rank = candidate.reader, candidate.rank[0]
    wide = int(reader.entries().shape[1])
    maps, lost, total = [], 0.0, 0.0
    for w, x, y in _varying(seen, wide, reader.matrices()):
        m = fit_near(x, y, w, seen.count, RIDGES)
        found = principal(m, Metric(x @ m.T), rank)
        lost += float((y - (x @ found.right.T) @ found.left.T).square().sum())
        total += float(y.square().sum())
        maps.append(found.balanced() if balanced else found)
    mean_x, mean_y = seen.mean[:, :wide], seen.mean[:, wide:]
    means = zip(maps, mean_x, mean_y, strict=True)
    bias = torch.cat([to - f.left @ (f.right @ of) for f, of, to in means])
    error = lost / total if total else 0.0
    kernels = stacked(reader, maps)
    return replace(candidate, kernels=kernels, bias=bias, error=error, predicted=error)


def _varying(seen: Outputs, wide: int, w: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Weights and roots of inputs and outputs, group by group; inputs that stay the same are 0."""
    assert seen.mean is not None  # checked
    assert seen.root is not None
    for matrix, root, mean in zip(w, seen.root, seen.mean, strict=True):
        x = root[:, :wide]
        spread = x.square().sum(0)
        varies = spread > CONSTANT * (spread + seen.count * mean[:wide].square())
        yield matrix, x * varies, root[:, wide:]
