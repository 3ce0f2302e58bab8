"""Columns and rows that stand for all others: chosen without chance, and the best fit to them.

Fits go through orthonormal bases, never through normal equations, which would square the condition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxsvd.linalg.svd import finite_matrix, possible_rank

REFRESH = 1e-8  # of the largest: a squared norm downdated this far has lost half its digits
CHUNK = 2048  # columns at a time, so that no second matrix as large as the first is made


def pivoted_qr(a: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """QR with column pivoting, stopped after ``rank`` columns: O(mn·rank).

    P. Businger and G. Golub, *Linear Least Squares Solutions by Householder Transformations*, 1965,
    by Gram-Schmidt done twice. A step takes the column of largest residual; residual norms are
    downdated, and computed anew before cancellation would spoil them.

    Args:
        a: matrix m×n.
        rank: how many columns to choose.

    Returns:
        The chosen columns (k, in order of choice), Q (m×r) and R (r×n) with A ≈ QR, where
        k = min(rank, m, n). r is less than k where the rank of A is: the residual is rounding from
        there on, and the first columns not yet chosen fill up.

    Raises:
        ValueError: the rank is below 1, or a is not a finite matrix.

    >>> pivoted_qr(torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]]), 2)[0].tolist()
    [2, 1]
    """
    matrix = finite_matrix(a)
    chosen, q, r = _pivot(matrix, possible_rank(rank, *matrix.shape))
    free = torch.ones(matrix.shape[1], dtype=torch.bool)
    free[chosen] = False
    fill = free.nonzero().flatten()[: len(q.T) - len(chosen)]
    columns = torch.cat([torch.tensor(chosen, dtype=torch.int64), fill]).to(matrix.device)
    return columns, q[:, : len(chosen)], r[: len(chosen)]


def _pivot(matrix: Tensor, k: int) -> tuple[list[int], Tensor, Tensor]:
    """At most k pivots, and Q and R with as many columns and rows filled."""
    scale = float(matrix.abs().max()) or 1.0
    q, r = matrix.new_zeros(matrix.shape[0], k), matrix.new_zeros(k, matrix.shape[1])
    residual = exact = _residual(matrix, q[:, :0], scale)
    rounding = (torch.finfo(torch.float64).eps * max(matrix.shape)) ** 2 * float(residual.max())
    chosen: list[int] = []
    while len(chosen) < k:
        step = len(chosen)
        if float(residual.max()) < REFRESH * float(exact.max()):
            residual = exact = _residual(matrix, q[:, :step], scale)
            residual[chosen] = 0
        if float(residual.max()) <= rounding:
            break
        pivot = int(residual.argmax())
        q[:, step] = _orthogonal(matrix[:, pivot] / scale, q[:, :step])
        r[step] = q[:, step] @ matrix
        chosen.append(pivot)
        residual = (residual - (r[step] / scale).square()).clamp(min=0)
        residual[chosen] = 0
    return chosen, q, r


def _residual(matrix: Tensor, q: Tensor, scale: float) -> Tensor:
    """‖(I - QQᵀ)A_:j‖² of every column of A / scale."""
    parts = []
    for part in matrix.split(CHUNK, dim=1):
        rest = part / scale
        rest = rest - q @ (q.T @ rest)
        parts.append(rest.square().sum(0))
    return torch.cat(parts)


def _orthogonal(column: Tensor, q: Tensor) -> Tensor:
    """The unit vector of what q leaves of a column."""
    for _ in range(3):  # twice is enough; normalised first, however little is left
        column = column - q @ (q.T @ column)
        column = column / torch.linalg.vector_norm(column)
    return column


def interpolative(a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The column interpolative decomposition A ≈ A[:, columns] Z, by pivoted QR.

    H. Cheng, Z. Gimbutas, P.-G. Martinsson and V. Rokhlin, *On the Compression of Low Rank
    Matrices*, 2005. Chosen columns are kept exactly: Z holds the identity there.

    Args:
        a: matrix m×n.
        rank: how many columns; at most min(m, n) counts.

    Returns:
        The columns (k, in order of choice) and the coefficients Z (k×n).

    Raises:
        ValueError: the rank is below 1, or a is not a finite matrix.

    >>> columns, z = interpolative(torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]), 1)
    >>> columns.tolist(), [round(x, 3) for x in z[0].tolist()]
    ([2], [0.333, 0.667, 1.0])
    """
    columns, _, r = pivoted_qr(a, rank)
    found = r.shape[0]
    z = r.new_zeros(len(columns), r.shape[1])
    z[:found] = torch.linalg.solve_triangular(r[:, columns[:found]].triu(), r, upper=True)
    z[:, columns] = torch.eye(len(columns), dtype=z.dtype, device=z.device)
    return columns, z


def deim(vectors: Tensor) -> Tensor:
    """One row for each orthonormal column (n×k), by discrete empirical interpolation.

    D. Sorensen and M. Embree, *A DEIM Induced CUR Factorization*, 2016: each row is where the next
    vector is worst interpolated from the rows before. These are the pivots of LU with partial
    pivoting. With P the chosen rows, ‖(PᵀV)⁻¹‖ ≤ √(nk/3)·2ᵏ, and in practice far less.

    Returns:
        The rows (k, in order of choice).

    >>> deim(torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])).tolist()
    [1, 0]
    """
    _, pivots = torch.linalg.lu_factor(vectors)
    order = list(range(len(vectors)))
    for step, swap in enumerate(pivots.tolist()):
        order[step], order[swap - 1] = order[swap - 1], order[step]
    return torch.tensor(order[: vectors.shape[1]], device=vectors.device)


def range_of(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of a (m×n) without what is rounding: U (m×r), σ and Vᵀ (r×n), r its rank.

    >>> range_of(torch.ones(3, 2, dtype=torch.float64))[1].shape
    torch.Size([1])
    """
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    rounding = s[0] * max(a.shape) * torch.finfo(torch.float64).eps
    rank = int((s > rounding).sum())
    return u[:, :rank], s[:rank], vh[:rank]


def fit_rows(targets: Tensor, rows: Tensor) -> Tensor:
    """L = targets · rows⁺ (m×r): the smallest that minimises ‖targets - L rows‖_F.

    >>> rows = torch.tensor([[1.0, 1.0], [2.0, 2.0]], dtype=torch.float64)
    >>> (fit_rows(rows, rows) @ rows).round().tolist()
    [[1.0, 1.0], [2.0, 2.0]]
    """
    u, s, vh = range_of(rows)
    return ((targets @ vh.T) / s) @ u.T


def best_left(a: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """C U (m×r) for the best U: C⁺ A R⁺ minimises ‖A - C U R‖_F for given columns and rows.

    With an orthonormal basis Q of C this is Q (QᵀA) R⁺; of what depends on each other only what is
    independent counts.

    >>> a = torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])).double()
    >>> (best_left(a, torch.tensor([0]), torch.tensor([0])) @ a[:1]).round().tolist()
    [[1.0, 3.0], [2.0, 6.0]]
    """
    basis, _, _ = range_of(a[:, columns])
    return basis @ fit_rows(basis.T @ a, a[rows])
