"""Generalized cross-validation against the hat matrix of the rows themselves."""

from __future__ import annotations

import pytest
import torch

from fxsvd.linalg.reconstruction import least_squares
from fxsvd.linalg.second_moments import Root
from fxsvd.linalg.validation import cross_validation_scores, validated_ridge

RIDGES = (1e-6, 1e-4, 1e-2, 1.0)


def moments(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    x, y = x - x.mean(0), y - y.mean(0)
    return x.T @ x / len(x), y.T @ x / len(x), float(y.square().sum() / len(x))


def sample(rows: int, entries: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + entries)
    x = torch.randn(rows, entries, generator=generator, dtype=torch.float64)
    x = x * torch.linspace(0.5, 3, entries) + 2
    w = torch.randn(entries, 3, generator=generator, dtype=torch.float64)
    y = x @ w + noise * torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    return x, y


@pytest.mark.parametrize("entries", [4, 30, 80])
def test_scores_are_those_of_the_hat_matrix(entries: int) -> None:
    x, y = sample(40, entries, 1.0)
    ridges = RIDGES[1:]  # with the weakest, 80 entries leave nothing but rounding of 40 rows
    scores = cross_validation_scores(*moments(x, y), rows=40, ridges=ridges)
    x, y = x - x.mean(0), y - y.mean(0)
    for ridge, score in zip(ridges, scores, strict=True):
        penalty = 40 * ridge * torch.diag(x.var(0, unbiased=False))
        hat = x @ torch.linalg.solve(x.T @ x + penalty, x.T) + 1 / 40  # the mean is fitted too
        rest = (y - (hat - 1 / 40) @ y).square().sum() / 40
        expected = rest / (1 - hat.trace() / 40) ** 2
        torch.testing.assert_close(score, expected, rtol=1e-6, atol=0)


def test_a_constant_input_takes_no_part() -> None:
    x, y = sample(40, 30, 1.0)
    r, ryx, energy = moments(x, y)
    expected = cross_validation_scores(r, ryx, energy, 40, RIDGES)
    r, ryx = torch.block_diag(r, torch.zeros(9, 9)), torch.cat([ryx, torch.zeros(3, 9)], 1)
    torch.testing.assert_close(cross_validation_scores(r, ryx, energy, 40, RIDGES), expected)


def test_a_root_is_scored_as_what_it_stands_for() -> None:
    x, y = sample(25, 30, 1.0)
    x[:, 3] = 0
    r, ryx, energy = moments(x, y)
    root = Root((x - x.mean(0)) / 5)
    scores = cross_validation_scores(root, ryx, energy, 25, RIDGES[1:])
    expected = cross_validation_scores(r, ryx, energy, 25, RIDGES[1:])
    torch.testing.assert_close(scores, expected, rtol=1e-7, atol=1e-12 * energy)


def test_an_exact_relation_needs_no_ridge() -> None:
    x, y = sample(200, 10, 0.0)
    assert validated_ridge(*moments(x, y), rows=200, ridges=RIDGES) == RIDGES[0]


def test_noise_that_fills_the_rows_needs_the_strongest() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 60, generator=generator, dtype=torch.float64)
    y = torch.randn(30, 2, generator=generator, dtype=torch.float64)
    assert validated_ridge(*moments(x, y), rows=30, ridges=RIDGES) == RIDGES[-1]


def test_the_chosen_ridge_does_better_on_new_rows_than_the_weakest() -> None:
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(80, 4, generator=generator, dtype=torch.float64)

    def draw(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(rows, 80, generator=generator, dtype=torch.float64)
        noise = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
        return x, x @ w + 5 * noise

    x, y = draw(100)
    r, ryx, energy = moments(x, y)
    everything = torch.arange(80)
    new_x, new_y = draw(5000)

    def error(ridge: float) -> float:
        m = least_squares(r, ryx, everything, ridge=ridge)
        return float((new_y - y.mean(0) - (new_x - x.mean(0)) @ m.T).square().mean())

    assert error(validated_ridge(r, ryx, energy, 100, RIDGES)) < 0.8 * error(RIDGES[0])


def test_moments_of_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="no rows"):
        cross_validation_scores(torch.eye(1), torch.eye(1), 1.0, 0, RIDGES)
