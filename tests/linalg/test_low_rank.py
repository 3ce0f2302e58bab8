"""Low rank from moments: eigenvalue tails, optimality, exactness on data of low rank."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fxsvd.linalg.low_rank import (
    fit_near,
    output_pca,
    principal_outputs,
    projection,
    reduced_rank,
    weighted_svd,
)
from fxsvd.linalg.svd import svd_factors

SHAPES = [(4, 6), (6, 4), (5, 5), (1, 5), (5, 1), (12, 3)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moment(d: int, rank: int | None = None, seed: int = 3) -> Tensor:
    """A second moment with a decaying spectrum, of full rank if none is given."""
    x = normal(d, rank or 4 * d, seed=seed)
    scale = torch.logspace(0, 2, d, dtype=torch.float64)[:, None]
    return (x * scale) @ (x * scale).T / x.shape[1]


def energy(w: Tensor, c: Tensor, g: Tensor | None = None) -> float:
    """E ‖W x‖², or E (W x)ᵀ G (W x)."""
    wcw = w @ c @ w.T
    return float(torch.trace(wcw if g is None else g @ wcw))


def root(c: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(c)
    half: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return half


@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_of_output_pca_is_the_tail_of_the_singular_values(shape: tuple[int, int]) -> None:
    w, c = normal(*shape), moment(shape[1])
    s = torch.linalg.svdvals(w @ root(c)).square()
    for rank in range(1, min(shape) + 1):
        factors, error = output_pca(w, c, rank)
        assert (factors.left.shape[1], factors.right.shape[0]) == (rank, rank)
        assert error == pytest.approx(float(s[rank:].sum() / s.sum()), rel=1e-9, abs=1e-13)
        measured = energy(w - factors.product(), c) / energy(w, c)
        assert measured == pytest.approx(error, rel=1e-9, abs=1e-13)


@pytest.mark.parametrize("shape", SHAPES)
def test_output_pca_is_the_projected_weight_and_dominates_the_plain_svd(
    shape: tuple[int, int],
) -> None:
    w, c = normal(*shape), moment(shape[1])
    for rank in range(1, min(shape) + 1):
        factors, error = output_pca(w, c, rank)
        u = factors.left
        torch.testing.assert_close(u.T @ u, torch.eye(rank, dtype=torch.float64))
        torch.testing.assert_close(factors.product(), u @ u.T @ w)
        plain = energy(w - svd_factors(w, rank).product(), c) / energy(w, c)
        assert error <= plain + 1e-12
        assert rank == min(shape) or error < plain


def test_with_white_inputs_output_pca_is_the_plain_svd() -> None:
    w = normal(5, 7)
    factors, _ = output_pca(w, torch.eye(7) * 3, 3)
    torch.testing.assert_close(factors.product(), svd_factors(w, 3).product())


@pytest.mark.parametrize("rank", [6, 7, 100])
def test_inputs_copied_many_times_leave_an_exact_layer_of_their_number(rank: int) -> None:
    """The small form of a pooled feature map of 6 values read 49 times each by 40 outputs."""
    x = (normal(6, 30) * torch.logspace(0, 3, 6, dtype=torch.float64)[:, None]).repeat(49, 1)
    w, c = normal(40, 294), x @ x.T / 30
    factors, error = output_pca(w, c, rank)
    assert error < 1e-14
    assert energy(w - factors.product(), c) <= 1e-14 * energy(w, c)
    assert output_pca(w, c, 5)[1] > 1e-8


@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_scale_does_not_matter(size: float) -> None:
    w, c = normal(4, 6), moment(6, rank=3)
    factors, error = output_pca(w, c, 2)
    scaled, same = output_pca(w * size, c * size, 2)
    assert same == pytest.approx(error, rel=1e-9)
    torch.testing.assert_close(scaled.product() / size, factors.product())


def test_a_layer_without_output_has_no_error() -> None:
    for w, c in ((torch.zeros(3, 4), torch.eye(4)), (torch.ones(3, 4), torch.zeros(4, 4))):
        factors, error = output_pca(w, c, 2)
        assert error == 0.0
        assert factors.product().isfinite().all()
    assert weighted_svd(torch.ones(3, 4), torch.eye(4), torch.zeros(3, 3), 2)[1] == 0.0
    assert (reduced_rank(torch.zeros(4, 4), torch.zeros(3, 4), 2).product() == 0).all()


def test_principal_outputs_need_the_covariance_of_the_output_only() -> None:
    w, c = normal(5, 7), moment(7)
    u, error = principal_outputs(w @ c @ w.T, 2)
    factors, same = output_pca(w, c, 2)
    assert error == pytest.approx(same, rel=1e-12)
    torch.testing.assert_close(u @ u.T @ w, factors.product())
    best, _ = principal_outputs(w @ c @ w.T, 1)
    torch.testing.assert_close((best.T @ u).abs(), torch.tensor([[1.0, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("rank", [1, 2])
def test_nothing_of_the_same_rank_beats_reduced_rank_regression(rank: int) -> None:
    x, y = normal(4, 40), normal(3, 40, seed=5) + normal(3, 4, seed=6) @ normal(4, 40)
    r, ryx = x @ x.T / 40, y @ x.T / 40
    factors = reduced_rank(r, ryx, rank, ridge=0.0)

    def loss(left: Tensor, right: Tensor) -> Tensor:
        return (y - left @ right @ x).square().sum() / 40

    found = float(loss(*factors))
    for scale in (1e-1, 1e-3, 1e-5):
        for seed in range(20):
            left = factors.left + scale * normal(3, rank, seed=seed)
            right = factors.right + scale * normal(rank, 4, seed=seed + 100)
            assert float(loss(left, right)) >= found
    left = factors.left + 0.3 * normal(3, rank, seed=1)
    for _ in range(400):  # minimising over either factor in turn comes back to it
        right = torch.linalg.pinv(left) @ y @ torch.linalg.pinv(x)
        left = y @ torch.linalg.pinv(right @ x)
    assert float(loss(left, right)) == pytest.approx(found, rel=1e-9)


@pytest.mark.parametrize("outputs", [3, 5, 9])
def test_reduced_rank_regression_is_least_squares_cut_in_the_metric_of_its_inputs(
    outputs: int,
) -> None:
    r, ryx = moment(5), normal(outputs, 5) @ moment(5, seed=4)
    fit = ryx @ torch.linalg.inv(r)
    u, s, vh = torch.linalg.svd(fit @ root(r), full_matrices=False)
    for rank in range(1, min(outputs, 5) + 1):
        expected = (u[:, :rank] * s[:rank]) @ vh[:rank] @ torch.linalg.inv(root(r))
        found = reduced_rank(r, ryx, rank, ridge=0.0).product()
        assert float((found - expected).norm()) <= 1e-9 * float(expected.norm())


def test_reduced_rank_regression_on_the_layers_own_input_is_output_pca() -> None:
    w, c = normal(4, 6), moment(6)
    expected = output_pca(w, c, 2)[0].product()
    torch.testing.assert_close(reduced_rank(c, w @ c, 2, ridge=0.0).product(), expected)


@pytest.mark.parametrize("rows", [4, 9, 300])
def test_a_fit_near_a_matrix_is_ridge_regression_of_what_it_leaves(rows: int) -> None:
    x, y, w = normal(rows, 6), normal(rows, 3, seed=1), normal(3, 6, seed=2)
    x[:, 2], x[:, 4] = 0.0, 10 * x[:, 5]  # an input without variance, and one that repeats another
    penalty = torch.diag(0.1 * torch.linalg.vector_norm(x, dim=0))
    rest = torch.cat([y - x @ w.T, torch.zeros(6, 3, dtype=torch.float64)])
    expected = w + torch.linalg.lstsq(torch.cat([x, penalty]), rest, driver="gelsd").solution.T
    found = fit_near(x, y, w, rows, [0.01])
    assert (found - expected).abs().max() < 1e-9
    assert torch.equal(found[:, 2], w[:, 2])


def test_a_fit_near_a_matrix_takes_the_ridge_that_leaving_rows_out_prefers() -> None:
    x, w, ridges = normal(40, 6), normal(3, 6, seed=2), (1e-6, 0.1, 10.0, 1e4)
    for noise in (1e-3, 30.0):
        y = x @ normal(3, 6, seed=5).T + noise * normal(40, 3, seed=4)
        scores = {}
        for ridge in ridges:
            hat = x @ torch.linalg.inv(x.T @ x + ridge * torch.diag(x.square().sum(0))) @ x.T
            left = (torch.eye(40) - hat) @ (y - x @ w.T)
            scores[ridge] = float(left.square().sum() / (1 - (1 + hat.trace()) / 40) ** 2)
        best = min(scores, key=lambda ridge: scores[ridge])
        expected = fit_near(x, y, w, 40, [best])
        assert torch.equal(fit_near(x, y, w, 40, ridges), expected)


def test_reduced_rank_regression_bears_inputs_that_repeat_each_other() -> None:
    c = moment(8, rank=3)
    w = normal(4, 8)
    factors = reduced_rank(c, w @ c, 3)
    assert factors.product().isfinite().all()
    assert energy(w - factors.product(), c) <= 1e-5 * energy(w, c)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_of_the_weighted_svd_is_the_tail_in_both_metrics(shape: tuple[int, int]) -> None:
    w, c, g = normal(*shape), moment(shape[1]), moment(shape[0], seed=9)
    u, s, vh = torch.linalg.svd(root(g) @ w @ root(c), full_matrices=False)
    for rank in range(1, min(shape) + 1):
        factors, error = weighted_svd(w, c, g, rank)
        assert error == pytest.approx(
            float(s[rank:].square().sum() / s.square().sum()), 1e-9, 1e-12
        )
        measured = energy(w - factors.product(), c, g) / energy(w, c, g)
        assert measured == pytest.approx(error, rel=1e-9, abs=1e-12)
        cut = (u[:, :rank] * s[:rank]) @ vh[:rank]
        expected = torch.linalg.inv(root(g)) @ cut @ torch.linalg.inv(root(c))
        assert float((factors.product() - expected).norm()) <= 1e-8 * float(expected.norm())
        assert (
            error <= energy(w - output_pca(w, c, rank)[0].product(), c, g) / energy(w, c, g) + 1e-12
        )


def test_the_weighted_svd_bears_singular_moments() -> None:
    w, c, g = normal(6, 8), moment(8, rank=4), moment(6, rank=3)
    s = torch.linalg.svdvals(root(g) @ w @ root(c)).square()
    for rank in (1, 2, 3, 6):
        factors, error = weighted_svd(w, c, g, rank)
        assert error == pytest.approx(float(s[rank:].sum() / s.sum()), rel=1e-9, abs=1e-12)
        measured = energy(w - factors.product(), c, g) / energy(w, c, g)
        assert measured == pytest.approx(error, rel=1e-9, abs=1e-12)


def test_with_equal_outputs_the_weighted_svd_is_output_pca() -> None:
    w, c = normal(4, 6), moment(6)
    expected, error = output_pca(w, c, 2)
    factors, same = weighted_svd(w, c, torch.eye(4) * 5, 2)
    assert same == pytest.approx(error, rel=1e-12)
    torch.testing.assert_close(factors.product(), expected.product())


def test_a_projection_has_orthonormal_rows_and_the_tail_as_its_error() -> None:
    c = moment(6)
    values = torch.linalg.eigvalsh(c).flip(0)
    for rank in range(1, 7):
        encode, decode, error = projection(c, rank)
        assert torch.equal(encode, decode.T)
        torch.testing.assert_close(encode @ decode, torch.eye(rank, dtype=torch.float64))
        assert error == pytest.approx(float(values[rank:].sum() / values.sum()), 1e-9, 1e-13)
        rest = torch.eye(6, dtype=torch.float64) - decode @ encode
        assert energy(rest, c) / energy(torch.eye(6, dtype=torch.float64), c) == pytest.approx(
            error, rel=1e-9, abs=1e-12
        )


def test_a_weighted_projection_loses_least_of_what_the_consumers_read() -> None:
    c = moment(6)
    consumers = [normal(4, 6), normal(9, 6, seed=1)]
    stacked = torch.cat(consumers)
    gram = stacked.T @ stacked
    identity = torch.eye(6, dtype=torch.float64)
    for rank in range(1, 7):
        encode, decode, error = projection(c, rank, gram=gram)
        torch.testing.assert_close(encode @ decode, torch.eye(rank, dtype=torch.float64))
        lost = sum(energy(w @ (identity - decode @ encode), c) for w in consumers)
        assert lost / energy(stacked, c) == pytest.approx(error, rel=1e-9, abs=1e-12)
        # No pair does better than the best map of that rank for all consumers together.
        assert error == pytest.approx(output_pca(stacked, c, rank)[1], rel=1e-9, abs=1e-12)
        plain = projection(c, rank)
        other = stacked @ (identity - plain.decode @ plain.encode)
        assert error <= energy(other, c) / energy(stacked, c) + 1e-12


def test_a_projection_is_exact_at_the_rank_of_the_data_or_of_the_consumers() -> None:
    identity = torch.eye(8, dtype=torch.float64)
    encode, decode, error = projection(moment(8, rank=3), 3)
    assert error < 1e-14
    assert energy(identity - decode @ encode, moment(8, rank=3)) < 1e-12 * 1e4
    w = normal(2, 8)
    encode, decode, error = projection(moment(8), 2, gram=w.T @ w)
    assert error < 1e-14
    torch.testing.assert_close(w @ decode @ encode, w)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: output_pca(torch.eye(3), torch.eye(3), 0), "rank 0"),
        (lambda: output_pca(torch.eye(3), torch.eye(4), 1), "do not fit"),
        (lambda: output_pca(torch.eye(3) * torch.nan, torch.eye(3), 1), "not finite"),
        (lambda: output_pca(torch.ones(2, 3), torch.ones(2, 3), 1), "square"),
        (lambda: principal_outputs(torch.eye(3), 0), "rank 0"),
        (lambda: reduced_rank(torch.eye(3), torch.ones(2, 4), 1), "do not fit"),
        (lambda: reduced_rank(torch.eye(3), torch.ones(2, 3), 0), "rank 0"),
        (lambda: weighted_svd(torch.ones(2, 3), torch.eye(3), torch.eye(3), 1), "2 outputs"),
        (lambda: projection(torch.eye(3), 1, gram=torch.eye(2)), "output moment"),
        (lambda: projection(torch.eye(3), 0), "rank 0"),
    ],
)
def test_what_makes_no_sense_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
