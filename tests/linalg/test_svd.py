"""Singular values against numpy and the theorems about them; ranks against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxsvd.linalg.svd import (
    covariance_root,
    finite_matrix,
    pays,
    randomized_svd,
    rank_for_energy,
    rank_for_error,
    rank_for_ratio,
    svd_factors,
    truncated_svd,
)

FIXED = settings(derandomize=True, deadline=None)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_spectrum(m: int, n: int, values: Tensor, seed: int = 0) -> Tensor:
    k = len(values)
    left, right = normal(m, k, seed=seed), normal(n, k, seed=seed + 1)
    return torch.linalg.qr(left).Q * values @ torch.linalg.qr(right).Q.T


def size(a: Tensor) -> float:
    return float(torch.linalg.matrix_norm(a))


EDGES = {
    "zero": torch.zeros(4, 6),
    "constant": torch.full((5, 3), 2.0),
    "one row": normal(1, 5),
    "one column": normal(5, 1),
    "rank two": normal(6, 2) @ normal(2, 7, seed=1),
    "huge": normal(5, 6) * 1e20,
    "tiny": normal(5, 6) * 1e-20,
    "single precision": normal(4, 4).float(),
}
edge = pytest.mark.parametrize("a", EDGES.values(), ids=EDGES.keys())


@edge
@pytest.mark.parametrize("function", [truncated_svd, randomized_svd])
def test_full_rank_or_more_is_exact(a: Tensor, function: object) -> None:
    u, s, vh = function(a, 9)  # type: ignore[operator]
    assert u.dtype == s.dtype == torch.float64
    assert len(s) == min(a.shape)
    assert size(u * s @ vh - a) <= 1e-13 * size(a.double())


@edge
@pytest.mark.parametrize("rank", [1, 2])
def test_the_error_is_the_tail_of_the_singular_values(a: Tensor, rank: int) -> None:
    tail = np.linalg.svd(a.double().numpy(), compute_uv=False)[rank:]
    error = size(a.double() - svd_factors(a, rank).product())
    assert error == pytest.approx(np.linalg.norm(tail), rel=1e-9, abs=1e-13 * size(a.double()))


def test_vectors_are_orthonormal_where_the_matrix_lacks_rank() -> None:
    for function in (truncated_svd, randomized_svd):
        u, _, vh = function(EDGES["rank two"], 5)
        eye = torch.eye(5, dtype=torch.float64)
        torch.testing.assert_close(u.T @ u, eye, rtol=0, atol=1e-12)
        torch.testing.assert_close(vh @ vh.T, eye, rtol=0, atol=1e-12)


def test_both_splits_have_one_product_and_the_balanced_one_equal_grams() -> None:
    a = normal(7, 5)
    plain, balanced = svd_factors(a, 3), svd_factors(a, 3, balanced=True)
    torch.testing.assert_close(plain.product(), balanced.product(), rtol=0, atol=1e-13)
    torch.testing.assert_close(plain.left.T @ plain.left, torch.eye(3).double(), rtol=0, atol=1e-13)
    torch.testing.assert_close(
        balanced.left.T @ balanced.left, balanced.right @ balanced.right.T, rtol=0, atol=1e-13
    )


def test_a_random_range_keeps_the_proven_expected_error() -> None:
    """Theorem 10.5 of Halko, Martinsson and Tropp, for the squared Frobenius norm."""
    values = 0.8 ** torch.arange(30, dtype=torch.float64)
    a, k, p = of_spectrum(60, 40, values), 6, 4
    bound = (1 + k / (p - 1)) * float(values[k:].square().sum())
    errors = []
    for seed in range(40):
        u, s, vh = randomized_svd(a, k + p, oversample=0, iterations=0, seed=seed)
        errors.append(size(a - u * s @ vh) ** 2)
    assert np.mean(errors) <= bound
    assert min(errors) >= float(values[k + p :].square().sum())  # Eckart and Young


def test_iterations_keep_the_proven_spectral_error() -> None:
    """Corollary 10.10 of Halko, Martinsson and Tropp."""
    values = 1 / (1 + torch.arange(40, dtype=torch.float64))
    a, k, p, q = of_spectrum(60, 50, values), 5, 5, 2
    factor = 1 + (k / (p - 1)) ** 0.5 + np.e * (k + p) ** 0.5 / p * (50 - k) ** 0.5
    errors = []
    for seed in range(20):
        u, s, vh = randomized_svd(a, k + p, oversample=0, iterations=q, seed=seed)
        errors.append(float(torch.linalg.matrix_norm(a - u * s @ vh, ord=2)))
    assert np.mean(errors) <= factor ** (1 / (2 * q + 1)) * float(values[k])


def test_a_decaying_spectrum_is_found_as_the_exact_svd_finds_it() -> None:
    a = of_spectrum(80, 60, 0.3 ** torch.arange(30, dtype=torch.float64))
    u, s, vh = randomized_svd(a, 5)
    x, t, yh = truncated_svd(a, 5)
    torch.testing.assert_close(s, t, rtol=1e-12, atol=0)
    torch.testing.assert_close(u * s @ vh, x * t @ yh, rtol=0, atol=1e-12)


def test_a_seed_repeats_and_another_differs() -> None:
    a = normal(30, 20)
    first, again, other = (randomized_svd(a, 3, iterations=0, seed=s)[1] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@FIXED
@given(st.lists(st.floats(0, 100), min_size=1, max_size=8), st.floats(0.01, 0.99))
def test_ranks_are_the_smallest_that_do(values: list[float], level: float) -> None:
    s = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    squares = (s / max(float(s[0]), 1e-300)) ** 2
    total, margin = float(squares.sum()), 1e-12

    def tail(k: int) -> float:
        return float(squares[k:].sum())

    k = rank_for_energy(s, level)
    assert total - tail(k) >= level * total - margin
    assert k == 1 or total - tail(k - 1) < level * total + margin
    k = rank_for_error(s, level)
    assert tail(k) <= level**2 * total + margin
    assert k == 1 or tail(k - 1) > level**2 * total - margin


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_ranks_do_not_depend_on_the_scale(scale: float) -> None:
    s = torch.tensor([4.0, 3.0, 0.5, 0.0], dtype=torch.float64) * scale
    assert [rank_for_energy(s, e) for e in (0.1, 0.9, 0.999, 1)] == [1, 2, 3, 3]
    assert [rank_for_error(s, e) for e in (0, 0.05, 0.2, 0.99)] == [3, 3, 2, 1]
    assert rank_for_energy(s * 0, 1) == rank_for_error(s * 0, 0) == 1


REPORTED = {  # of VGG-11's first two linear layers
    25: (141, 82),
    150: (24, 14),
    225: (16, 10),
    300: (12, 7),
    400: (9, 6),
    500: (8, 5),
    600: (6, 4),
}


def test_rounding_up_gives_all_reported_ranks() -> None:
    found = {
        ratio: tuple(rank_for_ratio(4096, n, ratio, rounding="up") for n in (25088, 4096))
        for ratio in REPORTED
    }
    assert found == REPORTED


@FIXED
@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.1, 50))
def test_rounding_down_gives_the_largest_rank_that_keeps_the_ratio(
    m: int, n: int, ratio: float
) -> None:
    def reached(k: int) -> float:
        return m * n / (k * (m + n))

    k = rank_for_ratio(m, n, ratio)
    assert k == 1 or reached(k) >= ratio * (1 - 1e-11)
    assert k == min(m, n) or reached(k + 1) < ratio


@FIXED
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 300))
def test_the_ratio_of_a_rank_gives_the_rank_again(m: int, n: int, k: int) -> None:
    k = min(k, m, n)
    for rounding in ("down", "up"):
        assert rank_for_ratio(m, n, m * n / (k * (m + n)), rounding=rounding) == k  # type: ignore[arg-type]


def test_a_rank_pays_if_its_factors_are_smaller() -> None:
    for k in range(1, 12):
        factors = svd_factors(normal(12, 18), k)
        assert pays(12, 18, k) == (sum(f.numel() for f in factors) < 12 * 18)


@pytest.mark.parametrize("d", [1, 6])
def test_a_root_times_its_transpose_is_the_covariance(d: int) -> None:
    c = normal(d, 4) @ normal(d, 4).T
    root = covariance_root(c)
    assert root.shape == (d, min(d, 4))
    torch.testing.assert_close(root @ root.T, c, rtol=1e-12, atol=1e-13)
    assert not covariance_root(torch.zeros(d, d)).any()


@pytest.mark.parametrize("call", [truncated_svd, randomized_svd, svd_factors])
def test_what_has_no_low_rank_is_refused(call: object) -> None:
    with pytest.raises(ValueError, match="rank 0: ask for 1 or more"):
        call(torch.eye(2), 0)  # type: ignore[operator]
    for bad, words in [
        (torch.tensor([[float("nan")]]), "not finite"),
        (torch.tensor([[float("inf")]]), "not finite"),
        (torch.ones(3), "need a real matrix"),
        (torch.ones(0, 3), "with entries"),
        (torch.ones(1, 1, dtype=torch.complex64), "need a real matrix"),
    ]:
        with pytest.raises(ValueError, match=words):
            call(bad, 1)  # type: ignore[operator]


def test_bad_options_say_what_to_give() -> None:
    for call, words in [
        (lambda: randomized_svd(torch.eye(2), 1, oversample=-1), "give 0 or more"),
        (lambda: rank_for_energy(torch.ones(2), 0), "up to 1"),
        (lambda: rank_for_error(torch.ones(2), 1), "below 1"),
        (lambda: rank_for_energy(torch.tensor([1.0, 2.0]), 0.5), "sort them first"),
        (lambda: rank_for_ratio(3, 3, 0), "ratio above 0"),
        (lambda: covariance_root(torch.ones(2, 3)), "square"),
        (lambda: covariance_root(torch.ones(2, 2).triu()), "symmetric"),
        (lambda: covariance_root(-torch.eye(2)), "no negative eigenvalue"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    assert finite_matrix(torch.ones(1, 1, requires_grad=True)).requires_grad is False
