"""Drawing without replacement: probabilities by hand, frequencies by counting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxsvd.linalg.sampling import (
    draw,
    inclusion_probabilities,
    leverage_scores,
    most_important,
    squared_norms,
)

FIXED = settings(derandomize=True, deadline=None)


@FIXED
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=12), st.integers(1, 12), st.integers(0, 99))
def test_exactly_the_count_is_drawn_whatever_the_scores(
    scores: list[float], count: int, seed: int
) -> None:
    count = min(count, len(scores))
    chance = inclusion_probabilities(torch.tensor(scores, dtype=torch.float64), count)
    assert float(chance.sum()) == pytest.approx(count, abs=1e-7)
    assert bool(((chance >= 0) & (chance <= 1)).all())
    drawn = draw(chance, seed)
    assert len(drawn) == len(drawn.unique()) == count
    assert bool((chance[drawn] > 0).all())
    assert set((chance == 1).nonzero().flatten().tolist()) <= set(drawn.tolist())


def test_probabilities_are_proportional_below_the_cap() -> None:
    chance = inclusion_probabilities(torch.tensor([100.0, 6.0, 3.0, 1.0]), 2)
    torch.testing.assert_close(chance, torch.tensor([1, 0.6, 0.3, 0.1]).double())


def test_zeros_are_drawn_only_when_nothing_else_is_left() -> None:
    scores = torch.tensor([0.0, 5.0, 0.0, 1e-30, 0.0])
    two, three = (inclusion_probabilities(scores, count) for count in (2, 3))
    assert two.tolist() == [0, 1, 0, 1, 0]
    torch.testing.assert_close(three, torch.tensor([1 / 3, 1, 1 / 3, 1, 1 / 3]).double())


def test_each_is_drawn_with_its_probability() -> None:
    """Counts over seeds, within four standard deviations of the binomial ones."""
    chance = inclusion_probabilities(torch.tensor([9.0, 1, 2, 3, 4, 0.2, 0.8]), 3)
    runs = 3000
    counts = torch.zeros(7, dtype=torch.float64)
    for seed in range(runs):
        counts[draw(chance, seed)] += 1
    allowed = 4 * (runs * chance * (1 - chance)).sqrt()
    assert bool(((counts - runs * chance).abs() <= allowed).all())


def test_a_seed_repeats_and_another_differs() -> None:
    chance = inclusion_probabilities(torch.ones(50), 10)
    assert torch.equal(draw(chance, 3), draw(chance, 3))
    assert not torch.equal(draw(chance, 3), draw(chance, 4))


@pytest.mark.parametrize("scale", [1e-200, 1e-20, 1.0, 1e20, 1e200])
def test_squared_norms_have_their_proportions_at_every_scale(scale: float) -> None:
    a = torch.tensor([[3.0, 0.0], [4.0, 1.0]], dtype=torch.float64) * scale
    norms = squared_norms(a)
    assert float(norms[0] / norms[1]) == pytest.approx(25, rel=1e-12)


def test_leverage_is_a_distribution() -> None:
    vectors = torch.linalg.qr(torch.randn(9, 3, generator=torch.Generator().manual_seed(0))).Q
    assert float(leverage_scores(vectors.double()).sum()) == pytest.approx(1, rel=1e-6)


def test_among_equals_the_first_is_most_important() -> None:
    assert most_important(torch.ones(4), 3).tolist() == [0, 1, 2]
    assert most_important(torch.tensor([0.0, 2.0]), 5).tolist() == [1, 0]


def test_bad_counts_and_scores_are_refused() -> None:
    for scores, count, words in [
        (torch.ones(3), 0, "ask for 1 to 3"),
        (torch.ones(3), 4, "ask for 1 to 3"),
        (-torch.ones(3), 1, "not negative"),
        (torch.full((3,), float("nan")), 1, "finite"),
    ]:
        with pytest.raises(ValueError, match=words):
            inclusion_probabilities(scores, count)
