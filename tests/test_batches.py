"""Batches of every kind, as a graph takes them."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader, TensorDataset

from fxsvd.capture import capture
from fxsvd.data.batches import batches, moved, samples
from fxsvd.errors import FxsvdError

X, MASK = torch.randn(4, 3), torch.ones(4, 3)
Pair = namedtuple("Pair", ["image", "label"])


class Masked(nn.Module):
    """Takes an input and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.fc(x * mask)


@pytest.fixture(scope="module")
def one() -> fx.GraphModule:
    return capture(nn.Linear(3, 2), X)


@pytest.fixture(scope="module")
def two() -> fx.GraphModule:
    return capture(Masked(), (X, MASK))


def only(data: Any, graph: fx.GraphModule) -> Any:
    (batch,) = batches(data, graph)
    return batch


def test_a_tensor_is_the_argument(one: fx.GraphModule) -> None:
    args, kwargs = only([X], one)
    assert len(args) == 1
    assert args[0] is X
    assert kwargs == {}


@pytest.mark.parametrize("batch", [(X, torch.zeros(4)), [X, torch.zeros(4)], Pair(X, 1)])
def test_labels_behind_the_inputs_are_left_out(batch: Any, one: fx.GraphModule) -> None:
    args, kwargs = only([batch], one)
    assert len(args) == 1
    assert torch.equal(args[0], X)
    assert kwargs == {}


def test_as_many_arguments_as_there_are_inputs(two: fx.GraphModule) -> None:
    args, _ = only([(X, MASK, torch.zeros(4))], two)
    assert len(args) == 2
    assert args[1] is MASK


def test_a_dictionary_gives_keyword_arguments_and_loses_other_keys(two: fx.GraphModule) -> None:
    args, kwargs = only([{"mask": MASK, "x": X, "labels": torch.zeros(4)}], two)
    assert args == ()
    assert kwargs.keys() == {"x", "mask"}
    assert kwargs["x"] is X


def test_a_loader_can_be_read_again(one: fx.GraphModule) -> None:
    loader = DataLoader(TensorDataset(torch.randn(10, 3), torch.zeros(10)), batch_size=4)
    for _ in range(2):
        assert [len(args[0]) for args, _ in batches(loader, one)] == [4, 4, 2]


def test_an_object_with_indices_is_iterable(one: fx.GraphModule) -> None:
    class Indexed:
        def __getitem__(self, i: int) -> Tensor:
            if i > 1:
                raise IndexError
            return X

    assert len(list(batches(Indexed(), one))) == 2  # type: ignore[arg-type]


def generated() -> Iterator[Tensor]:
    yield X


@pytest.mark.parametrize("make", [generated, lambda: iter([X]), lambda: map(torch.abs, [X])])
def test_data_that_can_be_read_once_only_is_refused(make: Any, one: fx.GraphModule) -> None:
    with pytest.raises(FxsvdError, match=r"can be read only once.*give a list or a DataLoader"):
        next(batches(make(), one))


@pytest.mark.parametrize("data", [X, {"x": X}])
def test_a_single_batch_is_refused(data: Any, one: fx.GraphModule) -> None:
    with pytest.raises(FxsvdError, match=r"give \[batch\]"):
        next(batches(data, one))


@pytest.mark.parametrize("data", [None, 3, nn.Linear(2, 2)])
def test_what_is_no_iterable_is_refused(data: Any, one: fx.GraphModule) -> None:
    with pytest.raises(FxsvdError, match=f"data is a {type(data).__name__}: give an iterable"):
        next(batches(data, one))


def test_a_batch_that_lacks_an_input_is_named(two: fx.GraphModule) -> None:
    data = [(X, MASK), {"x": X, "labels": X}]
    with pytest.raises(FxsvdError, match=r"batch 1 of the data has 'x', 'labels', .* needs mask"):
        list(batches(data, two))
    with pytest.raises(FxsvdError, match=r"batch 0 of the data has nothing, .* needs mask, x"):
        list(batches([()], two))


def test_tensors_go_to_the_graphs_device(one: fx.GraphModule) -> None:
    on_meta = capture(nn.Linear(3, 2, device="meta"), X)
    assert only([(X, {"deep": [X]})], on_meta)[0][0].device.type == "meta"


def test_moving_keeps_the_nest() -> None:
    nest = {"a": (X, [X, 3]), "b": Pair(X, "cat")}
    out = moved(nest, torch.device("meta"))
    assert (out["a"][0].device.type, out["a"][1][1], type(out["b"])) == ("meta", 3, Pair)
    assert out["b"].label == "cat"


def test_samples_are_counted_by_the_first_tensor() -> None:
    assert samples(((torch.zeros(5, 2), torch.zeros(3)), {})) == 5
    assert samples(((), {"x": torch.zeros(7)})) == 7
    assert samples(((3,), {})) == 1
