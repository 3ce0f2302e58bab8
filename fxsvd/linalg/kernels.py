"""Convolution kernels ``[out, in, kh, kw]`` as chains of smaller ones.

Every function returns float64 kernels in order of application. The chain replaces the convolution
exactly as far as its kernels compose to the old one, when the settings are shared out so (stride,
padding and dilation of a kernel dimension always go to the one kernel that is long there, every
other kernel has stride 1, padding 0, dilation 1; the bias goes to the last):

* ``channel_svd``: the first kernel takes all;
* ``spatial_svd``: the first takes the vertical settings, ``(s_h, 1)``, the second the horizontal
  ones, ``(1, s_w)``. Zero padding may come late: without a bias, padding stays zero;
* ``tucker2``: the middle kernel takes all;
* ``cp``: as ``spatial_svd``, for the second and third kernel, which are depthwise
  (``groups`` = rank).

Of a grouped convolution factorise the kernel of each group; the parts are grouped likewise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxsvd.linalg.svd import covariance_root, finite_matrix, possible_rank, svd_factors

GAIN = 1e-6  # of the squared error: iterations that gain less have converged
STAY = 1e-9  # of the mean curvature: how much a step of ``cp`` holds on to where it is


def _kernel(w: Tensor, *dims: int) -> Tensor:
    if w.ndim not in dims:
        raise ValueError(f"need a kernel [out, in, ...] of {dims} dimensions, not {tuple(w.shape)}")
    return finite_matrix(w.reshape(w.shape[0], -1)).reshape(w.shape)


def channel_svd(w: Tensor, rank: int, covariance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A kernel to ``rank`` channels, then 1×1: low rank of the matrix out × (in·kh·kw).

    X. Zhang et al., *Accelerating Very Deep Convolutional Networks*, 2015. With data the first
    factor's outputs are the principal components of the layer's: with U_k the top eigenvectors of
    W C Wᵀ (from the SVD of W C^{1/2}), U_k U_kᵀ W leaves exactly the tail of its eigenvalues.

    Args:
        w: ``[out, in, *kernel]`` with 1, 2 or 3 kernel dimensions.
        rank: channels between; at most min(out, in·kh·kw) counts, and is then exact.
        covariance: C (d×d) of the patches, d = in·kh·kw in the order of ``unfold``.

    Returns:
        ``[r, in, *kernel]`` and ``[out, r, 1, 1]``.

    Raises:
        ValueError: not such a kernel, or the rank or the covariance is not usable.

    >>> [tuple(k.shape) for k in channel_svd(torch.ones(8, 4, 3, 3), 2)]
    [(2, 4, 3, 3), (8, 2, 1, 1)]
    """
    kernel = _kernel(w, 3, 4, 5)
    matrix = kernel.flatten(1)
    k = possible_rank(rank, *matrix.shape)
    if covariance is None or k == min(matrix.shape):
        left, right = svd_factors(matrix, k)
    else:
        root = covariance_root(covariance)
        if root.shape[0] != matrix.shape[1]:
            raise ValueError(f"patches of {matrix.shape[1]}, but a covariance of {root.shape[0]}")
        left = _principal(matrix @ root, min(k, root.shape[1]))
        right = left.T @ matrix
    r = left.shape[1]
    return right.reshape(r, *kernel.shape[1:]), _pointwise(left, kernel)


def _pointwise(matrix: Tensor, like: Tensor) -> Tensor:
    return matrix.reshape(*matrix.shape, *[1] * (like.ndim - 2))


def spatial_svd(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A vertical kernel to ``rank`` channels, then a horizontal one: (in·kh) × (out·kw).

    M. Jaderberg, A. Vedaldi and A. Zisserman, *Speeding up Convolutional Neural Networks with Low
    Rank Expansions*, 2014; the SVD makes it the nearest such pair. √Σ goes to both. On data there
    is no closed form.

    Args:
        w: ``[out, in, kh, kw]``.
        rank: channels between; at most min(in·kh, out·kw) counts, and is then exact.

    Returns:
        ``[r, in, kh, 1]`` and ``[out, r, 1, kw]``.

    Raises:
        ValueError: not such a kernel, or the rank is below 1.

    >>> [tuple(k.shape) for k in spatial_svd(torch.ones(8, 4, 3, 5), 2)]
    [(2, 4, 3, 1), (8, 2, 1, 5)]
    """
    kernel = _kernel(w, 4)
    out, into, high, wide = kernel.shape
    matrix = kernel.permute(1, 2, 0, 3).reshape(into * high, out * wide)
    left, right = svd_factors(matrix, rank, balanced=True)
    r = left.shape[1]
    return left.T.reshape(r, into, high, 1), right.reshape(r, out, 1, wide).transpose(0, 1)


def tucker2(
    w: Tensor, rank_out: int, rank_in: int, *, most: int = 30, tolerance: float = GAIN
) -> tuple[Tensor, ...]:
    """1×1 to fewer input channels, the core kernel, 1×1 to the output channels.

    Y.-D. Kim et al., *Compression of Deep Convolutional Neural Networks*, 2016. Starts from the
    truncated HOSVD, whose squared error is at most the sum of the two tails, and improves each
    side in turn (HOOI; L. De Lathauwer, B. De Moor and J. Vandewalle, 2000): never worse than that.

    Args:
        w: ``[out, in, *kernel]`` with 1, 2 or 3 kernel dimensions.
        rank_out: outputs of the core.
        rank_in: inputs of the core.
        most: iterations, should the fit still improve.
        tolerance: the gain, relative to the squared error, below which it has converged.

    Returns:
        ``[r_in, in, 1, 1]``, ``[r_out, r_in, *kernel]`` and ``[out, r_out, 1, 1]``.

    Raises:
        ValueError: not such a kernel, or a rank is below 1.

    >>> [tuple(k.shape) for k in tucker2(torch.ones(8, 4, 3, 3), 3, 2)]
    [(2, 4, 1, 1), (3, 2, 3, 3), (8, 3, 1, 1)]
    """
    kernel = _kernel(w, 3, 4, 5)
    k_out, k_in = (possible_rank(k, n) for k, n in zip((rank_out, rank_in), w.shape, strict=False))
    tensor = kernel.flatten(2)
    left, right = _sides(tensor / (float(tensor.abs().max()) or 1.0), k_out, k_in, most, tolerance)
    core = torch.einsum("oik,oj,il->jlk", tensor, left, right)
    middle = core.reshape(k_out, k_in, *kernel.shape[2:])
    return _pointwise(right.T, kernel), middle, _pointwise(left, kernel)


def _sides(
    tensor: Tensor, k_out: int, k_in: int, most: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Orthonormal bases for the outputs and the inputs: HOSVD, then HOOI."""
    left = _principal(tensor, k_out)
    right = _principal(tensor.transpose(0, 1), k_in)
    fit, whole = -1.0, float(tensor.square().sum())
    rounding = torch.finfo(torch.float64).eps * whole
    for _ in range(most):
        left = _principal(torch.einsum("oik,ij->ojk", tensor, right), k_out)
        half = torch.einsum("oik,oj->ijk", tensor, left)
        right = _principal(half, k_in)
        before, fit = fit, float(torch.einsum("ijk,il->jlk", half, right).square().sum())
        if fit - before <= tolerance * (whole - fit) + rounding:
            break
    return left, right


def _principal(tensor: Tensor, rank: int) -> Tensor:
    """Orthonormal directions of the first dimension, of most energy first; always ``rank``."""
    matrix = tensor.flatten(1)
    u, _, _ = torch.linalg.svd(matrix, full_matrices=rank > matrix.shape[1])
    leading: Tensor = u[:, :rank]
    return leading


def cp(w: Tensor, rank: int, seed: int = 0, *, most: int = 200) -> tuple[Tensor, ...]:
    """1×1, depthwise vertical, depthwise horizontal, 1×1: a sum of ``rank`` outer products.

    V. Lebedev et al., *Speeding-up Convolutional Neural Networks Using Fine-tuned
    CP-Decomposition*, 2015. Alternating least squares from the leading singular vectors of each
    side, with a proximal ridge: a step may be singular, yet none raises the error, and the limit is
    not biased. The four factors of a term have equal norms. There is no closed form: the result is
    a local optimum, which a high rank does not make exact.

    Args:
        w: ``[out, in, kh, kw]``.
        rank: channels between.
        seed: of the start where the rank is above a dimension.
        most: iterations, should the error still fall.

    Returns:
        ``[r, in, 1, 1]``, ``[r, 1, kh, 1]``, ``[r, 1, 1, kw]`` and ``[out, r, 1, 1]``.

    Raises:
        ValueError: not such a kernel, or the rank is below 1.

    >>> [tuple(k.shape) for k in cp(torch.ones(8, 4, 3, 5), 2)]
    [(2, 4, 1, 1), (2, 1, 3, 1), (2, 1, 1, 5), (8, 2, 1, 1)]
    """
    kernel = _kernel(w, 4)
    k = possible_rank(rank, kernel.numel() // max(kernel.shape))
    size = float(kernel.abs().max())
    kernel = kernel / (size or 1.0)
    factors = _start(kernel, k, seed)
    _alternate(kernel, factors, most)
    out, into, high, wide = (factor * size**0.25 for factor in factors)
    first, last = _pointwise(into.T, w), _pointwise(out, w)
    return first, high.T[:, None, :, None], wide.T[:, None, None, :], last


def _alternate(kernel: Tensor, factors: list[Tensor], most: int) -> None:
    error = float("inf")
    enough = torch.finfo(torch.float64).eps ** 2 * float(kernel.square().sum())
    for _ in range(most):
        _sweep(kernel, factors)
        before, error = error, float((kernel - _sum_of_products(factors)).square().sum())
        if error <= enough or before - error <= GAIN * error:
            return


def _start(kernel: Tensor, rank: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    out = []
    for dim, length in enumerate(kernel.shape):
        known = _principal(kernel.movedim(dim, 0), min(rank, length))
        shape = length, rank - known.shape[1]
        more = torch.randn(shape, generator=generator, dtype=torch.float64)
        out.append(torch.cat([known, more.to(kernel.device) / length**0.5], dim=1))
    return out


def _sweep(kernel: Tensor, factors: list[Tensor]) -> None:
    """Improve the four factors in turn, then even out their norms; in place."""
    out, into, high, wide = factors
    half = torch.einsum("oihw,ir->ohwr", kernel, into)
    out = _step(torch.einsum("ohwr,hr,wr->or", half, high, wide), out, into, high, wide)
    half = torch.einsum("oihw,or->ihwr", kernel, out)  # serves three steps
    into = _step(torch.einsum("ihwr,hr,wr->ir", half, high, wide), into, out, high, wide)
    half = torch.einsum("ihwr,ir->hwr", half, into)
    high = _step(torch.einsum("hwr,wr->hr", half, wide), high, out, into, wide)
    wide = _step(torch.einsum("hwr,hr->wr", half, high), wide, out, into, high)
    norms = torch.stack([torch.linalg.vector_norm(f, dim=0) for f in (out, into, high, wide)])
    even = norms.clamp(min=torch.finfo(torch.float64).tiny).log().mean(0).exp()
    for place, factor in enumerate((out, into, high, wide)):
        alive = norms[place] > 0
        factors[place] = torch.where(alive, factor * (even / norms[place]), 0.0)


def _step(target: Tensor, old: Tensor, *others: Tensor) -> Tensor:
    """Least squares for one factor, with the others fixed and a little pull to the old one."""
    gram = torch.stack([other.T @ other for other in others]).prod(0)
    stay = STAY * gram.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    curvature = gram + stay * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor: Tensor = torch.linalg.solve(curvature, (target + stay * old).T).T
    return factor


def _sum_of_products(factors: list[Tensor]) -> Tensor:
    out, into, high, wide = factors
    spread = torch.einsum("ir,hr,wr->rihw", into, high, wide)
    return torch.einsum("or,rihw->oihw", out, spread)
