"""Low rank by the singular value decomposition, and which rank to take.

A layer y = W x with W ``m×n`` becomes y = L (R x) with L ``m×k`` and R ``k×n``. Everything is
computed in float64 on the device of its input.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

NEGATIVE = 1e-6  # of the largest eigenvalue: what a second moment summed in float32 may miss


class Factors(NamedTuple):
    """A matrix in two factors, ``left`` (m×k) times ``right`` (k×n).

    >>> Factors(torch.ones(3, 1), torch.ones(1, 2)).product().shape
    torch.Size([3, 2])
    """

    left: Tensor
    right: Tensor

    def product(self) -> Tensor:
        """The matrix that the factors stand for, m×n."""
        return self.left @ self.right


def finite_matrix(a: Tensor) -> Tensor:
    """The matrix in float64, detached, after a look at every entry.

    Raises:
        ValueError: not a real matrix, without entries, or some are not finite.

    >>> finite_matrix(torch.ones(2, 3)).dtype
    torch.float64
    """
    if a.ndim != 2 or a.numel() == 0 or a.is_complex():
        raise ValueError(f"need a real matrix with entries, not {a.dtype} of {tuple(a.shape)}")
    exact = a.detach().to(torch.float64)
    if not bool(torch.isfinite(exact).all()):
        raise ValueError("the matrix holds numbers that are not finite: mend them first")
    return exact


def possible_rank(rank: int, *sizes: int) -> int:
    """The rank, or the smallest size where that is less: more cannot be had, nor is needed.

    Raises:
        ValueError: the rank is below 1.

    >>> possible_rank(9, 4, 6)
    4
    """
    if rank < 1:
        raise ValueError(f"rank {rank}: ask for 1 or more, or leave the layer out")
    return min(rank, *sizes)


def truncated_svd(a: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``rank`` largest singular values of a (m×n) and their vectors.

    Returns:
        U (m×k), σ (k, descending) and Vᵀ (k×n), k = min(rank, m, n). U diag(σ) Vᵀ is the nearest
        matrix of rank k in the Frobenius and in the spectral norm (Eckart and Young, 1936).

    Raises:
        ValueError: the rank is below 1, or a is not a finite matrix.

    >>> u, s, vh = truncated_svd(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 2)
    >>> s.tolist()
    [3.0, 2.0]
    """
    matrix = finite_matrix(a)
    k = possible_rank(rank, *matrix.shape)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :k], s[:k], vh[:k]


def randomized_svd(
    a: Tensor, rank: int, *, oversample: int = 10, iterations: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """``truncated_svd`` from a random sample of the range: O(mn·rank), not O(mn·min(m, n)).

    N. Halko, P.-G. Martinsson, J. Tropp, *Finding Structure with Randomness*, 2011, algorithms 4.4
    and 5.1. Without iterations, E‖A - QQᵀA‖_F² ≤ (1 + k/(p-1)) Σ_{j>k} σ_j² (theorem 10.5) before
    QQᵀA is cut to rank k; each iteration flattens the tail's influence further.

    Args:
        a: matrix m×n.
        rank: how many singular values.
        oversample: p, how many more directions to sample.
        iterations: how often to multiply by A Aᵀ (orthonormalised in between).
        seed: of the Gaussian test matrix, drawn on the CPU: the same on every device.

    Raises:
        ValueError: the rank is below 1, another count below 0, or a is not a finite matrix.

    >>> u, s, vh = randomized_svd(torch.outer(torch.ones(9), torch.ones(4)), 1)
    >>> round(float(s[0]), 9)
    6.0
    """
    if oversample < 0 or iterations < 0:
        raise ValueError("oversample and iterations count something: give 0 or more")
    matrix = finite_matrix(a)
    k = possible_rank(rank, *matrix.shape)
    width = min(k + oversample, *matrix.shape)
    generator = torch.Generator().manual_seed(seed)
    test = torch.randn(matrix.shape[1], width, generator=generator, dtype=torch.float64)
    q = torch.linalg.qr(matrix @ test.to(matrix.device)).Q
    for _ in range(iterations):
        q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ q).Q).Q
    u, s, vh = torch.linalg.svd(q.T @ matrix, full_matrices=False)
    return q @ u[:, :k], s[:k], vh[:k]


def svd_factors(a: Tensor, rank: int, *, balanced: bool = False) -> Factors:
    """The nearest matrix of a rank in two factors: U and ΣVᵀ, or with √Σ on both.

    Args:
        a: matrix m×n.
        rank: at most min(m, n) counts.
        balanced: share Σ out equally, which trains better: both factors' gradients are alike.

    Raises:
        ValueError: the rank is below 1, or a is not a finite matrix.

    >>> svd_factors(torch.eye(3), 2).product().diagonal().sum().item()
    2.0
    """
    u, s, vh = truncated_svd(a, rank)
    if balanced:
        root = s.sqrt()
        return Factors(u * root, root[:, None] * vh)
    return Factors(u, s[:, None] * vh)


def covariance_root(covariance: Tensor) -> Tensor:
    """F (d×r) with F Fᵀ = C: ‖M F‖_F is the size of M's output on data of second moment C.

    From the eigenvectors, so that C may be singular: r is its rank (1 at least), rounding left out.

    Raises:
        ValueError: C is not a finite square matrix, not symmetric, or not positive semidefinite.

    >>> covariance_root(torch.diag(torch.tensor([4.0, 0.0]))).abs().tolist()
    [[2.0], [0.0]]
    """
    c = finite_matrix(covariance)
    if c.shape[0] != c.shape[1]:
        raise ValueError(f"a covariance is square, not {tuple(c.shape)}")
    if float((c - c.T).abs().max()) > NEGATIVE * float(c.abs().max()):
        raise ValueError("a covariance is symmetric: give E[x xᵀ], inputs on both sides")
    values, vectors = torch.linalg.eigh((c + c.T) / 2)
    if float(values[0]) < -NEGATIVE * float(values.abs().max()):
        raise ValueError(f"a covariance has no negative eigenvalue, but this one has {values[0]:g}")
    rounding = len(c) * torch.finfo(torch.float64).eps * float(values[-1])
    rank = max(int((values > rounding).sum()), 1)
    root: Tensor = vectors[:, -rank:] * values[-rank:].clamp(min=0).sqrt()
    return root


def _spectrum(s: Tensor) -> Tensor:
    """σ² relative to the largest: squares that neither overflow nor vanish."""
    values = finite_matrix(s[None])[0]
    if bool((values < 0).any()) or bool((values.diff() > 0).any()):
        raise ValueError("singular values are not negative and descend: sort them first")
    return (values / values[0].clamp(min=torch.finfo(torch.float64).tiny)).square()


def rank_for_energy(s: Tensor, energy: float) -> int:
    """The smallest rank (1 at least) that keeps a share of Σσ².

    Args:
        s: singular values, descending.
        energy: the share, above 0 and up to 1.

    Raises:
        ValueError: the share is out of bounds, or s is not a spectrum.

    >>> rank_for_energy(torch.tensor([3.0, 1.0]), 0.9)
    1
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy {energy} is a share: above 0 and up to 1")
    kept = _spectrum(s).cumsum(0)
    return min(int((kept < energy * kept[-1]).sum()) + 1, len(kept))


def rank_for_error(s: Tensor, error: float) -> int:
    """The smallest rank (1 at least) whose relative error ‖A - A_k‖_F / ‖A‖_F is at most ``error``.

    Args:
        s: singular values, descending.
        error: from 0 to below 1.

    Raises:
        ValueError: the error is out of bounds, or s is not a spectrum.

    >>> rank_for_error(torch.tensor([4.0, 3.0]), 0.6)
    1
    """
    if not 0 <= error < 1:
        raise ValueError(f"error {error} is relative: from 0 to below 1")
    tails = _spectrum(s).flip(0).cumsum(0).flip(0)  # from the small end: nothing cancels
    return max(int((tails > error**2 * tails[0]).sum()), 1)


def rank_for_ratio(
    m: int, n: int, ratio: float, *, rounding: Literal["down", "up"] = "down"
) -> int:
    """The rank at which an m×n layer is ``ratio`` times smaller: mn / (k(m + n)), 1 at least.

    Args:
        m: rows.
        n: columns.
        ratio: the compression ratio.
        rounding: "down" keeps the promise (the largest rank whose ratio is at least that); "up" is
            what the reported experiment on VGG-11 did, in all fourteen of its ranks.

    Raises:
        ValueError: a size is below 1, or the ratio is not above 0.

    >>> rank_for_ratio(4096, 25088, 150), rank_for_ratio(4096, 25088, 150, rounding="up")
    (23, 24)
    """
    if m < 1 or n < 1 or not ratio > 0:
        raise ValueError(f"no rank for {m}×{n} at ratio {ratio}: sizes from 1, the ratio above 0")
    exact = min(m * n / (ratio * (m + n)), m, n)
    slack = 1e-12 * exact  # the ratio of a rank gives that rank again, whatever was rounded
    k = math.floor(exact + slack) if rounding == "down" else math.ceil(exact - slack)
    return max(k, 1)


def pays(m: int, n: int, rank: int) -> bool:
    """Whether two factors of that rank hold fewer numbers than the m×n matrix.

    >>> pays(10, 10, 5), pays(10, 10, 4)
    (False, True)
    """
    return rank * (m + n) < m * n
