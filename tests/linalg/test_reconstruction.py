"""Least squares from moments: against samples, normal equations and closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxsvd.linalg.reconstruction import (
    RIDGE,
    Reconstruction,
    centred,
    intercept,
    least_squares,
)
from fxsvd.linalg.second_moments import cholesky, standardize

EACH = torch.arange(5)[:, None]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def samples(d: int, n: int, seed: int = 0) -> Tensor:
    """Correlated inputs of different size and mean, d×n."""
    mix = normal(d, d, seed=seed) * torch.logspace(-1, 1, d, dtype=torch.float64)[:, None]
    return mix @ normal(d, n, seed=seed + 1) + normal(d, 1, seed=seed + 2)


def second_moment(x: Tensor) -> Tensor:
    return x @ x.T / x.shape[1]


def close(a: Tensor | float, b: Tensor | float, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=rtol, atol=atol)


@pytest.mark.parametrize("outputs", [1, 3, 5, 9])
def test_loss_and_error_are_those_of_the_samples(outputs: int) -> None:
    x, w = samples(5, 40), normal(outputs, 5, seed=7)
    ryx = w @ second_moment(x)
    energy = float((w @ x).square().sum() / 40)
    problem = Reconstruction(second_moment(x), ryx, energy, EACH)
    m = normal(outputs, 5, seed=8)
    error = float((w @ x - m @ x).square().sum() / 40)
    close(problem.loss(m), error / 2)
    close(problem.error(m), error / energy)


def test_the_gradient_is_that_of_the_loss() -> None:
    problem = Reconstruction.of_weight(normal(3, 5), second_moment(samples(5, 9)), EACH)
    m, step = normal(3, 5, seed=1), normal(3, 5, seed=2)
    # The loss is quadratic, so that a central difference is exact.
    slope = (problem.loss(m + step) - problem.loss(m - step)) / 2
    close(float((problem.gradient(m) * step).sum()), slope)


def test_of_weight_loses_nothing_by_reducing_many_outputs() -> None:
    r, w = second_moment(samples(5, 30)), normal(20, 5)
    full = Reconstruction(r, w @ r, float(((w @ r) * w).sum()), EACH)
    small = Reconstruction.of_weight(w, r, EACH)
    assert small.ryx.shape == (5, 5)
    assert small.energy == full.energy
    kept = torch.tensor([0, 2, 3])
    for problem in (full, small):
        m = torch.zeros_like(problem.ryx)
        m[:, kept] = least_squares(r, problem.ryx, kept, ridge=0.0)
        close(
            problem.error(m), full.error(_padded(least_squares(r, full.ryx, kept, ridge=0), kept))
        )
    close(small.ryx.norm(dim=0), full.ryx.norm(dim=0))


def _padded(m: Tensor, kept: Tensor) -> Tensor:
    out = m.new_zeros(len(m), 5)
    out[:, kept] = m
    return out


def test_support_follows_groups_and_keeps_what_none_names() -> None:
    groups = torch.tensor([[4, 0], [2, -1], [-1, -1]])
    problem = Reconstruction(torch.eye(5), torch.eye(5), 5.0, groups)
    assert problem.owner.tolist() == [0, 3, 1, 3, 0]
    assert problem.support(torch.tensor([False, True, True])).tolist() == [1, 2, 3]
    assert problem.support(torch.tensor([True, False, False])).tolist() == [0, 1, 3, 4]


def test_curvature_is_the_largest_eigenvalue() -> None:
    r = torch.diag(torch.tensor([2.0, 7.0, 1.0]))
    close(Reconstruction(r, torch.zeros(1, 3), 0.0, EACH[:3]).curvature, 7.0)


def test_a_target_of_zero_has_no_error_at_zero_and_an_infinite_one_elsewhere() -> None:
    problem = Reconstruction(torch.eye(5), torch.zeros(2, 5), 0.0, EACH)
    assert problem.error(torch.zeros(2, 5)) == 0.0
    assert problem.error(torch.ones(2, 5)) == float("inf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"second": torch.eye(4)}, "do not fit"),
        ({"second": torch.full((5, 5), torch.nan)}, "not finite"),
        ({"energy": -1.0}, "from 0"),
        ({"energy": float("nan")}, "from 0"),
        ({"groups": torch.tensor([[0], [0]])}, "twice"),
        ({"groups": torch.tensor([[5]])}, "name entries"),
        ({"groups": torch.tensor([[-2]])}, "name entries"),
        ({"groups": torch.arange(5)}, "channels × entries"),
    ],
)
def test_a_problem_that_makes_no_sense_is_refused(change: dict[str, object], message: str) -> None:
    fine: dict[str, object] = {
        "second": torch.eye(5), "ryx": torch.ones(2, 5), "energy": 10.0, "groups": EACH
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        Reconstruction(**{**fine, **change})  # type: ignore[arg-type]


def test_support_refuses_anything_but_a_bool_per_channel() -> None:
    problem = Reconstruction(torch.eye(5), torch.eye(5), 5.0, EACH)
    with pytest.raises(ValueError, match="one bool"):
        problem.support(torch.tensor([0, 1]))


def test_without_a_ridge_it_is_the_least_squares_fit_to_the_samples() -> None:
    x, y = samples(6, 50), normal(3, 50, seed=9)
    kept = torch.tensor([True, False, True, True, False, True])
    expected = torch.linalg.lstsq(x[kept].T, y.T).solution.T
    close(least_squares(second_moment(x), y @ x.T / 50, kept, ridge=0.0), expected)


def test_it_solves_the_normal_equations_with_the_ridge_of_each_input() -> None:
    r, ryx = second_moment(samples(6, 4)), normal(3, 6)  # of rank 4
    p = least_squares(r, ryx, torch.arange(6), ridge=1e-3)
    close(p @ (r + 1e-3 * torch.diag(r.diagonal())), ryx)


def test_scaling_inputs_scales_coefficients_and_nothing_else() -> None:
    r, ryx = second_moment(samples(6, 30)), normal(3, 6)
    scale = torch.logspace(-9, 9, 6, dtype=torch.float64)
    scaled = least_squares(r * scale[:, None] * scale, ryx * scale, torch.arange(6))
    close(scaled * scale, least_squares(r, ryx, torch.arange(6)), atol=0)


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_inputs_without_variance_get_coefficients_of_zero(size: float) -> None:
    x = samples(4, 20) * size
    x[1] = 0
    fit = least_squares(second_moment(x), normal(2, 20) @ x.T, torch.arange(4))
    assert fit.isfinite().all()
    assert (fit[:, 1] == 0).all()
    assert (fit[:, [0, 2, 3]] != 0).all()


def test_duplicates_share_the_coefficient_and_reconstruct_exactly() -> None:
    x = samples(3, 30)[[0, 1, 2, 0, 0]]
    w = normal(2, 5)
    problem = Reconstruction.of_weight(w, second_moment(x), EACH)
    fit = least_squares(problem.r, problem.ryx, torch.arange(5), ridge=1e-3)
    close(fit[:, [0, 3]], fit[:, [4, 4]])
    for ridge in (0.0, 1e-10):  # no ridge at all is raised to the least that solves the system
        fit = least_squares(problem.r, problem.ryx, torch.arange(5), ridge=ridge)
        assert problem.error(fit) < 1e-12


@pytest.mark.parametrize("ridge", [1e-6, 1e-4])
def test_the_error_that_a_ridge_adds_is_bounded(ridge: float) -> None:
    x = samples(8, 5)
    problem = Reconstruction.of_weight(normal(3, 8), second_moment(x), torch.arange(8)[:, None])
    m = normal(3, 8)  # an exact solution: the target itself
    fit = least_squares(problem.r, problem.ryx, torch.arange(8), ridge=ridge)
    bound = ridge / 4 * float((m.square() * problem.r.diagonal()).sum())
    assert 2 * problem.loss(fit) <= bound


def test_nothing_at_all_gives_zeros() -> None:
    assert (least_squares(torch.zeros(3, 3), torch.zeros(2, 3), torch.arange(3)) == 0).all()
    assert least_squares(torch.eye(3), torch.ones(2, 3), torch.arange(0)).shape == (2, 0)


def test_what_is_no_second_moment_is_refused() -> None:
    indefinite = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    with pytest.raises(ValueError, match="no second moment"):
        least_squares(indefinite, torch.ones(1, 2), torch.arange(2))
    with pytest.raises(ValueError, match="ridge"):
        least_squares(torch.eye(2), torch.ones(1, 2), torch.arange(2), ridge=-1.0)
    with pytest.raises(ValueError, match="not finite"):
        least_squares(torch.eye(2) * torch.nan, torch.ones(1, 2), torch.arange(2))


def test_a_ridge_is_raised_only_as_far_as_it_takes() -> None:
    slightly_indefinite = torch.tensor([[1.0, 1 + 1e-7], [1 + 1e-7, 1.0]], dtype=torch.float64)
    lower = cholesky(slightly_indefinite, 0.0)
    close(float((lower @ lower.T)[0, 0]), 1 + 1e-6)


def test_standardize_gives_correlations() -> None:
    x = samples(4, 30)
    matrix, scale = standardize(centred(second_moment(x), x.mean(dim=1)))
    close(matrix, torch.corrcoef(x))
    close(scale, 1 / x.std(dim=1, correction=0))


def test_centred_is_the_covariance_and_exactly_zero_for_constants() -> None:
    x = samples(5, 30)
    x[3] = 1 / 3
    covariance = centred(second_moment(x), x.mean(dim=1))
    varying = [0, 1, 2, 4]
    close(covariance[varying][:, varying], torch.cov(x, correction=0)[varying][:, varying])
    assert (covariance[3] == 0).all()
    assert (covariance[:, 3] == 0).all()


def test_centring_is_an_unpenalised_constant_input() -> None:
    x, w, b = samples(5, 40), normal(3, 5), normal(3)
    kept = torch.tensor([0, 1, 4])
    y, mean = w @ x + b[:, None], x.mean(dim=1)
    covariance = centred(second_moment(x), mean)
    m = least_squares(covariance, w @ covariance, kept)
    bias = intercept(b, w, mean, m, mean[kept])

    extended = torch.cat([x[kept], torch.ones(1, 40, dtype=torch.float64)])
    penalty = torch.cat([RIDGE * covariance.diagonal()[kept], torch.zeros(1).double()])
    system = second_moment(extended) + torch.diag(penalty)
    expected = torch.linalg.solve(system, extended @ y.T / 40).T
    close(torch.cat([m, bias[:, None]], dim=1), expected)
    close((m @ x[kept]).mean(dim=1) + bias, y.mean(dim=1))


def test_a_constant_input_folds_into_the_bias_exactly() -> None:
    x, w = samples(3, 40), normal(2, 3)
    x[1] = 2.5
    mean = x.mean(dim=1)
    covariance = centred(second_moment(x), mean)
    kept = torch.tensor([0, 2])
    m = least_squares(covariance, w @ covariance, kept, ridge=0.0)
    close(m @ x[kept] + intercept(None, w, mean, m, mean[kept])[:, None], w @ x)
