"""A layer in two factors: W ≈ L (P W), a map T = L P of what the layer puts out.

The singular value decomposition on data, the one of the weights, the one weighted by gradients and
every CUR whose right factor is rows of W are such maps, so that one root Z of the outputs'
covariance (``fxsvd.factoring.outputs``) judges all of them: they lose ‖Z − Z Tᵀ‖² of ‖Z‖². The
metric of the weights themselves is Z = Wᵀ.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fxsvd.factoring.slopes import Slopes
from fxsvd.linalg.cur import METHODS as CURS
from fxsvd.linalg.interpolation import best_left, fit_rows, pivoted_qr
from fxsvd.linalg.svd import finite_matrix, truncated_svd

METHODS = ("svd", "gradient", *CURS)


class Map(NamedTuple):
    """L (m×k) and P (k×m), and the right factor P W (k×n) of a layer.

    >>> Map(torch.ones(3, 1), torch.ones(1, 3), torch.ones(1, 2)).rank
    1
    """

    left: Tensor
    pick: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """The number of components, k."""
        return self.left.shape[1]

    def balanced(self) -> Map:
        """The same map with factors of equal norms, component by component."""
        a = torch.linalg.vector_norm(self.left, dim=0)
        b = torch.linalg.vector_norm(self.right, dim=1)
        scale = torch.where((a > 0) & (b > 0), (b / a).sqrt(), 1.0)
        rest = (self.pick / scale[:, None], self.right / scale[:, None])
        return Map(self.left * scale, *rest)

    def error(self, root: Tensor) -> float:
        """What is lost of outputs with that root, relative: ‖Z − Z Tᵀ‖² / ‖Z‖².

        >>> keep = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        >>> Map(keep.T, keep, keep).error(torch.diag(torch.tensor([2.0, 1.0])).double())
        0.2
        """
        root = root.double()
        total = float(root.square().sum())
        rest = root - (root @ self.pick.T) @ self.left.T
        return float(rest.square().sum()) / total if total else 0.0

    def moved(self, mean: Tensor) -> Tensor:
        """(I − T) mean: what a bias has to make up for."""
        return mean - self.left @ (self.pick @ mean)


@dataclass(frozen=True, eq=False)
class Metric:
    """What counts as an error of a layer's outputs.

    Attributes:
        root: Z, ``[rows, m]``: rows of outputs, or the columns of the weight.

    >>> Metric(torch.diag(torch.tensor([3.0, 4.0]))).spectrum.tolist()
    [4.0, 3.0]
    """

    root: Tensor

    @cached_property
    def _svd(self) -> tuple[Tensor, Tensor]:
        root = finite_matrix(self.root)
        if root.shape[0] > root.shape[1]:
            root = torch.linalg.qr(root, mode="r").R
        _, s, vh = torch.linalg.svd(root, full_matrices=False)
        return s, vh.T

    @property
    def spectrum(self) -> Tensor:
        """Singular values of the root, descending."""
        return self._svd[0]

    @property
    def directions(self) -> Tensor:
        """Principal directions of the outputs, ``[m, min(rows, m)]``, of most energy first."""
        return self._svd[1]

    def tail(self, rank: int) -> float:
        """The relative squared error of the best map of a rank.

        >>> Metric(torch.diag(torch.tensor([2.0, 1.0]))).tail(1)
        0.2
        """
        energy = self.spectrum.square()
        total = float(energy.sum())
        return float(energy[rank:].sum()) / total if total else 0.0


def principal(w: Tensor, metric: Metric, rank: int) -> Map:
    """Onto the principal outputs, U Uᵀ W: of all maps the one that loses least.

    Where the metric spans fewer directions than are asked for, those follow that matter most to
    the rest of the weight.

    Args:
        w: the weight, m×n.
        metric: of its outputs.
        rank: k.

    >>> found = principal(torch.eye(2), Metric(torch.diag(torch.tensor([1.0, 3.0]))), 1)
    >>> found.right.abs().tolist()
    [[0.0, 1.0]]
    """
    w = finite_matrix(w)
    u = metric.directions[:, :rank]
    if u.shape[1] < rank:
        rest = w - u @ (u.T @ w)
        more = truncated_svd(rest, rank - u.shape[1])[0]
        u = torch.linalg.qr(torch.cat([u, more], dim=1)).Q
    return Map(u, u.T, u.T @ w)


def weighted(w: Tensor, slopes: Slopes, seen: Metric, rank: int) -> Map:
    """The map that loses least of the outputs as the loss sees them: E (y − ŷ)ᵀ G (y − ŷ).

    Args:
        w: the weight, m×n.
        slopes: G^½.
        seen: the metric of the outputs times that, see ``steep``.
        rank: k.

    >>> slopes = Slopes.of(torch.diag(torch.tensor([9.0, 1.0])))
    >>> _, seen = steep(Metric(torch.diag(torch.tensor([1.0, 2.0]))), slopes)
    >>> weighted(torch.eye(2), slopes, seen, 1).right.abs().argmax().item()
    0
    """
    w, u = finite_matrix(w), seen.directions[:, :rank]
    if u.shape[1] < rank:
        u = principal(slopes.half(w.T).T, seen, rank).left
    pick = slopes.half(u.T)
    return Map(slopes.inverse(u.T).T, pick, pick @ w)


def steep(metric: Metric, slopes: Slopes) -> tuple[Slopes, Metric]:
    """For the method ``"gradient"``: G^½, and a metric of outputs times that.

    >>> steep(Metric(torch.eye(2)), Slopes.of(torch.eye(2)))[1].spectrum.round(decimals=2).tolist()
    [1.0, 1.0]
    """
    return slopes, Metric(slopes.half(metric.root.double()))


def own_rows(w: Tensor, metric: Metric, rank: int, method: str, seed: int, on_data: bool) -> Map:
    """A layer through some of its own outputs (CUR), chosen and fitted in a metric.

    In the metric of the weights it is C U with the columns C of W that the method chooses, on data
    the best fit to the chosen outputs, which stay exact.

    Args:
        w: the weight, m×n.
        metric: of its outputs; that of the weights where not ``on_data``.
        rank: k.
        method: a key of ``fxsvd.linalg.cur.METHODS``.
        seed: of the methods that draw.
        on_data: see above.

    >>> w = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    >>> own_rows(w, Metric(w.T), 1, "qr", 0, False).right.tolist()
    [[2.0, 2.0]]
    """
    w = finite_matrix(w)
    if on_data:
        seen = finite_matrix(metric.root).T
        rows = _rows(seen, metric, rank, method, seed)
        left = fit_rows(seen, seen[rows])
        left[rows] = torch.eye(len(rows), dtype=left.dtype, device=left.device)
    elif method == "linear-time":  # weights its columns by their chances: no best fit
        found = CURS[method](w, rank, seed)
        rows, left = found.rows, found.left
    else:
        rows = _rows(w, metric, rank, method, seed)
        left = best_left(w, _columns(w, metric, rank, method, seed), rows)
    pick = torch.zeros(len(rows), len(w), dtype=left.dtype, device=left.device)
    pick[torch.arange(len(rows)), rows] = 1.0
    return Map(left, pick, w[rows])


def _rows(a: Tensor, metric: Metric, rank: int, method: str, seed: int) -> Tensor:
    """The rows that a method chooses of a matrix with the left singular vectors of the metric."""
    if method == "qr":
        return pivoted_qr(a.T, rank)[0]
    if method == "linear-time":
        return CURS[method](a, rank, seed).rows
    kept = metric.directions[:, :rank] * metric.spectrum[:rank]
    return CURS[method](kept, rank, seed).rows


def _columns(w: Tensor, metric: Metric, rank: int, method: str, seed: int) -> Tensor:
    if method == "qr":
        return pivoted_qr(w, rank)[0]
    kept = metric.directions[:, :rank].T @ w
    return CURS[method](kept, rank, seed).columns


def factored(
    w: Tensor,
    metric: Metric,
    rank: int,
    *,
    method: str = "svd",
    slopes: tuple[Slopes, Metric] | None = None,
    seed: int = 0,
    on_data: bool = False,
) -> Map:
    """A layer in two factors by any of ``METHODS``.

    Args:
        w: the weight, m×n.
        metric: of its outputs.
        rank: k.
        method: one of ``METHODS``.
        slopes: for ``"gradient"``, see ``steep``.
        seed: for the methods that draw.
        on_data: whether the metric is of data, not of the weight itself.

    >>> factored(torch.eye(3), Metric(torch.eye(3)), 3).error(torch.eye(3).double()) < 1e-20
    True
    """
    if method == "svd":
        return principal(w, metric, rank)
    if method == "gradient":
        assert slopes is not None  # collected by the pass
        return weighted(w, *slopes, rank)
    return own_rows(w, metric, rank, method, seed, on_data)
