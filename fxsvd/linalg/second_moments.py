"""Second moments R = E[x xᵀ] as matrices, or as roots where there are fewer rows than entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from fxsvd.linalg.svd import finite_matrix

RAISED = (1e-10, 1e-8, 1e-6, 1e-4, 1e-2)  # tried in turn where a ridge does not suffice
PIVOT = 1e-12  # the unexplained share of an input below which a system counts as singular


@dataclass(frozen=True, eq=False)
class Root:
    """A second moment R = ZᵀZ that is not multiplied out.

    Args:
        z: n×d, kept in float64.

    Raises:
        ValueError: not a matrix, or numbers are not finite.

    >>> root = Root(torch.tensor([[1.0, 2.0]]))
    >>> len(root), root.dense().tolist()
    (2, [[1.0, 2.0], [2.0, 4.0]])
    """

    z: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "z", finite_matrix(self.z))

    def __len__(self) -> int:
        return self.z.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Of R."""
        return len(self), len(self)

    def dense(self) -> Tensor:
        """R, d×d."""
        return self.z.T @ self.z

    def standardized(self) -> tuple[Root, Tensor]:
        """As ``standardize`` does."""
        norm = torch.linalg.vector_norm(self.z, dim=0)
        scale = torch.where(norm > 0, norm, torch.inf).reciprocal()
        return Root(self.z * scale), scale


SecondMoment: TypeAlias = Tensor | Root
AnySecondMoment = TypeVar("AnySecondMoment", Tensor, SecondMoment)


def restricted(r: SecondMoment, entries: Tensor) -> SecondMoment:
    """The second moment of some entries (indices, or d bools); multiplied out where that is less.

    >>> root = Root(torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]]))
    >>> restricted(root, torch.tensor([1, 2])).tolist()
    [[5.0, 6.0], [6.0, 9.0]]
    """
    if isinstance(r, Tensor):
        return r[entries][:, entries]
    columns = Root(r.z[:, entries])
    return columns if len(columns.z) < len(columns) else columns.dense()


def block_diagonal(moments: Sequence[SecondMoment], scales: Sequence[float]) -> SecondMoment:
    """Second moments of inputs that are unrelated, times numbers; a root where all are roots.

    >>> root = Root(torch.tensor([[1.0, 2.0]]))
    >>> block_diagonal([root, root], [1.0, 4.0]).z.tolist()
    [[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 2.0, 4.0]]
    """
    roots = [r.z * s**0.5 for r, s in zip(moments, scales, strict=True) if isinstance(r, Root)]
    if len(roots) == len(moments):
        return Root(torch.block_diag(*roots))
    dense = [r.dense() if isinstance(r, Root) else r for r in moments]
    out: Tensor = torch.block_diag(*(r * s for r, s in zip(dense, scales, strict=True)))
    return out


def standardize(r: AnySecondMoment) -> tuple[AnySecondMoment, Tensor]:
    """diag(s) R diag(s) with ones on its diagonal, and s.

    An input that never differs from zero has s = 0, so that it is unrelated to all others.

    >>> standardize(torch.tensor([[4.0, 1.0], [1.0, 1.0]]).double())[0][0].tolist()
    [1.0, 0.5]
    >>> standardize(Root(torch.tensor([[4.0, 0.0]])))[0].z.tolist()
    [[1.0, 0.0]]
    """
    if isinstance(r, Root):
        return cast(tuple[AnySecondMoment, Tensor], r.standardized())
    diagonal = r.diagonal()
    scale = torch.where(diagonal > 0, diagonal, torch.inf).rsqrt()
    matrix = r + r.T
    matrix *= 0.5 * scale[:, None]  # in place: r may be large
    matrix *= scale
    matrix.diagonal().fill_(1)
    return matrix, scale


def cholesky(matrix: Tensor, ridge: float) -> Tensor:
    """The lower factor of ``matrix`` + ridge·I, with a ridge raised until that is safely positive.

    Args:
        matrix: d×d with ones on its diagonal: squared pivots are unexplained shares of an input.
        ridge: the least ridge.

    Raises:
        ValueError: even a ridge of one percent leaves it indefinite.

    >>> cholesky(torch.eye(2), 3.0).diagonal().tolist()
    [2.0, 2.0]
    """
    return factored(matrix, ridge)[0]


def factored(matrix: Tensor, ridge: float) -> tuple[Tensor, float]:
    """The same, and the ridge that it took.

    >>> factored(torch.ones(2, 2).double(), 0.0)[1]
    1e-10
    """
    if not ridge >= 0:
        raise ValueError(f"ridge has to be 0 or more, but is {ridge}")
    for shift in (ridge, *(larger for larger in RAISED if larger > ridge)):
        shifted = matrix.clone()
        shifted.diagonal().add_(shift)
        lower, failed = torch.linalg.cholesky_ex(shifted)
        if not failed and bool((lower.diagonal().square() > PIVOT).all()):
            return torch.as_tensor(lower), shift
    raise ValueError("r is no second moment: a ridge of 1e-2 leaves it indefinite; check the data")
