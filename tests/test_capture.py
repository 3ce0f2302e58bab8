"""Capture: the graph computes what the model computes, and the model is left as it was."""

import collections
import copy
import dataclasses
import operator
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxsvd.capture import (
    BATCH_HINT,
    LEAF_TYPES,
    Switch,
    capture,
    concrete,
    is_leaf,
    normalize_inputs,
)
from fxsvd.errors import CaptureError, FxsvdError


@dataclasses.dataclass
class Pair:
    """An output of a user's own type."""

    first: Tensor
    second: Tensor


class DropPath(nn.Module):
    """Stochastic depth, as users write it."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.dim() - 1)) >= self.rate
        return x * keep / (1 - self.rate)


class Residual(nn.Module):
    """Layers, a functional op, a shortcut, a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True))
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)))
        x = x + self.body(x)
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Packed qkv, sizes as literals, functional dropouts that follow `training`."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.rate = nn.Linear(8, 24), rate
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, c // 6 * 3).permute(2, 0, 3, 1, 4)
        rate = self.rate if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=rate)
        x = self.proj(x.transpose(1, 2).reshape(b, n, c))
        return F.dropout(x, self.rate, training=self.training)


class InPlace(nn.Module):
    """Writes to slices, adds in place, writes to `out=`."""

    def forward(self, x):
        y = torch.zeros_like(x)
        y[:, 1:] = x[:, :-1]
        y += x
        y[:, 0].mul_(2.0)
        torch.add(y, 1.0, out=y)
        return y


class Tied(nn.Module):
    """An embedding whose weight is also the output layer's, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, 4)
        self.alias = self.emb
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.emb.weight

    def forward(self, tokens):
        x = self.emb(tokens) + self.alias(tokens)
        return self.out(x) + F.linear(x, self.emb.weight)


class Auxiliary(nn.Module):
    """Another structure in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.aux = nn.Linear(3, 2)

    def forward(self, x):
        y = self.norm(self.main(x))
        return (y, self.aux(x)) if self.training else y


class Structured(nn.Module):
    """Nested inputs, nested outputs."""

    def forward(self, batch, *rest, scale=1.0, **more):
        a, (b, c) = batch["a"], batch["pair"]
        total = a + b + c + rest[0] * scale + more["extra"]
        return {"total": total, "parts": [a, (b * 2, None, 3)]}


def sample(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def targets(graph: fx.GraphModule) -> list[object]:
    return [node.target for node in graph.graph.nodes]


def assert_same(graph: fx.GraphModule, model: nn.Module, *inputs: Tensor) -> None:
    torch.manual_seed(0)
    expected = model(*[x.clone() for x in inputs])
    torch.manual_seed(0)
    actual = graph(*[x.clone() for x in inputs])
    torch.testing.assert_close(actual, expected)


CASES = {
    "residual": (Residual, (2, 3, 8, 8)),
    "attention": (Attention, (2, 5, 8)),
    "in_place": (InPlace, (2, 4, 3)),
    "auxiliary": (Auxiliary, (2, 3)),
    "lstm": (lambda: nn.Sequential(nn.LSTM(3, 4), nn.Identity()), (2, 5, 3)),
    "root_leaf": (lambda: nn.Linear(3, 4), (2, 3)),
    "root_conv": (lambda: nn.Conv2d(3, 4, 3), (2, 3, 8, 8)),
    "root_lstm": (lambda: nn.LSTM(3, 4, batch_first=True), (2, 5, 3)),
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), (2, 5, 8)),
    "batch_one": (Residual, (1, 3, 8, 8)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_graph_equals_the_model_in_eval_mode_at_other_batch_sizes(name):
    make, shape = CASES[name]
    model = make().eval()
    graph = capture(model, sample(*shape))
    for batch in (1, 2, 5):
        assert_same(graph, model, sample(batch, *shape[1:]))
    graph.graph.lint()
    assert all("val" in node.meta and "scope" in node.meta for node in graph.graph.nodes)


@pytest.mark.parametrize("name", ["residual", "attention", "in_place", "lstm", "transformer"])
def test_the_graph_equals_the_model_in_train_mode(name):
    make, shape = CASES[name]
    model = make().train()
    graph = capture(copy.deepcopy(model), sample(*shape))
    assert graph.training
    assert_same(graph, model, sample(*shape))
    for (key, ours), theirs in zip(graph.state_dict().items(), model.state_dict().values()):
        torch.testing.assert_close(ours, theirs, msg=key)


@pytest.mark.parametrize("make", [Residual, Tied, Auxiliary, Attention])
def test_names_of_parameters_are_kept(make):
    model = make()
    x = torch.zeros(2, 5, dtype=torch.long) if make is Tied else sample(2, 3, 8, 8)
    x = sample(2, 3) if make is Auxiliary else sample(2, 5, 8) if make is Attention else x
    graph = capture(model, x)
    assert list(graph.state_dict()) == list(model.state_dict())
    assert dict(graph.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert dict(graph.named_buffers()).keys() == dict(model.named_buffers()).keys()
    assert all(
        ours is theirs for ours, theirs in zip(graph.parameters(), model.parameters(), strict=True)
    )
    assert type(graph).__name__ == make.__name__


def test_layers_stay_the_original_instances_with_their_scopes():
    model = Residual()
    graph = capture(model, sample(2, 3, 8, 8))
    calls = {node.target: node for node in graph.graph.nodes if node.op == "call_module"}
    assert list(calls) == ["conv", "norm", "body.0", "body.1", "head"]
    assert all(graph.get_submodule(name) is model.get_submodule(name) for name in calls)
    assert calls["body.0"].meta["scope"] == "body"
    assert calls["conv"].meta["scope"] == ""
    assert operator.add in targets(graph)
    assert F.relu in targets(graph)


def test_shapes_are_known_and_the_batch_is_symbolic():
    graph = capture(Residual(), sample(2, 3, 8, 8))
    shape = next(node.meta["val"].shape for node in graph.graph.nodes if node.target == "head")
    assert [concrete(size) for size in shape] == [BATCH_HINT, 5]
    assert isinstance(shape[0], torch.SymInt)
    assert concrete(shape[0] * 4) == 4 * BATCH_HINT


def test_static_sizes_are_literals_and_batch_arithmetic_is_readable():
    class Windows(nn.Module):
        def forward(self, x):
            b, n, c = x.shape
            x = x.view(b * (n // 2), 2, c)
            return x.view(b, -1, c) + torch.arange(c, device=x.device)

    graph = capture(Windows(), sample(2, 6, 4))
    nodes = list(graph.graph.nodes)
    size, product = nodes[1], nodes[2]
    assert (size.op, size.target, size.args) == ("call_method", "size", (nodes[0], 0))
    assert (product.target, product.args) == (operator.mul, (size, 3))
    assert nodes[3].args == (nodes[0], product, 2, 4)
    assert nodes[4].args == (nodes[3], size, -1, 4)
    assert targets(graph).count("size") == 1
    assert torch.arange in targets(graph)


def test_structured_inputs_and_outputs():
    batch = {"a": sample(2, 3), "pair": (sample(2, 3), sample(2, 3))}
    graph = capture(Structured(), (batch, sample(2, 3)))if False else capture(
        _Bound(), (batch, sample(2, 3), sample(2, 3))
    )
    result = graph(batch, sample(2, 3), sample(2, 3))
    expected = _Bound()(batch, sample(2, 3), sample(2, 3))
    torch.testing.assert_close(result["total"], expected["total"])
    assert result["parts"][1][1:] == (None, 3)
    assert graph.graph.output_node().meta["val"]["parts"][1][2] == 3


class _Bound(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Structured()

    def forward(self, batch, other, extra):
        return self.inner(batch, other, scale=2.0, extra=extra)


def test_starred_arguments():
    class Starred(nn.Module):
        def forward(self, x, *rest, **more):
            return x + sum(rest) + more["last"]

    model, x = Starred(), sample(2, 3)
    graph = capture(model, (x, x, x)) if False else _capture_call(model, x)
    torch.testing.assert_close(graph(x, x, x, last=x), 4 * x)


def _capture_call(model: nn.Module, x: Tensor) -> fx.GraphModule:
    return capture(model, {"x": x, "last": x}) if False else capture(_Call(model), (x, x, x, x))


class _Call(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args):
        return self.model(*args[:-1], last=args[-1])
