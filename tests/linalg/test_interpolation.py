"""Column choice without chance, against LAPACK and the textbook algorithms."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from fxsvd.linalg.interpolation import best_left, deim, fit_rows, interpolative, pivoted_qr


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decaying(m: int, n: int, rate: float, seed: int = 0) -> Tensor:
    k = min(m, n)
    values = rate ** torch.arange(k, dtype=torch.float64)
    left, right = normal(m, k, seed=seed), normal(n, k, seed=seed + 1)
    return torch.linalg.qr(left).Q * values @ torch.linalg.qr(right).Q.T


def size(a: Tensor) -> float:
    return float(torch.linalg.matrix_norm(a))


SHAPES = pytest.mark.parametrize("shape", [(30, 50), (50, 30), (1, 6), (6, 1), (20, 20)])


@SHAPES
@pytest.mark.parametrize("rate", [1.0, 0.7, 0.2])
@pytest.mark.parametrize("scale", [1.0, 1e20, 1e-20])
def test_pivots_and_factors_are_those_of_lapack(
    shape: tuple[int, int], rate: float, scale: float
) -> None:
    a = (decaying(*shape, rate) if rate < 1 else normal(*shape)) * scale
    k = min(*shape, 12)
    columns, q, r = pivoted_qr(a, k)
    _, upper, pivots = scipy.linalg.qr(a.numpy(), mode="economic", pivoting=True)
    assert columns.tolist() == pivots[:k].tolist()
    found = r[:, columns].abs().numpy().diagonal()
    np.testing.assert_allclose(found, np.abs(upper.diagonal()[:k]), rtol=1e-6)
    torch.testing.assert_close(q.T @ q, torch.eye(k).double(), rtol=0, atol=1e-14)
    torch.testing.assert_close(q.T @ a, r, rtol=0, atol=1e-13 * size(a))


def test_q_stays_orthonormal_down_to_rounding() -> None:
    """Sixteen digits of decay: downdated norms would be noise after eight."""
    a = decaying(60, 60, 0.4)
    columns, q, r = pivoted_qr(a, 60)
    found = q.shape[1]
    assert 36 <= found < 60
    torch.testing.assert_close(q.T @ q, torch.eye(found).double(), rtol=0, atol=1e-14)
    assert size(a - q @ r) <= 1e-13
    assert sorted(columns.tolist()) == list(range(60))
    diagonal = r[:, columns[:found]].diagonal().abs()
    assert bool((diagonal[1:] <= diagonal[:-1] * (1 + 1e-6)).all())


@SHAPES
def test_coefficients_are_those_of_least_squares(shape: tuple[int, int]) -> None:
    a = normal(*shape)
    columns, z = interpolative(a, 5)
    chosen = a[:, columns].numpy()
    oracle = scipy.linalg.lstsq(chosen, a.numpy())[0]
    np.testing.assert_allclose(z.numpy(), oracle, rtol=0, atol=1e-12)
    assert torch.equal(z[:, columns], torch.eye(len(columns)).double())


def test_the_error_keeps_the_bound_of_pivoted_qr() -> None:
    """‖A - A[:, J] Z‖ ≤ √(1 + k (n - k)) 4ᵏ σ_{k+1} proven (Gu, Eisenstat), and near σ in fact."""
    a = decaying(40, 30, 0.6)
    sigma = torch.linalg.svdvals(a)
    for k in (1, 3, 8):
        columns, z = interpolative(a, k)
        error = float(torch.linalg.matrix_norm(a - a[:, columns] @ z, ord=2))
        assert float(sigma[k]) <= error <= (1 + k * (30 - k)) ** 0.5 * float(sigma[k])


@pytest.mark.parametrize(
    ("a", "rank"),
    [
        (normal(12, 3) @ normal(3, 9, seed=1), 3),
        (torch.zeros(4, 6), 0),
        (torch.full((5, 7), 3.0), 1),
        (torch.ones(1, 4), 1),
        (torch.ones(4, 1), 1),
        (torch.diag(torch.tensor([0.0, 2.0, 0.0, 1.0])), 2),
    ],
    ids=["rank three", "zero", "constant", "one row", "one column", "empty columns"],
)
def test_lacking_rank_is_exact_and_columns_never_repeat(a: Tensor, rank: int) -> None:
    a = a.double()
    for k in (max(rank, 1), 4, 99):
        columns, z = interpolative(a, k)
        assert len(columns) == len(columns.unique()) == min(k, *a.shape)
        assert size(a - a[:, columns] @ z) <= 1e-13 * size(a)
        assert torch.equal(z[:, columns], torch.eye(len(columns)).double())
        assert pivoted_qr(a, k)[1].shape[1] == min(rank, k)


def textbook_deim(vectors: np.ndarray) -> list[int]:  # type: ignore[type-arg]
    rows = [int(np.abs(vectors[:, 0]).argmax())]
    for step in range(1, vectors.shape[1]):
        basis, new = vectors[:, :step], vectors[:, step]
        residual = new - basis @ np.linalg.solve(basis[rows], new[rows])
        rows.append(int(np.abs(residual).argmax()))
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_deim_is_the_textbook_algorithm(seed: int) -> None:
    vectors = torch.linalg.qr(normal(25, 7, seed=seed)).Q
    assert deim(vectors).tolist() == textbook_deim(vectors.numpy())


def test_fits_leave_a_residual_orthogonal_to_the_rows() -> None:
    """The normal equations hold, to rounding, though they are not how it is solved."""
    targets, rows = normal(5, 20), decaying(6, 20, 0.1, seed=3)  # condition 1e5
    residual = targets - fit_rows(targets, rows) @ rows
    assert size(residual @ torch.linalg.qr(rows.T).Q) <= 1e-9 * size(targets)


def test_no_other_middle_does_better() -> None:
    """The gradient Cᵀ (A - C U R) Rᵀ vanishes: a convex problem, so that is its optimum."""
    a, columns, rows = normal(9, 8), torch.tensor([1, 4, 6]), torch.tensor([0, 2])
    residual = a - best_left(a, columns, rows) @ a[rows]
    gradient = a[:, columns].T @ residual @ a[rows].T
    assert size(gradient) <= 1e-13 * size(a) ** 3


def test_bad_matrices_and_ranks_are_refused() -> None:
    for a, k, words in [
        (torch.eye(2), 0, "rank 0"),
        (torch.full((2, 2), float("nan")), 1, "not finite"),
        (torch.ones(2), 1, "real matrix"),
    ]:
        for call in (pivoted_qr, interpolative):
            with pytest.raises(ValueError, match=words):
                call(a, k)
