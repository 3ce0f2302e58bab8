"""Relations between atoms, against brute force."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxsvd.relations import Relations

PAIRS = st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=30)


@settings(derandomize=True, deadline=None)
@given(PAIRS)
def test_channels_are_connected_components(pairs: list[tuple[int, int]]) -> None:
    relations = Relations()
    atoms = relations.fresh(20)
    for a, b in pairs:
        relations.unify(atoms[[a]], atoms[[b]])
    channels = relations.solve()
    graph = nx.Graph(pairs)
    graph.add_nodes_from(range(20))
    components = sorted(sorted(c) for c in nx.connected_components(graph))
    found = sorted(sorted(np.flatnonzero(channels.of == c).tolist()) for c in range(channels.count))
    assert found == components
    first = [int(np.flatnonzero(channels.of == c)[0]) for c in range(channels.count)]
    assert first == sorted(first)  # numbered in order of first appearance


def test_fresh_atoms_are_new() -> None:
    relations = Relations()
    a, b = relations.fresh(2, 3), relations.fresh(4)
    assert a.shape == (2, 3)
    assert sorted([*a.ravel(), *b]) == list(range(10))


def test_unify_broadcasts() -> None:
    relations = Relations()
    matrix, vector = relations.fresh(3, 2), relations.fresh(2)
    relations.unify(matrix, vector)
    channels = relations.solve()
    assert channels.count == 2
    assert (channels.of[matrix] == channels.of[vector]).all()


def test_the_first_reason_counts_and_spreads() -> None:
    relations = Relations()
    a, b = relations.fresh(3), relations.fresh(3)
    relations.freeze(b[:2], "first")
    relations.freeze(a, "second")
    relations.unify(a, b)
    channels = relations.solve()
    reasons = [channels.reasons[c] for c in channels.of[a].tolist()]
    assert reasons == ["first", "first", "second"]


def test_nothing_at_all() -> None:
    assert Relations().solve().count == 0


# ---------------------------------------------------------------- rows


def test_a_row_of_one_channel_is_what_lives_with_it() -> None:
    relations = Relations()
    rows, numbers = relations.fresh(3, 4), relations.fresh(3)
    relations.nest(numbers, rows)
    relations.freeze(numbers[:1], "picked")
    relations.unify(rows[:2], rows[:2, :1])  # the first two go as a whole, the last does not
    channels = relations.solve()
    assert (channels.of[rows[:2, 0]] == channels.of[numbers[:2]]).all()
    assert channels.of[numbers[2]] not in channels.of[rows[2]]
    assert channels.reasons[int(channels.of[rows[0, 3]])] == "picked"


def test_rows_within_rows_are_joined_from_the_inside() -> None:
    relations = Relations()
    inner, middle, outer = relations.fresh(2, 3), relations.fresh(2), relations.fresh(1)
    relations.nest(outer, middle)
    relations.nest(middle, inner)
    relations.unify(inner, inner[:1, :1])
    assert relations.solve().count == 1


@pytest.mark.parametrize(
    ("tied", "expected"),
    [
        ((), [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]),
        ((2,), [[0, 1, 2], [3, 4, 5]]),  # pairs go as a whole: rows of three
        ((1, 2), []),  # whole outer rows go: nothing has to stay equally long
    ],
)
def test_lengths_one_level_up(tied: tuple[int, ...], expected: list[list[int]]) -> None:
    relations = Relations()
    rows = relations.fresh(2, 3, 2)
    relations.equal_rows(rows, "heads")
    for axis in tied:
        relations.unify(rows, rows.take([0], axis=axis))
    channels = relations.solve()
    assert [
        channels.of[row].tolist() for row in (r for rs, _ in relations.rows for r in rs)
    ] == expected


def test_solving_again_after_more_relations() -> None:
    relations = Relations()
    rows = relations.fresh(2, 3)
    relations.equal_rows(rows, "heads")
    assert relations.solve().count == 6
    assert len(relations.rows) == 1
    relations.unify(rows, rows[:, :1])
    assert relations.solve().count == 2
    assert relations.rows == []
