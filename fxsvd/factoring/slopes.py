"""How steep the loss is in a layer's outputs: G^½, the root of its gradients' second moment."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fxsvd.linalg.svd import finite_matrix

DAMPING = 1e-3
"""Added to the second moment of gradients, relative to its mean: no direction counts as nothing."""


@dataclass(frozen=True, eq=False)
class Slopes:
    """G^½, which is never made: a multiple of the identity but for the directions of the gradients.

    Attributes:
        directions: of the gradients, orthonormal, ``[directions, m]``.
        sizes: of G^½ in these directions.
        rest: of G^½ in all others.

    >>> slopes = Slopes.of(torch.diag(torch.tensor([3.0, 4.0])))
    >>> slopes.half(torch.eye(2).double()).diagonal().round(decimals=1).tolist()
    [3.0, 4.0]
    """

    directions: Tensor
    sizes: Tensor
    rest: float

    @classmethod
    def of(cls, gradients: Tensor) -> Slopes:
        """From gradients of the loss in the outputs, uncentred, ``[rows, m]``.

        Raises:
            ValueError: numbers are not finite.
        """
        g = finite_matrix(gradients)
        g = torch.linalg.qr(g, mode="r").R if g.shape[0] > g.shape[1] else g
        _, s, vh = torch.linalg.svd(g, full_matrices=False)
        damping = DAMPING * float(s.square().sum()) / g.shape[1] or 1.0
        return cls(vh, (s.square() + damping).sqrt(), math.sqrt(damping))

    def half(self, rows: Tensor) -> Tensor:
        """Rows times G^½, ``[rows, m]``."""
        return self._times(rows, self.sizes, self.rest)

    def inverse(self, rows: Tensor) -> Tensor:
        """Rows times G^−½, ``[rows, m]``."""
        return self._times(rows, 1 / self.sizes, 1 / self.rest)

    def _times(self, rows: Tensor, sizes: Tensor, rest: float) -> Tensor:
        inside = (rows @ self.directions.T) * (sizes - rest)
        return rows * rest + inside @ self.directions
