"""CUR: a layer of its own rows, W ≈ (C U) R with C some columns and R some rows of W.

All methods have one call form in ``METHODS``. For given columns and rows U = C⁺ A R⁺ is best; it is
stored merged with C, so that the right factor is rows of W as they were: c·(m + n) numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fxsvd.linalg.interpolation import best_left, deim, fit_rows, pivoted_qr, range_of
from fxsvd.linalg.sampling import (
    draw,
    inclusion_probabilities,
    leverage_scores,
    most_important,
    squared_norms,
)
from fxsvd.linalg.svd import Factors, covariance_root, finite_matrix, possible_rank, truncated_svd


class Cur(NamedTuple):
    """Chosen ``columns`` (c) and ``rows`` (r), ``left`` = C·U (m×r) and ``right`` = R (r×n).

    >>> METHODS["qr"](torch.eye(2), 2, 0).factors().product().trace().item()
    2.0
    """

    columns: Tensor
    rows: Tensor
    left: Tensor
    right: Tensor

    def factors(self) -> Factors:
        """The two matrices alone."""
        return Factors(self.left, self.right)


def _fitted(a: Tensor, columns: Tensor, rows: Tensor) -> Cur:
    matrix = finite_matrix(a)
    return Cur(columns, rows, best_left(matrix, columns, rows), matrix[rows])


def _counts(a: Tensor, rank: int, columns: int | None, rows: int | None) -> tuple[int, int]:
    """How many to draw where it was not said: k (1 + ln k), the k log k of the analyses."""
    usual = math.ceil(rank * (1 + math.log(rank)))
    given = columns if columns is not None else usual, rows if rows is not None else usual
    return possible_rank(given[0], a.shape[1]), possible_rank(given[1], a.shape[0])


def linear_time_cur(
    a: Tensor, rank: int, *, columns: int | None = None, rows: int | None = None, seed: int = 0
) -> Cur:
    """LinearTimeCUR: columns and rows by their squared norms; never looks at all of A at once.

    P. Drineas, R. Kannan and M. Mahoney, *Fast Monte Carlo Algorithms for Matrices III*, 2006: C
    and R scaled to keep expectations, Ψ the same rows of C, U = ([CᵀC]_k)⁻¹ Ψᵀ. With C = X Σ Yᵀ
    this is C U = X_k X_k[rows]ᵀ scaled, so nothing is inverted. Here without replacement: scaled
    by 1/√π_j, π_j the inclusion probability, not 1/√(c p_j); all columns and rows give A_k.

    Args:
        a: matrix m×n.
        rank: k.
        columns: how many to draw; k (1 + ln k) if not given.
        rows: likewise.
        seed: of the drawing.

    Raises:
        ValueError: the rank or a count is below 1, or a is not a finite matrix.

    >>> linear_time_cur(torch.eye(4), 2, columns=4, rows=4).left.shape
    torch.Size([4, 4])
    """
    matrix = finite_matrix(a)
    k = possible_rank(rank, *matrix.shape)
    c, r = _counts(matrix, k, columns, rows)
    chance = inclusion_probabilities(squared_norms(matrix), c)
    chosen = draw(chance, seed)
    basis, _, _ = range_of(matrix[:, chosen] / chance[chosen].sqrt())
    row_chance = inclusion_probabilities(squared_norms(matrix.T), r)
    kept = draw(row_chance, seed + 1)
    left = basis[:, :k] @ (basis[kept, :k] / row_chance[kept, None]).T
    return Cur(chosen, kept, left, matrix[kept])


def leverage_score_cur(
    a: Tensor, rank: int, *, columns: int | None = None, rows: int | None = None, seed: int = 0
) -> Cur:
    """LeverageScoreCUR: columns and rows drawn by their share of the top singular vectors.

    M. Mahoney and P. Drineas, *CUR Matrix Decompositions for Improved Data Analysis*, 2009: column
    j with probability min(1, c·p_j), U = C⁺ A R⁺; with c ~ k log k / ε², probably
    ‖A - CUR‖_F ≤ (2 + ε) ‖A - A_k‖_F. Here exactly c columns are drawn, with those probabilities.

    Args:
        a: matrix m×n.
        rank: k, of the singular vectors.
        columns: how many to draw; k (1 + ln k) if not given.
        rows: likewise.
        seed: of the drawing.

    Raises:
        ValueError: the rank or a count is below 1, or a is not a finite matrix.

    >>> leverage_score_cur(torch.eye(4), 2, columns=3, rows=2).left.shape
    torch.Size([4, 2])
    """
    matrix = finite_matrix(a)
    u, _, vh = truncated_svd(matrix, rank)
    c, r = _counts(matrix, u.shape[1], columns, rows)
    chosen = draw(inclusion_probabilities(leverage_scores(vh.T), c), seed)
    kept = draw(inclusion_probabilities(leverage_scores(u), r), seed + 1)
    return _fitted(matrix, chosen, kept)


def leverage_cur(a: Tensor, rank: int) -> Cur:
    """The ``rank`` columns and rows of largest leverage, without chance.

    D. Papailiopoulos, A. Kyrillidis and C. Boutsidis, *Provable Deterministic Leverage Score
    Sampling*, 2014.

    Raises:
        ValueError: the rank is below 1, or a is not a finite matrix.

    >>> leverage_cur(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 2).rows.tolist()
    [1, 2]
    """
    u, _, vh = truncated_svd(a, rank)
    columns = most_important(leverage_scores(vh.T), len(vh))
    return _fitted(a, columns, most_important(leverage_scores(u), len(vh)))


def deim_cur(a: Tensor, rank: int) -> Cur:
    """Columns and rows by DEIM on the top singular vectors.

    D. Sorensen and M. Embree, *A DEIM Induced CUR Factorization*, 2016: the error is at most
    ‖(V[columns])⁻¹‖ + ‖(U[rows])⁻¹‖ times that of the nearest matrix of the rank.

    Raises:
        ValueError: the rank is below 1, or a is not a finite matrix.

    >>> deim_cur(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 2).rows.tolist()
    [1, 2]
    """
    u, _, vh = truncated_svd(a, rank)
    return _fitted(a, deim(vh.T), deim(u))


def pivoted_qr_cur(a: Tensor, rank: int) -> Cur:
    """Columns by pivoted QR of A and rows by pivoted QR of Aᵀ: no SVD of A.

    Raises:
        ValueError: the rank is below 1, or a is not a finite matrix.

    >>> pivoted_qr_cur(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 2).rows.tolist()
    [1, 2]
    """
    return _fitted(a, pivoted_qr(a, rank)[0], pivoted_qr(a.T, rank)[0])


def _drawn(method: Callable[..., Cur], a: Tensor, rank: int, seed: int) -> Cur:
    k = possible_rank(rank, *a.shape)
    return method(a, k, columns=k, rows=k, seed=seed)


METHODS: dict[str, Callable[[Tensor, int, int], Cur]] = {
    "linear-time": partial(_drawn, linear_time_cur),
    "leverage-score": partial(_drawn, leverage_score_cur),
    "deim": lambda a, rank, seed: deim_cur(a, rank),
    "leverage": lambda a, rank, seed: leverage_cur(a, rank),
    "qr": lambda a, rank, seed: pivoted_qr_cur(a, rank),
}
"""``METHODS[name](a, rank, seed)``: as many columns and as many rows as the rank."""


def choose_rows(
    w: Tensor, covariance: Tensor, rank: int, method: str = "qr", seed: int = 0
) -> Tensor:
    """Rows of w (m×n) that stand for all of its outputs on the data: a method run on W C^{1/2}.

    Args:
        w: the weight, m×n.
        covariance: C of the inputs, n×n.
        rank: how many rows; at most min(m, rank of C) are given, in the order of the method.
        method: one of ``METHODS``.
        seed: for the methods that draw.

    Raises:
        ValueError: no such method, or the rank, the weight or the covariance is not usable.

    >>> w = torch.tensor([[9.0, 0.0], [0.0, 1.0]])
    >>> choose_rows(w, torch.diag(torch.tensor([1.0, 100.0])), 1).tolist()
    [1]
    """
    if method not in METHODS:
        raise ValueError(f"no CUR method {method!r}: take one of {', '.join(METHODS)}")
    return METHODS[method](_on_data(w, covariance), rank, seed).rows


def _on_data(w: Tensor, covariance: Tensor) -> Tensor:
    matrix, root = finite_matrix(w), covariance_root(covariance)
    if matrix.shape[1] != root.shape[0]:
        raise ValueError(f"{matrix.shape[1]} inputs, but a covariance of {root.shape[0]}")
    return matrix @ root


def row_factors(
    w: Tensor,
    covariance: Tensor,
    rank: int,
    rows: Tensor | None = None,
    *,
    method: str = "qr",
    seed: int = 0,
) -> Factors:
    """A layer through some of its own outputs, W ≈ L W[rows] by min ‖(W - L W_r) C^{1/2}‖_F.

    The left factor W C W_rᵀ (W_r C W_rᵀ)⁺ is fitted on W C^{1/2}, at the root of that condition;
    chosen rows are kept exactly, on the data and off it.

    Args:
        w: the weight, m×n.
        covariance: C of the inputs, n×n.
        rank: how many rows.
        rows: which; chosen by the method in the data's metric if not given.
        method: one of ``METHODS``.
        seed: for the methods that draw.

    Raises:
        ValueError: rows are not ``rank`` different ones, or as ``choose_rows``.

    >>> w = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    >>> row_factors(w, torch.eye(2), 1).right.tolist()
    [[2.0, 2.0]]
    """
    if rows is None:
        rows = choose_rows(w, covariance, rank, method, seed)
    elif len(rows) != rank or len(rows.unique()) != rank:
        raise ValueError(f"give {rank} different rows, or none to have them chosen")
    seen = _on_data(w, covariance)
    left = fit_rows(seen, seen[rows])
    left[rows] = torch.eye(len(rows), dtype=left.dtype, device=left.device)
    return Factors(left, finite_matrix(w)[rows])
