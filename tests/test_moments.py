"""Streamed moments against the one-shot formula in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fxsvd.data import rows as rows_module
from fxsvd.data.moments import Moment

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def pairs(count: int = 60, offset: float = 0.0, groups: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, groups, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(count, groups, 3, generator=generator, dtype=torch.float64)
    return x + offset, y + x[..., :3] - offset


def one_shot(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    dx, dy = x - x.mean(0), y - y.mean(0)
    return {
        "mean": x.mean(0),
        "scatter": torch.einsum("ngi,ngj->gij", dx, dx),
        "mean_y": y.mean(0),
        "cross": torch.einsum("ngi,ngj->gij", dy, dx),
        "scatter_y": dy.square().sum(0),
    }


def streamed(x: Tensor, y: Tensor | None, sizes: list[int]) -> Moment:
    moment = Moment()
    cuts = [0, *itertools.accumulate(sizes)]
    for a, b in itertools.pairwise(cuts):
        moment.add(x[a:b], None if y is None else y[a:b])
    return moment


def assert_is(moment: Moment, x: Tensor, y: Tensor, **tolerance: float) -> None:
    assert moment.count == len(x)
    moment.covariance  # noqa: B018  # leaves the dual form
    for name, expected in one_shot(x, y).items():
        torch.testing.assert_close(getattr(moment, name), expected, **(tolerance or EXACT))


@pytest.mark.parametrize("sizes", [[60], [1, 59], [20, 20, 20], [2, 1, 3, 4, 50], [59, 1]])
def test_batches_of_any_size_give_the_one_shot_formula(sizes: list[int]) -> None:
    x, y = pairs()
    assert_is(streamed(x, y, sizes), x, y)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_moments_merge_in_any_order(order: tuple[int, ...]) -> None:
    x, y = pairs()
    parts = [(x[:3], y[:3]), (x[3:40], y[3:40]), (x[40:], y[40:])]
    out = Moment()
    for i in order:
        part = Moment()
        part.add(*parts[i])
        out.merge(part)
    assert_is(out, x, y)


def test_merging_leaves_the_other_moment_as_it_is() -> None:
    x, y = pairs()
    for size in (3, 30):  # in the dual form, and beyond it
        first, second, out = (streamed(x[:size], y[:size], [size]) for _ in range(3))
        out = Moment()
        out.merge(first)
        out.merge(second)
        out.add(x[40:], y[40:])
        assert_is(first, x[:size], y[:size])
        assert_is(second, x[:size], y[:size])


def test_a_large_offset_costs_no_digits_in_float64() -> None:
    x, y = pairs(600, offset=1e6)
    near, near_y = pairs(600)
    moment = streamed(x, y, [100] * 6)
    expected = one_shot(near, near_y)
    torch.testing.assert_close(moment.scatter, expected["scatter"], rtol=1e-8, atol=1e-6)
    torch.testing.assert_close(moment.cross, expected["cross"], rtol=1e-8, atol=1e-6)


def test_a_large_offset_costs_no_digits_in_float32() -> None:
    """The rounded mean is off by up to 0.03 there; these are the very numbers in float64."""
    x, y = (t.float() for t in pairs(600, offset=1e6))
    moment = streamed(x, y, [100] * 6)
    assert_is(moment, x.double(), y.double(), rtol=1e-5, atol=1e-3)
    expected = one_shot(x.double(), y.double())["mean"]
    torch.testing.assert_close(moment.mean, expected, rtol=1e-14, atol=1e-7)


def test_batches_at_different_offsets_count_their_distance() -> None:
    x, y = pairs()
    x[30:] += 1e4
    assert_is(streamed(x, y, [10] * 6), x, y, rtol=1e-9, atol=1e-5)


def test_half_precision_is_multiplied_in_float32() -> None:
    x = pairs(200)[0].to(torch.bfloat16)
    moment = streamed(x, None, [100, 100])
    expected = one_shot(x.double(), x.double())["scatter"]
    torch.testing.assert_close(moment.scatter, expected, rtol=1e-5, atol=1e-4)


def test_pairs_do_not_change_the_moment_of_x() -> None:
    x, y = pairs()
    alone, paired = streamed(x, None, [30, 30]), streamed(x, y, [30, 30])
    assert torch.equal(alone.covariance, paired.covariance)
    assert alone.cross is None


def test_pairs_and_no_pairs_do_not_mix() -> None:
    x, y = pairs()
    moment = streamed(x, y, [60])
    with pytest.raises(ValueError, match="pairs"):
        moment.add(x)
    with pytest.raises(ValueError, match="pairs"):
        moment.merge(streamed(x, None, [60]))


def test_no_rows_are_no_rows() -> None:
    x, y = pairs()
    moment = Moment()
    moment.add(x[:0], y[:0])
    moment.merge(Moment())
    assert (moment.count, moment.mean, moment.finite) == (0, None, True)
    moment.merge(streamed(x, y, [60]))
    moment.add(x[:0], y[:0])
    assert_is(moment, x, y)


def test_second_moment_is_about_zero() -> None:
    x, _ = pairs(offset=3.0)
    moment = streamed(x, None, [60])
    expected = torch.einsum("ngi,ngj->gij", x, x) / len(x)
    torch.testing.assert_close(moment.second, expected, **EXACT)
    torch.testing.assert_close(moment.covariance, moment.scatter / 60, **EXACT)


def test_wide_rows_are_kept_until_they_are_as_many_as_their_entries() -> None:
    x = torch.randn(12, 1, 10, dtype=torch.float64)
    moment = streamed(x, None, [4, 4])
    assert moment.scatter is None
    assert sum(map(len, moment.rows)) == 8
    assert moment.accuracy == math.inf
    moment.add(x[8:])
    assert moment.rows == ()
    torch.testing.assert_close(moment.scatter, one_shot(x, x)["scatter"], **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_product_with_the_covariance_is_the_same_in_both_forms(dtype: torch.dtype) -> None:
    x, w = pairs(4)[0].to(dtype) + 7, torch.randn(2, 6, 5, dtype=torch.float64)
    moment = streamed(x, None, [2, 2])
    kept = moment.times(w)
    assert moment.scatter is None
    exact = one_shot(x.double(), x.double())["scatter"] / 4
    torch.testing.assert_close(kept, w @ exact, **EXACT)
    dense = w @ moment.covariance
    torch.testing.assert_close(dense, moment.times(w), **EXACT)
    torch.testing.assert_close(dense, kept, rtol=1e-5, atol=1e-6)


def test_the_root_multiplies_out_to_the_covariance() -> None:
    x = pairs(4, offset=7.0)[0]
    moment = streamed(x, None, [3, 1])
    root = moment.root
    assert root is not None
    assert root.shape == (2, 4, 5)
    torch.testing.assert_close(root.mT @ root, one_shot(x, x)["scatter"] / 4, **EXACT)
    torch.testing.assert_close(root.mT @ root, moment.covariance, **EXACT)
    assert moment.root is None  # multiplied out
    assert Moment().root is None


def test_rows_that_are_kept_do_not_follow_their_source() -> None:
    x, y = pairs(4)
    moment, before = streamed(x, y, [4]), x.clone()
    x.zero_()
    assert_is(moment, before, y)


def test_products_are_made_a_block_of_columns_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = pairs()
    whole = streamed(x, y, [30, 30])
    monkeypatch.setattr(rows_module, "BLOCK", 2)
    monkeypatch.setattr(rows_module, "SPLIT", 3)
    assert_is(streamed(x, y, [30, 30]), x, y)
    assert streamed(x, y, [30, 30]).accuracy == pytest.approx(whole.accuracy, rel=1e-9)


def test_accuracy_is_the_standard_error_of_the_mean_of_the_batches_covariances() -> None:
    x = pairs(400)[0]
    moment = streamed(x, None, [100] * 4)
    each = [one_shot(part, part)["scatter"] / 100 for part in x.split(100)]
    total = moment.covariance.square().sum()
    spread = torch.stack([c.square().sum() for c in each]).mean() - total
    assert moment.accuracy == pytest.approx(float((spread / 3 / total).sqrt()), rel=1e-9)


def test_accuracy_is_about_what_another_sample_differs_by() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40_000, 1, 4, generator=generator, dtype=torch.float64)
    moment = streamed(x, None, [1000] * 40)
    exact = torch.eye(4, dtype=torch.float64)
    error = float((moment.covariance[0] - exact).norm() / exact.norm())
    assert 0.5 < error / moment.accuracy < 2
    assert streamed(x, None, [40_000]).accuracy == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_show(bad: float) -> None:
    for count in (3, 60):
        x = pairs(count)[0]
        x[1, 0, 2] = bad
        assert not streamed(x, None, [count]).finite
    assert streamed(pairs()[0], None, [60]).finite


def test_numbers_too_large_to_be_squared_show() -> None:
    assert not streamed(pairs()[0].float() * 1e30, None, [60]).finite
