"""Turning a residual stream into fewer channels: the basis, and what all that touches it becomes.

The mathematics is that of S. Ashkboos et al., *SliceGPT*, 2024. An E of orthonormal rows projects
what is added to the stream, Eᵀ what is read off it. A norm over k in place of d channels sees the
same sum of squares in fewer numbers and gives values √(k/d) as large: readers multiply by √(d/k).
Where norms subtract the mean, one dimension of the k is kept for that: E maps onto vectors that sum
to zero, so that a LayerNorm stays a LayerNorm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fxsvd.cost import evaluating
from fxsvd.data import ranks
from fxsvd.data.batches import batches
from fxsvd.data.readers import Reader
from fxsvd.dependency import Dependencies
from fxsvd.relations import Atoms
from fxsvd.rotating.bases import mixed
from fxsvd.rotating.edges import bias_name, input_of, places
from fxsvd.rotating.streams import Norm, Stream
from fxsvd.running import placed


def encoder(second: Tensor, width: int, *, centred: bool) -> Tensor:
    """E with orthonormal rows (or, where means are zero, as nearly so as that allows).

    Args:
        second: E[x xᵀ] of what is projected, d×d.
        width: k, how many rows.
        centred: inputs have a mean of zero and outputs shall: E 1 = 0 and 1ᵀ E = 0, rank k - 1.

    >>> e = encoder(torch.diag(torch.tensor([1.0, 3.0, 2.0])).double(), 2, centred=False)
    >>> e.abs().tolist()
    [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    if not centred:
        axes: Tensor = torch.linalg.eigh(second).eigenvectors.flip(1)
        return axes[:, :width].T
    before, after = zero_sum_basis(len(second)), zero_sum_basis(width)
    inner: Tensor = torch.linalg.eigh(before.T @ second @ before).eigenvectors.flip(1)
    return after @ (before @ inner[:, : width - 1]).T


def zero_sum_basis(size: int) -> Tensor:
    """An orthonormal basis of the vectors that sum to zero, ``[size, size - 1]`` (Helmert's).

    >>> zero_sum_basis(3).sum(0).abs().max().item() < 1e-15
    True
    """
    basis = torch.zeros(size, size - 1, dtype=torch.float64)
    for j in range(1, size):
        basis[:j, j - 1], basis[j, j - 1] = 1, -j
        basis[:, j - 1] /= math.sqrt(j * (j + 1))
    return basis


def turn(
    deps: Dependencies, stream: Stream, encode: Tensor, width: int, values: dict[str, Tensor]
) -> None:
    """New numbers for all that writes, normalizes or reads a stream.

    Args:
        deps: the analysis.
        stream: the stream.
        encode: E, ``[width, d]``.
        width: k.
        values: new numbers by the parameter's first name, in full shapes; added to.
    """
    d, channels = stream.space.width, stream.space.channels
    square = torch.zeros(d, d, dtype=torch.float64)
    square[:width] = encode
    for reader, norm in stream.readers.values():
        scale = 1.0 if norm is None else math.sqrt(d / width)
        _read(deps, reader, norm, scale * square, channels, values)
    for norm in stream.norms:
        for name, number in ((norm.weight, 1.0), (norm.bias, 0.0)):
            if name:
                values[name] = torch.full_like(_value(deps, name, values), number)
    for name, dim in stream.writers:
        where = _places(deps, name, dim, channels)
        for each in (name, _added_bias(deps, name, values)):
            if each:
                axis = dim if each == name else 0
                values[each] = mixed(_value(deps, each, values), axis, where, square)


def _read(
    deps: Dependencies,
    reader: Reader,
    norm: Norm | None,
    encode: Tensor,
    channels: Atoms,
    values: dict[str, Tensor],
) -> None:
    """A map of the new coordinates, with the gain and the bias of the norm before it."""
    name = reader.weight.names[0]
    weight = _value(deps, name, values)
    flat = weight.reshape(len(weight), -1)
    where = places(reader.entries()[0], channels)
    if norm is not None and norm.bias:
        bias = bias_name(deps, reader.calls[0]) or f"{reader.layer}.bias"
        held = bias in _names(deps) or bias in values
        before = _value(deps, bias, values) if held else flat.new_zeros(len(flat))
        values[bias] = before + flat[:, where[:, 0]] @ _own(deps, norm.bias, channels)
    if norm is not None and norm.weight:
        flat = flat.clone()
        flat[:, where[:, 0]] *= _own(deps, norm.weight, channels)
    values[name] = mixed(flat, 1, where, encode).reshape(weight.shape)


def _own(deps: Dependencies, name: str, channels: Atoms) -> Tensor:
    """A norm's numbers, in the order of the space's channels."""
    return _value(deps, name, {})[_places(deps, name, 0, channels)[:, 0]]


def _value(deps: Dependencies, name: str, values: Mapping[str, Tensor]) -> Tensor:
    known = values.get(name)
    return deps.analysis.by_name(name).value.detach().double().cpu() if known is None else known


def _names(deps: Dependencies) -> set[str]:
    return {p.names[0] for p in deps.analysis.parameters.values()}


def _added_bias(deps: Dependencies, weight: str, values: Mapping[str, Tensor]) -> str:
    """The bias that a layer got because a norm had one; empty where it had one of its own."""
    name = f"{weight.removesuffix('.weight')}.bias"
    return name if weight.endswith(".weight") and name in values.keys() - _names(deps) else ""


def _places(deps: Dependencies, name: str, dim: int, channels: Atoms) -> Tensor:
    known = deps.analysis.by_name(name)
    atoms = known.type.vector(dim)
    assert atoms is not None  # of maps of one group, norms and parameters of one kind of channel
    return places(deps.channels.of[atoms], channels)


def second_moments(
    deps: Dependencies, found: Sequence[Stream], data: Iterable[Any]
) -> list[Tensor]:
    """E[x xᵀ] of every stream, each token relative to its size, the mean over all norms' inputs.

    Args:
        deps: the analysis.
        found: the streams.
        data: batches, see ``fxsvd.data.batches``.
    """
    graph = deps.analysis.graph
    watch = _Watch(graph, {norm.node: norm for stream in found for norm in stream.norms})
    with torch.no_grad(), evaluating(graph):
        for batch in batches(data, graph) if found else ():
            watch.run(*placed(graph, batch))
    seen = [[watch.mean(norm.node) for norm in stream.norms] for stream in found]
    return [
        _ordered(deps, s, torch.stack(parts).mean(0)) for s, parts in zip(found, seen, strict=True)
    ]


def _ordered(deps: Dependencies, stream: Stream, second: Tensor) -> Tensor:
    """From the order of the norms' axis to that of the space's channels."""
    t = deps.analysis.types[stream.norms[0].node]
    atoms = t.vector(len(t.shape) - 1)
    where = places(deps.channels.of[atoms], stream.space.channels)[:, 0]
    return second[where][:, where]


class _Watch(fx.Interpreter):
    """Runs a graph and adds up the second moments of what norms make of their inputs."""

    def __init__(self, graph: fx.GraphModule, norms: Mapping[fx.Node, Norm]) -> None:
        super().__init__(graph)
        self.norms = norms
        widths = {n: input_of(n).meta["val"].shape[-1] for n in norms}
        self.sums = {n: torch.zeros(w, w, dtype=torch.float64) for n, w in widths.items()}
        self.counts = dict.fromkeys(norms, 0)

    def run_node(self, n: fx.Node) -> Any:
        """Look at a norm's input, then run it."""
        if n in self.norms:
            x = self.env[input_of(n)]
            rows = x.reshape(-1, x.shape[-1]).double()
            normed = F.layer_norm if self.norms[n].centred else F.rms_norm
            rows = normed(rows, rows.shape[-1:])
            self.sums[n] += (rows.T @ rows).cpu()
            self.counts[n] += len(rows)
        return super().run_node(n)

    def mean(self, n: fx.Node) -> Tensor:
        """The second moments of a norm's rows, over all ranks."""
        return ranks.summed(self.sums[n]) / float(ranks.gathered([self.counts[n]]).sum())
