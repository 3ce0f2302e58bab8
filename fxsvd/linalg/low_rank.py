"""Low rank from second moments: factorise a layer, or rotate a space, by what the data excites.

All of it is principal components. With C = E[x xᵀ] (or the covariance, where a bias takes the
mean) the best W' of rank k for E‖(W − W')x‖² is U_k U_kᵀ W, U_k the top eigenvectors of W C Wᵀ; its
error is exactly the tail of the eigenvalues, and no inverse is taken, so that C may be singular.
Errors here are relative: E‖y − y'‖² / E‖y‖².
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fxsvd.linalg.reconstruction import RIDGE, least_squares
from fxsvd.linalg.svd import Factors, finite_matrix, possible_rank
from fxsvd.linalg.validation import spectral_scores

RIDGES = (RIDGE, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
"""Of ``fit_near``, which takes the one that cross-validation prefers."""


def principal_outputs(output_covariance: Tensor, rank: int) -> tuple[Tensor, float]:
    """Top eigenvectors U (m×k) of E[(y − ȳ)(y − ȳ)ᵀ], and the relative error of y → U Uᵀ y.

    Raises:
        ValueError: the rank is below 1, or the covariance is not a finite square matrix.

    >>> u, error = principal_outputs(torch.diag(torch.tensor([1.0, 3.0])), 1)
    >>> u.abs().tolist(), error
    ([[0.0], [1.0]], 0.25)
    """
    covariance = _square(output_covariance)
    k = possible_rank(rank, len(covariance))
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp(min=0)
    total = float(values.sum())
    error = float(values[: len(values) - k].sum()) / total if total else 0.0
    return vectors[:, len(values) - k :].flip(1), error


def _square(covariance: Tensor) -> Tensor:
    c = finite_matrix(covariance)
    if c.shape[0] != c.shape[1]:
        raise ValueError(f"a second moment is square, not {tuple(c.shape)}")
    return (c + c.T) / 2


def output_pca(w: Tensor, covariance: Tensor, rank: int) -> tuple[Factors, float]:
    """The best rank-k layer for its own data, U_k (U_kᵀ W), and its relative error.

    Args:
        w: m×n.
        covariance: second moment or covariance of the input, n×n; it may be singular.
        rank: k; min(m, n) at most counts.

    Raises:
        ValueError: the rank is below 1, or shapes do not fit, or numbers are not finite.

    >>> factors, error = output_pca(torch.eye(2), torch.diag(torch.tensor([1.0, 3.0])), 1)
    >>> factors.product().tolist(), error
    ([[0.0, 0.0], [0.0, 1.0]], 0.25)
    """
    w, c = _fitting(w, covariance)
    k = possible_rank(rank, *w.shape)
    q, w = _rows(w)
    u, error = principal_outputs(w @ c @ w.T, k)
    return Factors(u if q is None else q @ u, u.T @ w), error


def _fitting(w: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    w, c = finite_matrix(w), _square(covariance)
    if len(c) != w.shape[1]:
        raise ValueError(f"W {tuple(w.shape)} and C {tuple(c.shape)} do not fit: want m×n and n×n")
    return w, c


def _rows(w: Tensor) -> tuple[Tensor | None, Tensor]:
    """W = Q T with no more rows in T than inputs: eigenvectors of the smaller problem do."""
    if len(w) <= w.shape[1]:
        return None, w
    q, t = torch.linalg.qr(w)
    return q, t


def reduced_rank(r: Tensor, ryx: Tensor, rank: int, *, ridge: float = RIDGE) -> Factors:
    """The best rank-k map from inputs that are not those of the original layer.

    Reduced-rank regression: U_k U_kᵀ P with P the least-squares fit and U_k the top eigenvectors of
    P R_yxᵀ, the second moment of what it fits (A. Izenman, *Reduced-Rank Regression*, 1975).

    Args:
        r: second moment of the input x̂, d×d.
        ryx: E[y x̂ᵀ] with the output y to be matched, m×d.
        rank: k; min(m, d) at most counts.
        ridge: relative, see ``least_squares``.

    Raises:
        ValueError: the rank is below 1, or shapes do not fit, or numbers are not finite.

    >>> reduced_rank(torch.eye(2), torch.diag(torch.tensor([3.0, 1.0])), 1, ridge=0).product()
    tensor([[3., 0.],
            [0., 0.]], dtype=torch.float64)
    """
    ryx = finite_matrix(ryx)
    k = possible_rank(rank, *ryx.shape)
    every = torch.arange(ryx.shape[1], device=ryx.device)
    q, ryx = _rows(ryx)
    fit = least_squares(r, ryx, every, ridge=ridge)
    u, _ = principal_outputs(fit @ ryx.T, k)
    return Factors(u if q is None else q @ u, u.T @ fit)


def fit_near(
    x: Tensor, y: Tensor, w: Tensor, rows: int, ridges: Sequence[float] = RIDGES
) -> Tensor:
    """The matrix that minimises ‖y − x Mᵀ‖² + ε Σᵢ ‖xᵢ‖² ‖(M − W)ᵢ‖², columns i.

    What no row excites stays as it is in W, so that x may have a low rank, or fewer rows than
    columns. The ridge is the one with the least generalized cross-validation score, see
    ``fxsvd.linalg.validation``; here its sums are over the singular values of x.

    Args:
        x: a root of the inputs' covariance, r×n: centred rows, or Z with as large a ZᵀZ.
        y: of the outputs, r×m, beside it.
        w: m×n.
        rows: how many rows the root stands for.
        ridges: ε, to choose from.

    Returns:
        m×n, float64.

    Raises:
        ValueError: numbers are not finite.

    >>> x, w = torch.tensor([[3.0, 0.0], [-3.0, 0.0]]), torch.tensor([[1.0, 5.0]])
    >>> fit_near(x, 2 * x[:, :1], w, 2, [1e-12]).round(decimals=9).tolist()
    [[2.0, 5.0]]
    """
    x, y, w = finite_matrix(x), finite_matrix(y), finite_matrix(w)
    size = torch.linalg.vector_norm(x, dim=0)
    scale = torch.where(size > 0, 1 / size, 0.0)
    rest = y - x @ w.T
    u, s, vh = torch.linalg.svd(x * scale, full_matrices=False)
    along = u.T @ rest
    values, energy = s.square(), float(rest.square().sum())
    power = along.square().sum(1) * values
    scores = spectral_scores(values, power, energy, rows, ridges)
    best = ridges[int(scores.argmin())]
    change: Tensor = ((along.T * (s / (values + best))) @ vh) * scale
    return w + change


def weighted_svd(
    w: Tensor, covariance: Tensor, output_moment: Tensor, rank: int
) -> tuple[Factors, float]:
    """The rank-k layer with the least E[(y − y')ᵀ G (y − y')], and that, relative.

    Its factors are those of the SVD of G^½ W C^½, mapped back: G^−½ U_k and U_kᵀ G^½ W (which is
    Σ_k V_kᵀ C^−½ on the range of C, and needs no inverse of C).

    Args:
        w: m×n.
        covariance: C, second moment of the input, n×n; it may be singular.
        output_moment: G, second moment of the loss' gradient in the output, m×m; where it is
            singular no error counts, and the result is zero there (a pseudo-inverse).
        rank: k; min(m, n) at most counts.

    Raises:
        ValueError: the rank is below 1, or shapes do not fit, or numbers are not finite.

    >>> c, g = torch.diag(torch.tensor([1.0, 3.0])), torch.diag(torch.tensor([4.0, 1.0]))
    >>> factors, error = weighted_svd(torch.eye(2), c, g, 1)
    >>> factors.product().tolist(), round(error, 9)
    ([[1.0, 0.0], [0.0, 0.0]], 0.428571429)
    """
    w, c = _fitting(w, covariance)
    g = _square(output_moment)
    if len(g) != len(w):
        raise ValueError(f"the output moment is {tuple(g.shape)} for {len(w)} outputs")
    root, inverse = _roots(g)
    weighted = root @ w
    u, error = principal_outputs(weighted @ c @ weighted.T, possible_rank(rank, *w.shape))
    return Factors(inverse @ u, u.T @ weighted), error


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """G^½ and its pseudo-inverse: directions that only rounding fills count as none."""
    values, vectors = torch.linalg.eigh(moment)
    rounding = len(moment) * torch.finfo(torch.float64).eps * float(values[-1])
    kept = values > max(rounding, 0.0)
    size, basis = values[kept].sqrt(), vectors[:, kept]
    return (basis * size) @ basis.T, (basis / size) @ basis.T


class Projection(NamedTuple):
    """A space of d channels through r: values z become D (E z).

    Attributes:
        encode: E, r×d, goes to the producers.
        decode: D, d×r, goes to the consumers.
        error: relative error, the tail of the eigenvalues.
    """

    encode: Tensor
    decode: Tensor
    error: float


def projection(covariance: Tensor, rank: int, *, gram: Tensor | None = None) -> Projection:
    """The best narrower space for values that meet linear maps only on both sides.

    Minimises E‖z − D E z‖²: E = U_rᵀ and D = U_r, top eigenvectors of the covariance. With the
    consumers' Gram matrix G it minimises their output error Σ E‖W_i (z − D E z)‖² instead.

    Args:
        covariance: of the space's values, d×d.
        rank: r; d at most counts.
        gram: G = Σ W_iᵀ W_i over the consumers, d×d; directions that none reads are given up.

    Raises:
        ValueError: the rank is below 1, or shapes do not fit, or numbers are not finite.

    >>> projection(torch.diag(torch.tensor([1.0, 3.0])), 1).error
    0.25
    >>> reads_the_first = torch.diag(torch.tensor([1.0, 0.0]))
    >>> projection(torch.diag(torch.tensor([1.0, 3.0])), 1, gram=reads_the_first).error
    0.0
    """
    if gram is None:
        basis, error = principal_outputs(covariance, rank)
        return Projection(basis.T, basis, error)
    identity = torch.eye(len(covariance), dtype=torch.float64, device=covariance.device)
    (decode, encode), error = weighted_svd(identity, covariance, gram, rank)
    return Projection(encode, decode, error)
