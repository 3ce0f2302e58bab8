"""Changes of basis across linear edges: which one, and what it makes of every map's numbers.

Values z of an edge become E z, consumers read W D (E z). With C the covariance of z and G = Σ WᵀW
over the consumers, D E minimises the consumers' output error (``linalg.low_rank.projection``); E is
brought to orthonormal rows, so that values keep their size. Only what E spans matters then: each
consumer is fitted to E z by least squares, which is D where D is best already.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fxsvd.analysis import Parameter
from fxsvd.calibrate import Positions, checked, chosen_rows
from fxsvd.cost import evaluating
from fxsvd.data.batches import batches
from fxsvd.data.moments import Moment
from fxsvd.data.readers import Reader, input_rows
from fxsvd.dependency import Dependencies
from fxsvd.linalg.low_rank import projection
from fxsvd.progress import Say, quiet
from fxsvd.relations import Atoms
from fxsvd.rotating.edges import Edge, bias_name, input_of, is_layer, places
from fxsvd.running import placed
from fxsvd.selecting.fit import Fit, fit, own_output


@dataclass(frozen=True, eq=False)
class Basis:
    """New coordinates for a block of channels, of which the first few stay.

    Attributes:
        channels: the block.
        encode: E, d×d; rows behind the rank do not matter.
        decode: D, d×d; columns behind the rank are zero.
        rank: how many coordinates stay.
    """

    channels: Atoms
    encode: Tensor
    decode: Tensor
    rank: int


def mixed(value: Tensor, axis: int, where: Tensor, matrix: Tensor) -> Tensor:
    """A tensor with a matrix applied along an axis.

    Args:
        value: any shape.
        axis: along which.
        where: the entries that are mixed, ``[d, times]``: each column by itself.
        matrix: d×d.

    >>> swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> mixed(torch.tensor([5.0, 6.0, 7.0]), 0, torch.tensor([[0], [2]]), swap).tolist()
    [7.0, 6.0, 5.0]
    """
    turned = value.movedim(axis, 0).clone()
    turned[where] = torch.tensordot(matrix.to(value.dtype), turned[where], dims=1)
    return turned.movedim(0, axis)


def best_basis(
    edge: Edge, block: Atoms, rank: int, moments: Mapping[str, Moment], *, by_outputs: bool = True
) -> Basis:
    """The basis whose first coordinates matter most.

    Args:
        edge: the edge.
        block: one of its blocks.
        rank: how many coordinates stay.
        moments: of the inputs of the edge's consumers.
        by_outputs: to the consumers' outputs, each relative to its own variance; else to the
            values themselves (principal components).
    """
    covariance, gram = _seen(edge, block, moments)
    found = projection(covariance, rank, gram=gram if by_outputs else None)
    q, r = torch.linalg.qr(found.encode.T, mode="complete")
    decode = torch.zeros_like(q)
    decode[:, :rank] = found.decode @ r[:rank].T if rank < len(q) else q
    return Basis(block, q.T, decode, rank)


def _seen(edge: Edge, block: Atoms, moments: Mapping[str, Moment]) -> tuple[Tensor, Tensor]:
    """The mean covariance of the block over all that read it, and their Gram matrix."""
    covariance = torch.zeros(len(block), len(block), dtype=torch.float64)
    gram, count = torch.zeros_like(covariance), 0
    for reader in edge.consumers:
        w, seen = reader.matrices()[0].cpu(), moments[reader.layer].covariance[0].cpu()
        energy = max(float(((w @ seen) * w).sum()), 1e-300)
        for where in places(reader.entries()[0], block).T:
            covariance += seen[where][:, where]
            gram += w[:, where].T @ w[:, where] / energy
            count += 1
    return covariance / count, gram


def refitted(reader: Reader, bases: Sequence[Basis], moment: Moment) -> Fit:
    """A consumer that reads new coordinates; those that go have weights of zero.

    Args:
        reader: the map, one group.
        bases: of all the blocks among its inputs whose basis changes.
        moment: of its inputs.
    """
    entries, w = reader.entries()[0], reader.matrices()[0]
    device = w.device
    alive = np.ones((1, len(entries)), dtype=bool)
    seen = own_output(reader, moment)
    assert seen.mean is not None  # of inputs
    assert seen.scatter is not None
    assert seen.cross is not None  # paired
    mean, scatter, cross = seen.mean, seen.scatter, seen.cross
    for basis in bases:
        where = places(entries, basis.channels).to(device)
        encode, decode = basis.encode.to(device), basis.decode.to(device)
        w = mixed(w, 1, where, decode.T)
        mean, cross = (mixed(m, m.dim() - 1, where, encode) for m in (mean, cross))
        scatter = mixed(mixed(scatter, 1, where, encode), 2, where, encode)
        alive[:, where[basis.rank :].flatten().cpu().numpy()] = False
    weight = Parameter(reader.weight.names, w, reader.weight.type)
    turned = Moment(seen.count, mean, scatter, seen.mean_y, cross, seen.scatter_y)
    if alive.all():
        bias: Tensor | None = reader.module.bias  # type: ignore[assignment]  # of a linear map
        same = w.new_zeros(len(w)) if bias is None else bias.detach().double()
        return Fit(reader, w.unsqueeze(0), same, 0.0)
    found = fit(replace(reader, weight=weight), turned, alive)
    return replace(found, reader=reader)


def new_values(
    deps: Dependencies, bases: Sequence[tuple[Edge, Basis]], fits: Iterable[Fit]
) -> dict[str, Tensor]:
    """What the parameters of all maps become: consumers as they are fitted, producers encoded.

    Args:
        deps: the analysis.
        bases: the new bases.
        fits: of all consumers of their edges.

    Returns:
        New numbers by the parameter's first name, in full shapes.
    """
    values: dict[str, Tensor] = {}
    for found in fits:
        if is_layer(found.reader):
            values |= {a.parameter: a.value for a in found.assigns(deps.analysis.graph)}
        else:
            bias = bias_name(deps, found.reader.calls[0])
            values |= {found.reader.weight.names[0]: found.weight(), bias: found.intercept}
    for edge, basis in bases:
        for reader in edge.producers:
            _encode(deps, reader, basis, values)
    return values


def _encode(deps: Dependencies, reader: Reader, basis: Basis, values: dict[str, Tensor]) -> None:
    atoms = reader.weight.type.vector(0)
    assert atoms is not None  # a map of one group
    where = places(deps.channels.of[atoms], basis.channels)
    bias = bias_name(deps, reader.calls[0])
    added = f"{reader.layer}.bias"  # where a layer had none, a fit may have given it one
    names = dict.fromkeys((reader.weight.names[0], bias, added if added in values else ""))
    for name in filter(None, names):
        before = values.get(name)
        if before is None:
            before = deps.analysis.by_name(name).value.detach().double()
        device = before.device
        values[name] = mixed(before, 0, where.to(device), basis.encode.to(device))


def input_moments(
    deps: Dependencies,
    wanted: Iterable[Reader],
    data: Iterable[Any],
    *,
    positions: Positions = "auto",
    seed: int = 0,
    say: Say = quiet,
) -> dict[str, Moment]:
    """Moments of the inputs of maps, also where they are calls of ``F.linear``.

    Args:
        deps: the analysis.
        wanted: the maps.
        data: batches, see ``fxsvd.data.batches``.
        positions: rows per sample, see ``fxsvd.calibrate``.
        seed: of the choice of rows.
        say: is told how far it is.

    Raises:
        FxsvdError: there is no batch, or a map sees numbers that are not finite.
    """
    graph = deps.analysis.graph
    watch = _Watch(graph, {call: reader for reader in wanted for call in reader.calls})
    with torch.no_grad(), evaluating(graph):
        for number, batch in enumerate(batches(data, graph)):
            say(f"calibrating: batch {number + 1}")
            watch.settings = positions, (seed, number)
            watch.run(*placed(graph, batch))
    return checked({name: moment.reduced() for name, moment in watch.moments.items()})


class _Watch(fx.Interpreter):
    """Runs a graph and adds up the moments of what some of its nodes are given."""

    def __init__(self, graph: fx.GraphModule, calls: dict[fx.Node, Reader]) -> None:
        super().__init__(graph)
        self.calls = calls
        self.moments = {reader.layer: Moment() for reader in calls.values()}
        self.settings: tuple[Positions, tuple[int, int]] = ("auto", (0, 0))

    def run_node(self, n: fx.Node) -> Any:
        """Look at a node's input, then run it."""
        reader = self.calls.get(n)
        if reader is not None:
            x = self.env[input_of(n)]
            where = chosen_rows(reader, x, *self.settings)
            self.moments[reader.layer].add(input_rows(reader.module, x, where))
        return super().run_node(n)
