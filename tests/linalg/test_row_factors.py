"""A layer through some of its own outputs, in the metric of its data."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor

from fxsvd.linalg.cur import METHODS, choose_rows, row_factors


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def on_data(inputs: Tensor, w: Tensor, product: Tensor) -> float:
    return float(torch.linalg.matrix_norm(inputs @ (w - product).T))


INPUTS = normal(50, 7, seed=5) @ normal(7, 7, seed=6)
COVARIANCE = INPUTS.T @ INPUTS / 50


def test_the_left_factor_is_least_squares_on_the_data() -> None:
    w, rows = normal(9, 7), torch.tensor([8, 0, 3])
    factors = row_factors(w, COVARIANCE, 3, rows)
    y = (INPUTS @ w.T).numpy()
    oracle = np.linalg.lstsq(y[:, rows.numpy()], y, rcond=None)[0].T
    np.testing.assert_allclose(factors.left.numpy(), oracle, rtol=0, atol=1e-11)
    assert torch.equal(factors.right, w[rows])


def test_the_left_factor_is_the_formula_of_second_moments() -> None:
    w, rows = normal(9, 7), torch.tensor([1, 4])
    cross = w @ COVARIANCE @ w.T
    formula = cross[:, rows] @ torch.linalg.pinv(cross[rows][:, rows])
    factors = row_factors(w, COVARIANCE, 2, rows)
    torch.testing.assert_close(factors.left, formula, rtol=0, atol=1e-11)


@pytest.mark.parametrize("method", METHODS)
def test_chosen_rows_are_kept_exactly(method: str) -> None:
    w = normal(9, 7)
    factors = row_factors(w, COVARIANCE, 4, method=method, seed=3)
    rows = choose_rows(w, COVARIANCE, 4, method, 3)
    assert torch.equal(factors.product()[rows], w[rows])


def test_pivoted_qr_on_the_data_chooses_the_greedy_best() -> None:
    """By brute force: each step takes the row of largest remaining output."""
    w = normal(8, 7)
    y, chosen = INPUTS @ w.T, []
    for _ in range(4):
        chosen.append(int(y.square().sum(0).argmax()))
        unit = y[:, chosen[-1]] / torch.linalg.vector_norm(y[:, chosen[-1]])
        y = y - torch.outer(unit, unit @ y)
    assert choose_rows(w, COVARIANCE, 4).tolist() == chosen


@pytest.mark.parametrize("method", ["qr", "deim"])
def test_no_other_rows_are_very_much_better(method: str) -> None:
    """Every choice of two of seven is tried; no row space beats the principal components."""
    w = normal(7, 7)

    def lost(rows: Tensor) -> float:
        return on_data(INPUTS, w, row_factors(w, COVARIANCE, 2, rows).product())

    best = min(lost(torch.tensor(pair)) for pair in combinations(range(7), 2))
    found = lost(choose_rows(w, COVARIANCE, 2, method))
    floor = float(torch.linalg.svdvals(INPUTS @ w.T)[2:].square().sum().sqrt())
    assert floor <= best <= found <= 2 * best  # rank + 1 of volume sampling is proven for means


def test_copied_inputs_need_no_more_rows_than_there_are_originals() -> None:
    w, originals = normal(10, 12), normal(50, 3, seed=8)
    copies = originals.repeat_interleave(4, dim=1)
    factors = row_factors(w, copies.T @ copies, 9)
    assert factors.right.shape == (3, 12)
    assert on_data(copies, w, factors.product()) <= 1e-11 * on_data(copies, w, w * 0)


def test_constant_and_absent_inputs_are_no_trouble() -> None:
    w = normal(5, 4)
    for inputs in (torch.zeros(3, 4).double(), torch.ones(3, 4).double(), normal(1, 4) * 1e20):
        factors = row_factors(w, inputs.T @ inputs, 2)
        assert bool(torch.isfinite(factors.left).all())
        assert on_data(inputs, w, factors.product()) <= 1e-11 * on_data(inputs, w, w * 0)


def test_dead_outputs_get_zeros() -> None:
    w = normal(5, 7)
    w[2] = 0
    factors = row_factors(w, COVARIANCE, 4)
    assert not factors.product()[2].any()
    assert not torch.isnan(factors.left).any()


def test_bad_requests_say_what_to_give() -> None:
    w, c = normal(4, 3), torch.eye(3)
    for call, words in [
        (lambda: row_factors(w, c, 2, torch.tensor([1, 1])), "give 2 different rows"),
        (lambda: row_factors(w, c, 3, torch.tensor([1, 2])), "give 3 different rows"),
        (lambda: row_factors(w, torch.eye(2), 2), "3 inputs, but a covariance of 2"),
        (lambda: row_factors(w, c, 0), "rank 0"),
        (lambda: choose_rows(w, c, 2, "best"), "take one of linear-time"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
