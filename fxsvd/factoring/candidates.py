"""What could take a layer's place: its weight in several parts, fitted to data where there is any.

A ``channel`` split is a map of the layer's outputs (``fxsvd.factoring.maps``), optimal on data in
closed form. The other kinds are found from the weight alone; on data their last part is fitted
again by least squares to what the parts before it give.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxsvd.data.readers import Reader
from fxsvd.edits import Part
from fxsvd.factoring.maps import Map, Metric
from fxsvd.factoring.outputs import Outputs
from fxsvd.factoring.splitting import SPLITS, Rank, parts, product
from fxsvd.linalg.svd import finite_matrix

RIDGE = 1e-6
"""Of a refit, relative to the mean energy of what it reads."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """Layers that could replace a reader.

    Attributes:
        reader: the layer.
        kind: of the split, see ``fxsvd.factoring.splitting``.
        rank: channels between the parts.
        kernels: weights of the parts in order of application.
        bias: of the last part, or None.
        error: what is lost, to compare candidates of a layer: of the outputs' variance where they
            are fitted to data, else of ‖W‖².
        predicted: what is lost of the outputs' variance, where that is known.
    """

    reader: Reader
    kind: str
    rank: Rank
    kernels: tuple[Tensor, ...]
    bias: Tensor | None
    error: float
    predicted: float | None = None

    def parts(self) -> tuple[Part, ...]:
        """The layers as data."""
        return parts(self.reader.module, self.kind, self.kernels, self.bias)


def weight_metrics(reader: Reader) -> list[Metric]:
    """A metric per group in which an error is one of the weight.

    >>> from fxsvd.folding.plain import reader_of
    >>> from torch import nn
    >>> [m.root.shape for m in weight_metrics(reader_of(nn.Linear(3, 2), torch.zeros(2, 3)))]
    [torch.Size([3, 2])]
    """
    weight = reader.weight.value.detach()  # a view: in float64 only while it is decomposed
    return [Metric(w.T) for w in weight.reshape(reader.groups, len(weight) // reader.groups, -1)]


def data_metrics(outputs: Outputs) -> list[Metric]:
    """A metric per group in which an error is one of outputs, on data.

    >>> seen = Outputs()
    >>> seen.add(torch.ones(5, 1, 2))
    >>> len(data_metrics(seen))
    1
    """
    assert outputs.root is not None  # checked by watch
    return [Metric(root) for root in outputs.root]


def by_channel(
    reader: Reader,
    maps: Sequence[Map],
    metrics: Sequence[Metric] | None,
    mean: Tensor | None,
) -> Candidate:
    """A split of every group by a map of its outputs.

    Args:
        reader: the layer.
        maps: one per group, of one rank.
        metrics: one per group, to judge them in; None where nobody compares.
        mean: of the outputs on data, ``[groups, out]``, to keep by the bias; None leaves the bias.

    >>> from fxsvd.folding.plain import reader_of
    >>> from torch import nn
    >>> layer = reader_of(nn.Linear(3, 2), torch.zeros(2, 3))
    >>> one, zero = torch.ones(1, 2), torch.zeros(1, 3)
    >>> by_channel(layer, [Map(one.T, one, zero)], None, None).rank
    (1,)
    """
    bias = _own_bias(reader)
    if mean is not None:
        own = torch.zeros_like(mean) if bias is None else bias.reshape(mean.shape)
        moved = [m.moved(a) for m, a in zip(maps, mean - own, strict=True)]
        bias = (own + torch.stack(moved)).flatten()
    error = _lost(maps, metrics) if metrics else 0.0
    predicted = error if mean is not None else None
    kernels = stacked(reader, maps)
    return Candidate(reader, "channel", (maps[0].rank,), kernels, bias, error, predicted)


def stacked(reader: Reader, maps: Sequence[Map]) -> tuple[Tensor, Tensor]:
    """The kernels of a split by channel, from the factors of every group.

    >>> from fxsvd.folding.plain import reader_of
    >>> from torch import nn
    >>> layer = reader_of(nn.Conv1d(3, 2, 5), torch.zeros(2, 3, 9))
    >>> one = torch.ones(2, 1)
    >>> [list(k.shape) for k in stacked(layer, [Map(one, one.T, torch.zeros(1, 15))])]
    [[1, 3, 5], [2, 1, 1]]
    """
    kernel = reader.weight.value.shape[2:]
    first = torch.cat([m.right for m in maps])
    last = torch.cat([m.left for m in maps])
    into = first.shape[1] // math.prod(kernel)
    return (
        first.reshape(-1, into, *kernel),
        last.reshape(-1, maps[0].rank, *(1 for _ in kernel)),
    )


def _lost(maps: Sequence[Map], metrics: Sequence[Metric]) -> float:
    sizes = [float(metric.root.double().square().sum()) for metric in metrics]
    errors = [m.error(metric.root) for m, metric in zip(maps, metrics, strict=True)]
    lost = sum(e * size for e, size in zip(errors, sizes, strict=True))
    return lost / sum(sizes) if sum(sizes) else 0.0


def _own_bias(reader: Reader) -> Tensor | None:
    bias = reader.module.bias
    return bias.detach().double() if isinstance(bias, Tensor) else None


def by_kernel(reader: Reader, kind: str, rank: Rank, seed: int) -> Candidate:
    """A split of every group's kernel by the weight alone.

    >>> from fxsvd.folding.plain import reader_of
    >>> from torch import nn
    >>> layer = reader_of(nn.Conv2d(4, 2, 3), torch.zeros(2, 4, 8, 8))
    >>> [tuple(k.shape) for k in by_kernel(layer, "spatial", (1,), 0).kernels]
    [(1, 4, 3, 1), (2, 1, 1, 3)]
    """
    weight = reader.weight.value.detach()
    finite_matrix(weight.flatten(1))
    groups = weight.double().reshape(reader.groups, -1, *weight.shape[1:])
    found = [SPLITS[kind](w, rank, seed) for w in groups]
    pairs = zip(groups, found, strict=True)
    lost = sum(float((w - product(kind, kernels)).square().sum()) for w, kernels in pairs)
    total = float(groups.square().sum())
    kernels = tuple(torch.cat(stage) for stage in zip(*found, strict=True))
    error = lost / total if total else 0.0
    return Candidate(reader, kind, rank, kernels, _own_bias(reader), error)


def refitted(candidate: Candidate, seen: Outputs) -> Candidate:
    """The same with the last part fitted to data.

    Args:
        candidate: of any kind.
        seen: rows of that part's input and of the layer's output, side by side.

    >>> from fxsvd.folding.plain import reader_of
    >>> from torch import nn
    >>> conv = reader_of(nn.Conv1d(2, 2, 2), torch.zeros(2, 2, 8))
    >>> candidate, seen = by_kernel(conv, "tucker", (1, 1), 0), Outputs()
    >>> y = torch.randn(9, 1, 1)
    >>> seen.add(torch.cat([y, 2 * y, 3 * y], 2))  # the output is twice and three times the input
    >>> refitted(candidate, seen).kernels[-1].flatten().mul(10).round().tolist()
    [20.0, 30.0]
    """
    assert seen.root is not None  # checked by watch
    assert seen.mean is not None
    last, groups = candidate.kernels[-1], candidate.reader.groups
    old = last.reshape(groups, len(last) // groups, -1)
    wide = old.shape[2]
    new, lost, total = [], 0.0, 0.0
    for matrix, root in zip(old, seen.root, strict=True):
        x, y = root[:, :wide], root[:, wide:]
        new.append(matrix + _least_squares(x, y - x @ matrix.T))
        lost += float((y - x @ new[-1].T).square().sum())
        total += float(y.square().sum())
    fitted = torch.stack(new)
    mean = seen.mean
    bias = mean[:, wide:] - (fitted @ mean[:, :wide, None]).squeeze(-1)
    kernels = (*candidate.kernels[:-1], fitted.reshape(last.shape))
    error = lost / total if total else 0.0
    bias = bias.flatten()
    return replace(candidate, kernels=kernels, bias=bias, error=error, predicted=error)


def _least_squares(x: Tensor, y: Tensor) -> Tensor:
    """The M that minimises ‖y − x Mᵀ‖² + ε‖M‖², from rows."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    ridge = RIDGE * float(s.square().mean()) + torch.finfo(torch.float64).tiny
    m: Tensor = (y.T @ u) * (s / (s.square() + ridge)) @ vh
    return m
