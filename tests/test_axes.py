"""The algebra of types, against NumPy on the atoms themselves.

A type says of every element of a tensor which atoms it belongs to. Moving data around must move
these memberships in the same way, up to unifications that the operation had to make.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxsvd import axes
from fxsvd.axes import Block, TensorType
from fxsvd.relations import Channels, Relations
from fxsvd.rules.reshape import groups, reshape

FIXED = settings(derandomize=True, deadline=None, max_examples=200)


def separate(relations: Relations, shape: tuple[int, ...], dims: tuple[int, ...]) -> TensorType:
    """A block of its own for each of the dimensions."""
    return TensorType(shape, tuple(Block((d,), relations.fresh(shape[d])) for d in dims))


def members(t: TensorType, channels: Channels) -> list[np.ndarray[Any, Any]]:
    """For each block, the channel of every element of the tensor."""
    out = []
    for block in t.blocks:
        order = np.argsort(block.dims)
        atoms = channels.of[block.atoms].transpose(order)
        shape = [n if d in block.dims else 1 for d, n in enumerate(t.shape)]
        out.append(np.broadcast_to(atoms.reshape(shape), t.shape))
    return out


SHAPES = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)


@st.composite
def reshapes(draw: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes of the same size, the second by splitting and merging the first."""
    before = draw(SHAPES)
    factors: list[int] = []
    for size in before:
        split = draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0]))
        factors += [split, size // split] if draw(st.booleans()) else [size]
    after: list[int] = []
    for factor in factors:
        if after and draw(st.booleans()):
            after[-1] *= factor
        else:
            after.append(factor)
    return tuple(before), tuple(after)


@FIXED
@given(reshapes())
def test_groups_of_a_reshape(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """Consecutive, complete, of equal products, and minimal."""
    before, after = shapes
    found = list(groups(before, after))
    assert [d for inside, _ in found for d in inside] == list(range(len(before)))
    assert [d for _, outside in found for d in outside] == list(range(len(after)))
    for inside, outside in found:
        left = np.cumprod([before[d] for d in inside])
        right = np.cumprod([after[d] for d in outside])
        assert (left[-1:] == right[-1:]).all()
        assert not set(left[:-1].tolist()) & set(right[:-1].tolist()) - {1}


@FIXED
@given(reshapes(), st.integers(0, 3))
def test_reshape_moves_memberships(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], which: int
) -> None:
    before, after = shapes
    dim = which % len(before)
    relations = Relations()
    t = separate(relations, before, (dim,) if before[dim] > 1 else ())
    out = reshape(relations, t, after, "test")
    channels = relations.solve()
    assert out.shape == after
    expected = [m.reshape(after) for m in members(t, channels)]
    assert len(expected) == len(out.blocks)
    for one, other in zip(expected, members(out, channels), strict=True):
        assert np.array_equal(one, other)


@FIXED
@given(reshapes())
def test_reshape_there_and_back(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """Several blocks at once: nothing is tied that was not."""
    before, after = shapes
    relations = Relations()
    t = separate(relations, before, tuple(d for d, n in enumerate(before) if n > 1))
    back = reshape(relations, reshape(relations, t, after, "there"), before, "back")
    channels = relations.solve()
    assert [b.dims for b in back.blocks] == [b.dims for b in t.blocks]
    for one, other in zip(members(t, channels), members(back, channels), strict=True):
        assert np.array_equal(one, other)


def test_heads_keep_equally_many() -> None:
    relations = Relations()
    t = separate(relations, (2, 12), (1,))
    heads = reshape(relations, t, (2, 3, 4), "heads")
    assert heads.blocks[0].dims == (1, 2)
    relations.solve()
    ((rows, why),) = relations.rows
    assert ([row.tolist() for row in rows], why) == (
        [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]],
        "heads",
    )


@pytest.mark.parametrize(
    ("order", "after", "expected"),
    [
        ((0, 2, 1), (2, 12), [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]),  # a shuffle ties the rows
        ((0, 1, 2), (2, 12), list(range(12))),
    ],
)
def test_merging_in_another_order_ties_the_rows(
    order: tuple[int, ...], after: tuple[int, ...], expected: list[int]
) -> None:
    relations = Relations()
    heads = reshape(relations, separate(relations, (2, 12), (1,)), (2, 3, 4), "")
    out = reshape(relations, axes.permute(heads, order), after, "")
    channels = relations.solve()
    assert channels.of[out.blocks[0].atoms].tolist() == expected


@FIXED
@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.integers(0, 1))
def test_take_is_numpys(index: list[int], dim: int) -> None:
    relations = Relations()
    t = separate(relations, (6, 6), (0, 1))
    out = axes.take(relations, t, dim, np.array(index), "")
    channels = relations.solve()
    expected = [m.take(index, axis=dim) for m in members(t, channels)]
    found = members(out, channels)
    assert out.shape == expected[0].shape
    kept = [
        e for e, b in zip(expected, t.blocks, strict=True) if dim not in b.dims or len(index) > 1
    ]
    assert all(np.array_equal(a, b) for a, b in zip(kept, found, strict=True))


def test_of_what_is_taken_something_stays() -> None:
    """A single index cannot go: nothing would be left of the slice."""
    relations = Relations()
    t = separate(relations, (2, 6), (1,))
    axes.take(relations, t, 1, np.array([4]), "`slice`")
    axes.take(relations, t, 1, np.array([0, 1]), "`slice`")
    assert set(relations.solve().reasons) >= {4}
    assert not {0, 1, 2, 3, 5} & set(relations.solve().reasons)


@FIXED
@given(st.permutations(range(3)))
def test_permute_is_numpys(order: list[int]) -> None:
    relations = Relations()
    t = reshape(relations, separate(relations, (2, 12), (1,)), (2, 3, 4), "")
    out = axes.permute(t, order)
    channels = relations.solve()
    (one,), (other,) = members(t, channels), members(out, channels)
    assert np.array_equal(one.transpose(order), other)


def test_pick_keeps_the_row_that_is_picked() -> None:
    relations = Relations()
    t = reshape(relations, separate(relations, (2, 12), (1,)), (2, 3, 4), "heads")
    out = axes.pick(relations, t, 1, 2, "`select`")
    channels = relations.solve()
    assert out.shape == (2, 4)
    assert channels.of[out.blocks[0].atoms].tolist() == [8, 9, 10, 11]
    assert "`select`" in channels.reasons.values()


def test_insert_moves_dimensions() -> None:
    relations = Relations()
    t = separate(relations, (2, 3), (0, 1))
    out = axes.insert(t, 1)
    assert (out.shape, [b.dims for b in out.blocks]) == ((2, 1, 3), [(0,), (2,)])


# ---------------------------------------------------------------- elementwise


def test_axes_that_meet_are_unified() -> None:
    relations = Relations()
    a, b = separate(relations, (2, 4), (1,)), separate(relations, (4,), (0,))
    out = axes.combine(relations, [a, b], "")
    channels = relations.solve()
    assert out.shape == (2, 4)
    assert channels.count == 4
    assert not channels.reasons


def test_an_axis_that_meets_a_fixed_one_is_fixed() -> None:
    relations = Relations()
    a = separate(relations, (2, 4), (1,))
    out = axes.combine(relations, [a, TensorType((1, 4))], "meets")
    assert out.blocks == ()
    assert set(relations.solve().reasons.values()) == {"meets"}


@pytest.mark.parametrize("other", [(1, 1), (2, 1), (1,)])
def test_a_broadcast_axis_is_not_met(other: tuple[int, ...]) -> None:
    relations = Relations()
    a = separate(relations, (2, 4), (1,))
    out = axes.combine(relations, [a, TensorType(other)], "")
    assert [b.dims for b in out.blocks] == [(1,)]
    assert not relations.solve().reasons


@pytest.mark.parametrize(
    ("zeros", "product", "expected"),
    [
        ((True, True), False, True),
        ((True, False), False, False),
        ((True, False), True, True),
        ((False, False), True, False),
    ],
)
def test_where_silence_is_zero(zeros: tuple[bool, bool], product: bool, expected: bool) -> None:
    relations = Relations()
    types = [separate(relations, (2, 4), (1,)).with_zero(zero) for zero in zeros]
    assert axes.combine(relations, types, "", product=product).blocks[0].zero == expected


def test_a_bias_per_head_goes_with_its_head() -> None:
    """An index of rows is frozen while its rows keep something, whatever it is called."""
    relations = Relations()
    heads = reshape(relations, separate(relations, (2, 12), (1,)), (2, 3, 4), "heads")
    bias = separate(relations, (3, 1), (0,))
    out = axes.combine(relations, [heads, bias], "")
    assert [b.dims for b in out.blocks] == [(1, 2)]
    (parents, children), *_ = relations.nests
    assert children.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    channels = relations.solve()
    assert (channels.of[parents] == channels.of[bias.blocks[0].atoms]).all()


def test_of_an_axis_of_two_kinds_the_features_can_go() -> None:
    """Heads that share their features, flattened: the features can go, the heads cannot."""
    relations = Relations()
    shared = separate(relations, (5, 2, 4), (1, 2))
    flat = reshape(relations, shared, (5, 8), "")
    assert [b.dims for b in flat.blocks] == [(1,), (1,)]
    weight = separate(relations, (8,), (0,))
    axes.combine(relations, [flat, weight], "meets")
    channels = relations.solve()
    features = channels.of[shared.blocks[1].atoms]
    assert channels.of[weight.blocks[0].atoms].tolist() == [*features, *features]
    assert set(channels.reasons) == set(channels.of[shared.blocks[0].atoms].tolist())


# ---------------------------------------------------------------- contraction


def test_einsum_unifies_what_it_contracts() -> None:
    relations = Relations()
    x, w = separate(relations, (2, 4), (1,)), separate(relations, (3, 4), (0, 1))
    out = axes.einsum(relations, [("bi", x), ("oi", w)], "bo", "")
    channels = relations.solve()
    assert out.shape == (2, 3)
    assert np.array_equal(out.blocks[0].atoms, w.blocks[0].atoms)
    assert (channels.of[x.blocks[0].atoms] == channels.of[w.blocks[1].atoms]).all()


def test_a_sum_over_values_that_are_not_zero_is_frozen() -> None:
    relations = Relations()
    t = separate(relations, (2, 4), (1,)).with_zero(False)
    out = axes.contract(relations, t, (1,), "`sum`")
    assert (out.shape, out.blocks) == ((2,), ())
    (reason,) = set(relations.solve().reasons.values())
    assert reason == "`sum` sums over values that are not zero when silent"


def test_contracting_features_leaves_the_numbers_of_rows() -> None:
    """Scores of heads: one per head, whatever features it keeps."""
    relations = Relations()
    q, k = (reshape(relations, separate(relations, (2, 12), (1,)), (2, 3, 4), "") for _ in "qk")
    out = axes.einsum(relations, [("bhd", q), ("bhd", k)], "bh", "")
    channels = relations.solve()
    assert [b.dims for b in out.blocks] == [(1,)]
    assert (channels.of[q.blocks[0].atoms] == channels.of[k.blocks[0].atoms]).all()
    assert len(set(channels.of[out.blocks[0].atoms].tolist())) == 3


def test_a_diagonal_is_frozen() -> None:
    relations = Relations()
    t = separate(relations, (4, 4), (0, 1))
    axes.einsum(relations, [("ii", t)], "i", "`einsum`")
    assert set(relations.solve().reasons.values()) == {"`einsum` takes a diagonal"}


# ---------------------------------------------------------------- freezing


def test_fixing_the_features_lets_heads_go_whole() -> None:
    relations = Relations()
    heads = reshape(relations, separate(relations, (2, 12), (1,)), (2, 3, 4), "")
    out = axes.fix_dims(relations, heads, (2,), "softmax")
    channels = relations.solve()
    assert [b.dims for b in out.blocks] == [(1,)]
    assert channels.count - len(channels.reasons) == 3
    assert not channels.reasons
    assert relations.rows == []  # heads go whole, any of them


def test_fixing_the_heads_keeps_some_of_each() -> None:
    relations = Relations()
    heads = reshape(relations, separate(relations, (2, 12), (1,)), (2, 3, 4), "")
    out = axes.fix_dims(relations, heads, (1,), "groups")
    channels = relations.solve()
    assert [b.dims for b in out.blocks] == [(1, 2)]
    assert not set(channels.reasons) & set(channels.of[heads.blocks[0].atoms].ravel().tolist())


def test_fixing_both_freezes_all() -> None:
    relations = Relations()
    heads = reshape(relations, separate(relations, (2, 12), (1,)), (2, 3, 4), "")
    out = axes.fix_dims(relations, heads, (1, 2), "both")
    channels = relations.solve()
    assert out.blocks == ()
    atoms = channels.of[heads.blocks[0].atoms].ravel().tolist()
    assert {channels.reasons[c] for c in atoms} == {"both"}
