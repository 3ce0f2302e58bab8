"""CUR: optimal middles, the proven bounds, the corrected probabilities, and the data's metric."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fxsvd.linalg.cur import (
    METHODS,
    Cur,
    deim_cur,
    leverage_cur,
    leverage_score_cur,
    linear_time_cur,
    pivoted_qr_cur,
)
from fxsvd.linalg.sampling import draw, inclusion_probabilities, squared_norms

OPTIMAL = ["leverage-score", "deim", "leverage", "qr"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decaying(m: int, n: int, rate: float, seed: int = 0) -> Tensor:
    k = min(m, n)
    left, right = normal(m, k, seed=seed), normal(n, k, seed=seed + 1)
    values = rate ** torch.arange(k, dtype=torch.float64)
    return torch.linalg.qr(left).Q * values @ torch.linalg.qr(right).Q.T


def size(a: Tensor, order: str | int = "fro") -> float:
    return float(torch.linalg.matrix_norm(a, ord=order))


def error(a: Tensor, cur: Cur, order: str | int = "fro") -> float:
    return size(a - cur.factors().product(), order)


def tail(a: Tensor, k: int) -> float:
    return float(torch.linalg.svdvals(a)[k:].square().sum().sqrt())


every = pytest.mark.parametrize("name", METHODS)
optimal = pytest.mark.parametrize("name", OPTIMAL)


@every
@pytest.mark.parametrize("shape", [(9, 13), (13, 9), (1, 5), (5, 1)])
def test_the_right_factor_is_rows_of_the_matrix_and_none_repeats(
    name: str, shape: tuple[int, int]
) -> None:
    a = normal(*shape)
    for k in (1, 4, 99):
        cur = METHODS[name](a, k, 0)
        assert torch.equal(cur.right, a[cur.rows])
        assert cur.left.shape == (len(a), len(cur.rows))
        for chosen, length in [(cur.columns, a.shape[1]), (cur.rows, a.shape[0])]:
            assert len(chosen) == len(chosen.unique()) == min(k, *shape)
            assert int(chosen.max()) < length


@optimal
@pytest.mark.parametrize(
    "a",
    [
        normal(12, 3) @ normal(3, 9, seed=1),
        (normal(12, 3) @ normal(3, 9, seed=1)) * 1e20,
        (normal(12, 3) @ normal(3, 9, seed=1)) * 1e-20,
        torch.zeros(4, 6),
        torch.full((5, 7), 3.0),
        torch.outer(torch.arange(4.0), torch.arange(6.0)),
        normal(6, 4),
        normal(1, 4),
        normal(4, 1),
    ],
)
def test_rank_or_more_is_exact(name: str, a: Tensor) -> None:
    a = a.double()
    rank = max(int(torch.linalg.matrix_rank(a)), 1)
    for k in (rank, rank + 1, 50):
        assert error(a, METHODS[name](a, k, 0)) <= 1e-12 * size(a)


@optimal
@pytest.mark.parametrize("seed", range(3))
def test_the_middle_is_the_product_of_pseudoinverses(name: str, seed: int) -> None:
    a = decaying(14, 11, 0.7, seed=seed)
    cur = METHODS[name](a, 4, seed)
    c, r = a[:, cur.columns], a[cur.rows]
    middle = torch.linalg.pinv(c) @ a @ torch.linalg.pinv(r)
    torch.testing.assert_close(cur.left, c @ middle, rtol=0, atol=1e-11)


@every
def test_a_seed_repeats_and_the_others_need_none(name: str) -> None:
    a = decaying(20, 30, 0.9)
    first, again, other = (METHODS[name](a, 5, seed) for seed in (1, 1, 2))
    assert torch.equal(first.left, again.left)
    assert torch.equal(first.columns, again.columns)
    assert torch.equal(first.columns, other.columns) == (name in ("deim", "leverage", "qr"))


@pytest.mark.parametrize("rate", [0.5, 0.9])
def test_deim_keeps_the_bound_of_its_interpolation(rate: float) -> None:
    """Sorensen and Embree, theorem 4.1, in both norms."""
    a, k = decaying(30, 40, rate), 6
    cur = deim_cur(a, k)
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    growth = size(torch.linalg.inv(vh[:k, cur.columns]), 2)
    growth += size(torch.linalg.inv(u[cur.rows, :k]), 2)
    assert float(s[k]) <= error(a, cur, 2) <= growth * float(s[k])
    assert tail(a, k) <= error(a, cur) <= growth * tail(a, k)


@pytest.mark.parametrize("rate", [0.5, 0.9])
def test_pivoted_qr_keeps_the_sum_of_both_projections(rate: float) -> None:
    """‖A - CUR‖² = ‖A - CC⁺A‖² + ‖CC⁺(A - AR⁺R)‖² for the best U: an identity."""
    a = decaying(30, 40, rate)
    cur = pivoted_qr_cur(a, 6)
    c, r = a[:, cur.columns], a[cur.rows]
    seen = c @ torch.linalg.pinv(c) @ a
    parts = size(a - seen) ** 2 + size(seen - seen @ torch.linalg.pinv(r) @ r) ** 2
    assert error(a, cur) ** 2 == pytest.approx(parts, rel=1e-9)


@pytest.mark.parametrize("rate", [0.5, 0.8, 0.95])
def test_drawn_leverage_keeps_the_relative_bound(rate: float) -> None:
    """(2 + ε)‖A - A_k‖ of Mahoney and Drineas with ε = 1, in all of twenty seeds."""
    a, k = decaying(60, 80, rate), 5
    for seed in range(20):
        assert error(a, leverage_score_cur(a, k, columns=20, rows=20, seed=seed)) <= 3 * tail(a, k)


def test_k_log_k_are_drawn_if_nothing_is_said() -> None:
    cur = leverage_score_cur(normal(60, 80), 5)
    assert len(cur.columns) == len(cur.rows) == 14  # ⌈5 (1 + ln 5)⌉
    assert len(linear_time_cur(normal(6, 80), 5).rows) == 6


def test_top_leverage_is_that_of_the_singular_vectors() -> None:
    a = decaying(9, 12, 0.5)
    u, _, vh = np.linalg.svd(a.numpy())
    cur = leverage_cur(a, 3)
    assert cur.columns.tolist() == np.argsort(-(vh[:3] ** 2).sum(0))[:3].tolist()
    assert cur.rows.tolist() == np.argsort(-(u[:, :3] ** 2).sum(1))[:3].tolist()


def by_definition(a: Tensor, k: int, chances: tuple[Tensor, Tensor], seed: int) -> Tensor:
    """C U R with U = ([CᵀC]_k)⁻¹ Ψᵀ, the inverse taken as it is written."""
    columns, rows = draw(chances[0], seed), draw(chances[1], seed + 1)
    c = a[:, columns] / chances[0][columns].sqrt()
    scale = chances[1][rows].sqrt()[:, None]
    values, vectors = torch.linalg.eigh(c.T @ c)
    inverse = vectors[:, -k:] / values[-k:] @ vectors[:, -k:].T
    return c @ inverse @ (c[rows] / scale).T @ (a[rows] / scale)


def test_linear_time_is_its_definition_without_the_inverse() -> None:
    a = decaying(12, 15, 0.8)
    chances = tuple(inclusion_probabilities(squared_norms(x), 6) for x in (a, a.T))
    for seed in range(5):
        cur = linear_time_cur(a, 4, columns=6, rows=6, seed=seed)
        oracle = by_definition(a, 4, chances, seed)  # type: ignore[arg-type]
        torch.testing.assert_close(cur.factors().product(), oracle, rtol=0, atol=1e-10)


def test_linear_time_with_everything_drawn_is_the_nearest_of_the_rank() -> None:
    a = decaying(12, 15, 0.8)
    assert error(a, linear_time_cur(a, 4, columns=15, rows=12)) == pytest.approx(tail(a, 4), 1e-9)


def test_linear_time_keeps_the_expected_error() -> None:
    """‖A - A_k‖ + ((4k/c)^¼ + (k/r)^½) ‖A‖: theorem 4 of Drineas, Kannan and Mahoney."""
    a, k, c = decaying(60, 80, 0.8), 3, 24
    errors = [error(a, linear_time_cur(a, k, columns=c, rows=c, seed=s)) for s in range(20)]
    assert np.mean(errors) <= tail(a, k) + ((4 * k / c) ** 0.25 + (k / c) ** 0.5) * size(a)


def test_probabilities_need_the_square_that_the_slides_forget() -> None:
    """‖A_:j‖/‖A‖² is no distribution; normalised, it still draws worse than ‖A_:j‖²/‖A‖²."""
    a, k, c = normal(40, 60) * 0.85 ** torch.arange(60, dtype=torch.float64), 5, 8
    norms = torch.linalg.vector_norm(a, dim=0)
    assert abs(float((norms / size(a) ** 2).sum()) - 1) > 0.1
    assert float((norms**2 / size(a) ** 2).sum()) == pytest.approx(1, rel=1e-12)
    every_row = torch.ones(40, dtype=torch.float64)

    def mean_excess(scores: Tensor) -> float:
        chances = inclusion_probabilities(scores, c), every_row
        found = [size(a - by_definition(a, k, chances, seed)) for seed in range(200)]
        return float(np.mean(found)) - tail(a, k)

    right, wrong = mean_excess(norms**2), mean_excess(norms)
    built = [error(a, linear_time_cur(a, k, columns=c, rows=40, seed=s)) for s in range(200)]
    assert float(np.mean(built)) - tail(a, k) == pytest.approx(right, rel=1e-9)
    assert 0 < right < 0.7 * wrong


@every
def test_bad_matrices_and_ranks_are_refused(name: str) -> None:
    for a, k, words in [
        (torch.eye(2), 0, "ask for 1 or more"),
        (torch.full((2, 2), float("nan")), 1, "not finite"),
    ]:
        with pytest.raises(ValueError, match=words):
            METHODS[name](a, k, 0)
