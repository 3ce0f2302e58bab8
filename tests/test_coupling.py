"""Which channels may go together: every choice of equal steps keeps every constraint."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxsvd.coupling import Group, couple
from fxsvd.relations import Relations

FIXED = settings(derandomize=True, deadline=None)


def coupled(relations: Relations, signature: list[int] | None = None) -> list[Group]:
    channels = relations.solve()
    hashes = np.array(signature or [7] * channels.count, dtype=np.uint64)
    return couple(relations, channels, hashes)


def sizes(groups: list[Group]) -> list[tuple[int, list[tuple[int, int]]]]:
    """Steps, and size and step of each cell."""
    return [(g.steps, [(len(c.channels), c.step) for c in g.cells]) for g in groups]


def test_free_channels_go_one_by_one() -> None:
    relations = Relations()
    relations.fresh(6)
    assert sizes(coupled(relations)) == [(6, [(6, 1)])]


def test_signatures_are_never_mixed() -> None:
    relations = Relations()
    relations.fresh(6)
    assert sizes(coupled(relations, [1, 1, 2, 2, 2, 2])) == [(2, [(2, 1)]), (4, [(4, 1)])]


def test_rows_shrink_in_step() -> None:
    relations = Relations()
    relations.equal_rows(relations.fresh(3, 4), "heads")
    assert sizes(coupled(relations)) == [(4, [(4, 1), (4, 1), (4, 1)])]


def test_rows_of_different_widths_lose_the_same_share() -> None:
    """Two channels of the one go with three of the other."""
    relations = Relations()
    rows = relations.fresh(4), relations.fresh(6)
    relations.equal_rows(rows, "inside and outside")
    (group,) = coupled(relations)
    assert (group.steps, group.why) == (2, "inside and outside")
    assert [(len(c.channels), c.step) for c in group.cells] == [(4, 2), (6, 3)]


def test_widths_without_a_common_divisor_have_one_step() -> None:
    relations = Relations()
    relations.equal_rows((relations.fresh(4), relations.fresh(7)), "inside and outside")
    assert sizes(coupled(relations)) == [(1, [(4, 4), (7, 7)])]


def test_rows_that_hold_the_same_channels_need_no_care() -> None:
    relations = Relations()
    rows = relations.fresh(2, 4)
    relations.equal_rows(rows, "heads")
    relations.unify(rows, rows[:1])
    assert sizes(coupled(relations)) == [(4, [(4, 1)])]


def test_a_chain_of_constraints_is_one_group() -> None:
    relations = Relations()
    a, b, c = relations.fresh(4), relations.fresh(4), relations.fresh(4)
    alone = relations.fresh(4)
    relations.equal_rows((a, b), "first")
    relations.equal_rows((b, c), "second")
    groups = coupled(relations, [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4)
    assert sizes(groups) == [(4, [(4, 1)] * 3), (4, [(4, 1)])]
    assert groups[1].channels.tolist() == alone.tolist()


def test_of_every_row_something_stays() -> None:
    """What counts rows lives as long as any of them: no row is one cell with another."""
    relations = Relations()
    numbers, rows = relations.fresh(2), relations.fresh(2, 3)
    relations.nest(numbers, rows)
    cells = [cell for group in coupled(relations) for cell in group.cells]
    for row in rows:
        assert any(set(cell.channels.tolist()) <= set(row.tolist()) for cell in cells)


def test_ranked_takes_the_lowest_of_every_cell() -> None:
    relations = Relations()
    relations.equal_rows(relations.fresh(2, 3), "heads")
    (group,) = coupled(relations)
    steps = group.ranked(np.array([3.0, 1, 2, 10, 30, 20]))
    assert [sorted(step.tolist()) for step in steps] == [[1, 3], [2, 5], [0, 4]]


@FIXED
@given(
    st.lists(st.lists(st.integers(0, 11), min_size=1, max_size=8), min_size=2, max_size=3),
    st.lists(st.integers(0, 2), min_size=12, max_size=12),
    st.integers(0, 100),
)
def test_any_number_of_steps_keeps_the_rows_in_proportion(
    rows: list[list[int]], signature: list[int], seed: int
) -> None:
    """By brute force: each row loses the same share of its entries, however often they occur."""
    relations = Relations()
    atoms = relations.fresh(12)
    relations.equal_rows(tuple(atoms[row] for row in rows), "rows")
    groups = coupled(relations, signature)
    assert sorted(np.concatenate([g.channels for g in groups])) == list(range(12))
    scores = np.random.default_rng(seed).random(12)
    trivial = all(sorted(row) == sorted(rows[0]) for row in rows)
    for group in groups:
        for count in range(group.steps):
            gone = np.concatenate([[], *group.ranked(scores)[:count]])
            shares = {round(float(np.isin(row, gone).mean()), 9) for row in rows}
            touched = bool(np.isin(np.concatenate(rows), group.channels).any())
            assert len(shares) == 1 or not touched or trivial
            assert trivial or not touched or shares == {round(count / group.steps, 9)}


@pytest.mark.parametrize("width", [1, 5])
def test_a_single_cell_has_as_many_steps_as_channels(width: int) -> None:
    relations = Relations()
    relations.fresh(width)
    (group,) = coupled(relations)
    assert group.steps == width
