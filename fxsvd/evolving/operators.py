"""Residual branches as linear operators: what their spectra say about width and depth.

A branch of two layers on a skip, x + B σ(A x), is linearised with σ taken as the identity: its
operator is Id + B A, the composed kernel (5×5 for two 3×3 convolutions) with the skip at the tap
where a pixel meets itself, matricised ``out × (in · taps)``. The rank of A and B says whether the
branch is needed (depth), that of the operator how many channels the stream needs (width), as
J. Dejaegher proposes (*SVD evolutive CNN*, 2021). Batch norms count with what they multiply by.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxsvd.data.readers import Reader, readers
from fxsvd.dependency import Dependencies
from fxsvd.evolving.branches import Branch
from fxsvd.rules.registry import spellings

SUMS: tuple[Any, ...] = (operator.add, operator.iadd, *spellings("add"))


@dataclass(frozen=True, eq=False)
class Residual:
    """A branch of two layers around which a skip leads.

    Attributes:
        first: the path of A.
        second: the path of B.
        operator: singular values of Id + B A, largest first, float64.
        a: singular values of A, matricised ``inner × (in · kernel)``.
        b: those of B, likewise.
    """

    first: str
    second: str
    operator: Tensor
    a: Tensor
    b: Tensor

    @property
    def name(self) -> str:
        """What the paths of both layers begin with; both where that is nothing.

        >>> Residual("layer1.0.conv1", "layer1.0.conv2", *[torch.ones(1)] * 3).name
        'layer1.0'
        """
        block, other = (path.rpartition(".")[0] for path in (self.first, self.second))
        return block if block and block == other else f"{self.first} and {self.second}"

    def advice(self, above: float = 1e-2) -> str:
        """In words, how many directions count.

        Args:
            above: relative to the largest singular value of each.

        >>> values = torch.tensor([2.0, 1.0, 0.01])
        >>> Residual("f", "g", values, values[:2], values).advice()
        'f and g: width by σ > 0.01 σ_max: 2 of 3; f has rank 2 of 2, g rank 2 of 3'
        """
        width, a, b = (f"{_rank(s, above)} of {len(s)}" for s in (self.operator, self.a, self.b))
        return (
            f"{self.name}: width by σ > {above:g} σ_max: {width}; "
            f"{self.first} has rank {a}, {self.second} rank {b}"
        )


def _rank(values: Tensor, above: float) -> int:
    return int((values > above * values[0]).sum())


def residual_spectra(deps: Dependencies) -> tuple[Residual, ...]:
    """The spectra of all residual branches of two linear layers or convolutions of stride 1.

    Between the two, before and behind them there may be activations, dropout and batch norms (in
    eval mode); the skip may hand on its input, tile it, or take a part. Other branches are left
    out, as nothing says what their linearisation is.

    Args:
        deps: what ``fxsvd.analyze`` found.

    Returns:
        In the order of execution; NaN where weights are not finite.

    >>> from fxsvd.capture import capture
    >>> from fxsvd.dependency import analyze
    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.a, self.b = nn.Conv2d(4, 2, 3, padding=1), nn.Conv2d(2, 4, 3, padding=1)
    ...     def forward(self, x):
    ...         return x + self.b(self.a(x).relu())
    >>> (found,) = residual_spectra(analyze(capture(Block(), torch.zeros(2, 4, 5, 5))))
    >>> found.advice()
    'a and b: width by σ > 0.01 σ_max: 4 of 4; a has rank 2 of 2, b rank 4 of 4'
    """
    graph = deps.analysis.graph
    plain = {r.calls[0]: r for r in readers(deps).values() if len(r.calls) == 1 and _fits(r)}
    out = []
    for node in graph.graph.nodes:
        if node.op.startswith("call_") and node.target in SUMS and _adds(node):
            for branch, skip in (node.args, node.args[::-1]):
                found = Branch.of(graph, plain, branch, skip)
                out += [_spectra(found)] if found is not None else []
    return tuple(out)


def _spectra(branch: Branch) -> Residual:
    matrices = (kernel.flatten(1) for kernel in (branch.operator(), *branch.kernels))
    values = (_singular_values(matrix) for matrix in matrices)
    first, second = branch.layers
    return Residual(first.layer, second.layer, *values)


def _singular_values(matrix: Tensor) -> Tensor:
    if not bool(matrix.isfinite().all()):
        return torch.full((min(matrix.shape),), torch.nan, dtype=torch.float64)
    values: Tensor = torch.linalg.svdvals(matrix)
    return values.cpu()


def _adds(node: fx.Node) -> bool:
    both = len(node.args) == 2 and all(isinstance(a, fx.Node) for a in node.args)
    return both and not node.kwargs


def _fits(reader: Reader) -> bool:
    layer: Any = reader.module
    strided = isinstance(layer, nn.Linear) or all(stride == 1 for stride in layer.stride)
    return reader.groups == 1 and strided
