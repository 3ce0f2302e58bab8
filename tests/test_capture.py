"""Capture: the graph computes what the model computes, and the model is left as it was."""

import collections
import copy
import dataclasses
import operator
import pickle
import sys

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
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
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

    def forward(self, batch, *rest, scale=2.0):
        a, (b, c) = batch["a"], batch["pair"]
        total = (a + b + c) * scale + sum(rest)
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
    for (key, ours), theirs in zip(
        graph.state_dict().items(), model.state_dict().values(), strict=True
    ):
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
    x = sample(2, 3)
    inputs = {"a": x, "pair": (x + 1, x + 2)}, x, x
    graph = capture(Structured(), inputs)
    result, expected = graph(*inputs), Structured()(*inputs)
    torch.testing.assert_close(result["total"], expected["total"])
    torch.testing.assert_close(result["parts"][1][0], expected["parts"][1][0])
    assert result["parts"][1][1:] == (None, 3)
    assert graph.graph.output_node().meta["val"]["parts"][1][2] == 3


def test_keyword_inputs():
    class Keywords(nn.Module):
        def forward(self, x, flag=False, mask=None, **more):
            return x * mask + more["extra"] if flag else x

    x = sample(2, 3)
    graph = capture(Keywords(), {"x": x, "flag": True, "mask": x, "extra": x})
    torch.testing.assert_close(graph(x=x, flag=True, mask=x, extra=x), x * x + x)


@pytest.mark.parametrize("kind", [collections.OrderedDict, Pair])
def test_outputs_of_other_types_are_built_again(kind):
    class Typed(nn.Module):
        def forward(self, x):
            return kind(first=x + 1, second=x * 2)

    graph = capture(Typed(), sample(2, 3))
    result = graph(sample(4, 3))
    second = result["second"] if kind is collections.OrderedDict else result.second
    assert type(result) is kind
    torch.testing.assert_close(second, sample(4, 3) * 2)


def test_normalize_inputs():
    x = sample(1)
    assert normalize_inputs(x) == ((x,), {})
    assert normalize_inputs([x, 1]) == ((x, 1), {})
    assert normalize_inputs({"x": x}) == ((), {"x": x})


def test_functional_dropout_follows_the_mode():
    model = Attention(0.5).train()
    graph = capture(model, sample(2, 5, 8))
    switches = [module for module in graph.modules() if isinstance(module, Switch)]
    assert {(s.train_value, s.eval_value) for s in switches} == {(0.5, 0.0), (True, False)}
    assert_same(graph, model, sample(3, 5, 8))
    assert not torch.equal(graph(sample(3, 5, 8)), graph(sample(3, 5, 8)))
    graph.eval()
    assert_same(graph, model.eval(), sample(3, 5, 8))
    torch.testing.assert_close(graph(sample(3, 5, 8)), graph(sample(3, 5, 8)))


def test_another_structure_in_train_mode_is_refused_not_ignored():
    model = Auxiliary().train()
    graph = capture(model, sample(2, 3))
    assert model.training
    assert model.norm.training
    assert not any(module.training for module in graph.modules())
    for captured in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        assert "train" in captured.meta["train_graph"]
        with pytest.raises(FxsvdError, match="eval mode only"):
            captured.train()
        captured.train(False).eval()
    assert graph.get_parameter("main.weight") is model.main.weight


def test_stochastic_depth_is_a_leaf():
    model = nn.Sequential(nn.Linear(3, 3), DropPath(0.5))
    graph = capture(model, sample(2, 3))
    assert graph.get_submodule("1") is model[1]
    assert_same(graph.train(), model.train(), sample(8, 3))


class Branch(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


class Item(nn.Module):
    def forward(self, x):
        return x * x.max().item()


class Masked(nn.Module):
    def forward(self, x):
        return x[x > 0]


@pytest.mark.parametrize("make", [Branch, Item, Masked])
def test_dependence_on_values_is_an_error_that_says_where(make):
    model = nn.Sequential(nn.Linear(3, 3), make())
    with pytest.raises(
        CaptureError, match=rf"in 1 \({make.__name__}\) at .*test_capture.py:\d+"
    ) as e:
        capture(model, sample(2, 3))
    assert "values of a tensor" in str(e.value)
    assert "register_layer" in str(e.value)


def test_wrong_inputs_are_an_error_that_says_where():
    model = nn.Sequential(nn.Identity(), nn.Sequential(nn.Linear(3, 4)))
    with pytest.raises(CaptureError, match=r"in 1\.0 \(Linear\)") as raised:
        capture(model, sample(2, 5))
    assert isinstance(raised.value.__cause__, RuntimeError)
    with pytest.raises(CaptureError, match="do not fit Sequential"):
        capture(model, (sample(2, 3), sample(2, 3)))


class FixedBatch(nn.Module):
    def forward(self, x):
        return x.reshape(int(x.shape[0]), -1)


class BatchBranch(nn.Module):
    def forward(self, x):
        return x + 1 if x.shape[0] > 8 else x


class BatchLoop(nn.Module):
    def forward(self, x):
        return torch.stack([x[i] for i in range(len(x))])


@pytest.mark.parametrize("make", [FixedBatch, BatchBranch, BatchLoop])
def test_a_fixed_batch_size_is_an_error(make):
    with pytest.raises(CaptureError, match="batch size"):
        capture(make(), sample(2, 3))


def test_branches_on_shapes_are_taken():
    class Shaped(nn.Module):
        def forward(self, x):
            return x + 1 if x.shape[1] > 2 else x

    assert torch.equal(capture(Shaped(), sample(2, 3))(sample(4, 3)), sample(4, 3) + 1)


def test_meta_weights_are_captured_without_data():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1 << 30))
    graph = capture(model, sample(2, 3))
    assert list(graph.state_dict()) == list(model.state_dict())
    assert "skipped" in graph.meta["check"]
    assert next(iter(graph.parameters())).device.type == "meta"


def _weight_normed(style: str) -> nn.Module:
    if style == "old":
        with pytest.warns(FutureWarning):
            return nn.Sequential(torch.nn.utils.weight_norm(nn.Conv1d(3, 4, 1)))
    return nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 4, 1)))


@pytest.mark.parametrize("style", ["old", "new"])
def test_weight_norm_appears_as_operations_on_parameters(style):
    model = _weight_normed(style)
    before = dict(vars(model[0]))
    graph = capture(model, sample(2, 3, 5))
    names = [str(node.target) for node in graph.graph.nodes if node.op == "get_attr"]
    assert sum("weight_g" in name or "original0" in name for name in names) == 1
    assert torch._weight_norm in targets(graph)
    assert list(graph.state_dict()) == list(model.state_dict())
    assert vars(model[0]) == before
    assert_same(graph, model, sample(3, 3, 5))


def test_tied_weights_and_aliased_modules():
    model, tokens = Tied(), torch.arange(6).reshape(2, 3)
    graph = capture(model, tokens)
    assert "emb.weight" in targets(graph)
    assert graph.emb is graph.alias
    assert graph.out.weight is graph.emb.weight
    assert_same(graph, model, tokens)


def test_writes_stay_in_order():
    graph = capture(InPlace(), sample(2, 4, 3))
    kinds = operator.setitem, "add_", "mul_", torch.add
    order = [target for target in targets(graph) if target in kinds]
    assert order == list(kinds)
    x = sample(2, 4, 3)
    torch.testing.assert_close(pickle.loads(pickle.dumps(graph))(x), InPlace()(x))


def test_reversed_operators_and_unused_reads():
    class Reversed(nn.Module):
        def forward(self, x):
            x[0]
            return (2 - x) + 3 / (1 + x) + 2**x

    graph = capture(Reversed(), sample(2, 3))
    assert operator.getitem not in targets(graph)
    assert operator.pow in targets(graph)
    assert_same(graph, Reversed(), sample(2, 3))


def test_constants_become_buffers_outside_the_state():
    constant, table = torch.full((3,), 2.0), np.arange(3.0, dtype=np.float32)

    class Constant(nn.Module):
        def forward(self, x):
            return x * constant + torch.from_numpy(table)

    graph = capture(Constant(), sample(2, 3))
    assert [name for name, _ in graph.named_buffers()] == ["_const0", "_const1"]
    assert not graph.state_dict()
    assert not copy.deepcopy(graph).state_dict()
    assert_same(graph, Constant(), sample(2, 3))


def test_subclasses_with_their_own_forward_are_traced_inside():
    class ChannelNorm(nn.LayerNorm):
        def forward(self, x):
            x = x.permute(0, 2, 3, 1)
            x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
            return x.permute(0, 3, 1, 2)

    class Renamed(nn.Linear):
        pass

    assert not is_leaf(ChannelNorm(4))
    assert is_leaf(Renamed(3, 4))
    assert not is_leaf(nn.Sequential())
    model = nn.Sequential(nn.Conv2d(3, 4, 1), ChannelNorm(4))
    graph = capture(model, sample(2, 3, 5, 5))
    assert {"1.weight", "1.bias", F.layer_norm} <= set(targets(graph))
    assert_same(graph, model, sample(3, 3, 5, 5))


def test_registered_types_are_leaves(monkeypatch):
    monkeypatch.setattr(sys.modules["fxsvd.capture.leaves"], "LEAF_TYPES", {Branch})
    assert isinstance(LEAF_TYPES, set)
    assert is_leaf(Branch())


def test_forward_hooks_are_recorded():
    model = nn.Sequential(nn.Linear(3, 4))
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    graph = capture(model, sample(2, 3))
    assert {F.linear, operator.mul} <= set(targets(graph))
    assert_same(graph, model, sample(3, 3))


def test_no_grad_regions_stop_gradients():
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, x):
            with torch.no_grad():
                x = self.body(x)
            return self.head(x)

    graph = capture(Frozen(), sample(2, 3))
    graph(sample(2, 3)).sum().backward()
    assert graph.body.weight.grad is None
    assert graph.head.weight.grad is not None


class Spoiled(nn.Module):
    """Keeps results as attributes, writes to buffers, and may fail half-way."""

    def __init__(self, *, fails: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("steps", torch.zeros(()))
        self.cache, self.last, self.fails = {}, None, fails

    def forward(self, x):
        x = self.norm(x)
        self.steps = self.steps + 1
        self.cache["x"] = self.last = self.extra = x
        if not self.training:
            self.norm.eval()
        if self.fails:
            raise ValueError("half-way")
        return x


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_untouched(fails):
    model = Spoiled(fails=fails).train()
    model.norm.eval()
    before = copy.deepcopy(model.state_dict())
    random = torch.random.get_rng_state()
    if fails:
        with pytest.raises(CaptureError, match="half-way"):
            capture(model, sample(2, 3))
    else:
        capture(model, sample(2, 3))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert (model.training, model.norm.training) == (True, False)
    assert (model.cache, model.last, hasattr(model, "extra")) == ({}, None, False)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert "training" not in vars(nn.Module)
    assert nn.Module.__call__ is nn.Module._wrapped_call_impl


def test_the_check_finds_what_the_graph_cannot_hold():
    class Counting(nn.Module):
        def forward(self, x):
            return x + 1 if type(x) is Tensor else x

    capture(Counting(), sample(2, 3), check=False)
    with pytest.raises(CaptureError, match="differs from Counting at batch size 3"):
        capture(Counting(), sample(2, 3))


def test_a_random_model_is_noted():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.rand(3)

    assert capture(Noisy(), sample(2, 3)).meta.get("check") is None


def test_copies_and_pickles_equal_the_graph():
    graph = capture(Auxiliary().eval(), sample(2, 3))
    for other in (copy.deepcopy(graph), copy.copy(graph), pickle.loads(pickle.dumps(graph))):
        assert list(other.state_dict()) == list(graph.state_dict())
        assert [n.name for n in other.graph.nodes] == [n.name for n in graph.graph.nodes]
        assert [n.meta["scope"] for n in other.graph.nodes] == [
            n.meta["scope"] for n in graph.graph.nodes
        ]
        assert type(other).__name__ == "Auxiliary"
        assert_same(other, graph, sample(4, 3))
    assert copy.deepcopy(graph).main.weight is not graph.main.weight
    assert copy.copy(graph).main.weight is graph.main.weight


def test_a_graph_can_be_captured_again():
    graph = capture(Attention(0.5).train(), sample(2, 5, 8))
    again = capture(graph, sample(2, 5, 8))
    assert [n.target for n in again.graph.nodes if n.op == "call_module"] == [
        n.target for n in graph.graph.nodes if n.op == "call_module"
    ]
    assert_same(again, graph, sample(3, 5, 8))


def test_the_graph_can_be_exported():
    graph = capture(Attention(0.5).eval(), sample(2, 5, 8))
    batch = torch.export.Dim("batch")
    exported = torch.export.export(graph, (sample(3, 5, 8),), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(exported.module()(sample(4, 5, 8)), graph(sample(4, 5, 8)))


def test_autocast_inside_forward_is_an_error():
    class Mixed(nn.Module):
        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return x @ x.mT

    with pytest.raises(CaptureError, match="autocast"):
        capture(Mixed(), sample(2, 3, 3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_inputs_on_another_device_are_an_error():
    with pytest.raises(CaptureError, match="inputs are on cuda:0 and the model is on cpu"):
        capture(nn.Linear(3, 4), sample(2, 3).cuda())


def test_reshaping_in_place_is_seen():
    class Reshaped(nn.Module):
        def forward(self, x):
            y = x.mul(2)
            y.unsqueeze_(1)
            return y.mul(2) + x.size(0)

    graph = capture(Reshaped(), sample(2, 3))
    assert graph.graph.output_node().meta["val"].dim() == 3
    assert_same(graph, Reshaped(), sample(4, 3))


def test_inputs_that_hide_tensors_are_an_error():
    with pytest.raises(CaptureError, match="holds a Pair"):
        capture(nn.Identity(), Pair(sample(2, 3), sample(2, 3)))


ZOO = [
    "torchvision:resnet18",
    "torchvision:googlenet",
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:lraspp_mobilenet_v3_large",
    "timm:test_vit",
    "timm:test_convnext",
    "timm:efficientvit_b0",
    "timm:test_nfnet",
]


@pytest.mark.parametrize("name", ZOO)
def test_published_models(name):
    library, _, kind = name.partition(":")
    models = pytest.importorskip(library)
    if library == "timm":
        model = models.create_model(kind).eval()
    else:
        options = {"init_weights": False} if kind == "googlenet" else {}
        options |= {"weights_backbone": None} if kind.startswith("lraspp") else {}
        model = models.models.get_model(kind, weights=None, **options).eval()
    graph = capture(model, sample(2, 3, 64, 64) if kind != "test_vit" else sample(2, 3, 160, 160))
    assert list(graph.state_dict()) == list(model.state_dict())
    assert ("train_graph" in graph.meta) == (kind == "googlenet")


def test_hugging_face_models():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model = transformers.BertModel(config).eval()
    tokens = torch.arange(10).reshape(2, 5)
    graph = capture(model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
    tokens, mask = tokens.repeat(2, 1), torch.tensor([[1, 1, 1, 0, 0]] * 4)
    result = graph(input_ids=tokens, attention_mask=mask)
    expected = model(input_ids=tokens, attention_mask=mask)
    assert type(result) is type(expected)
    torch.testing.assert_close(result.last_hidden_state, expected.last_hidden_state)


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return gradient * 7 * s  # its own, which no graph of the forward pass could know


class WithFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(Swish.apply(self.first(x)))


def test_autograd_functions_keep_their_own_gradient():
    model, x = WithFunction(), torch.randn(3, 4)
    graph = capture(model, x)
    again = pickle.loads(pickle.dumps(graph))
    model(x).sum().backward()
    expected = model.first.weight.grad.clone()
    for captured in (graph, again):
        model.zero_grad()
        captured(x).sum().backward()
        torch.testing.assert_close(captured.first.weight.grad, expected)
    assert "apply" in vars(torch.autograd.Function)
    assert Swish.apply(x).shape == x.shape
