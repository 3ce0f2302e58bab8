"""Widen on residual streams that norms run over: any number of channels, and the same outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxsvd
from fxsvd.edits import Plan
from fxsvd.errors import PlanError
from fxsvd.growing.marks import Mark, filled
from fxsvd.passes import Prune, Widen
from fxsvd.running import doubled
from tests.helpers.nets import IDIOMS, call, leaves, randomized, to_double

WIDTH, EPS = 8, 0.3  # so large that it shows wherever it is not accounted for


class RMSByHand(nn.Module):
    """As in Llama."""

    def __init__(self, width: int, eps: float = EPS) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, norm: Any, scale: Any, drop: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(WIDTH), norm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.scale1, self.scale2, self.drop = scale(WIDTH), scale(WIDTH), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.drop(self.scale1(self.o(z)))
        return x + self.scale2(self.down(F.gelu(self.up(self.norm2(x)))))


class Decoder(nn.Module):
    """Tokens and positions, pre-norm blocks, a norm and a head; ``raw`` reads before the norm."""

    def __init__(
        self,
        norm: Any = nn.LayerNorm,
        scale: Any = nn.Identity,
        drop: float = 0.0,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.token, self.drop = nn.Embedding(11, WIDTH), nn.Dropout(drop)
        self.position = nn.Parameter(torch.zeros(1, 5, WIDTH))
        self.blocks = nn.Sequential(*(Block(norm, scale, drop) for _ in range(2)))
        self.norm, self.raw = norm(WIDTH), nn.Linear(WIDTH, 3)
        self.head = nn.Linear(WIDTH, 11, bias=False)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.blocks(self.drop(self.token(x) + self.position))
        return self.head(self.norm(x)), self.raw(x[:, 0])


NORMS = {
    "layer": lambda n: nn.LayerNorm(n, eps=EPS),
    "layer without bias": lambda n: nn.LayerNorm(n, eps=EPS, bias=False),
    "layer without gain": lambda n: nn.LayerNorm(n, eps=EPS, elementwise_affine=False),
    "root mean square": lambda n: nn.RMSNorm(n, eps=EPS),
    "root mean square, eps of the type": lambda n: nn.RMSNorm(n),
    "root mean square by hand": lambda n: RMSByHand(n),
}


def filled_with_noise(net: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in net.parameters():
            tensor.copy_(0.5 * torch.randn(tensor.shape, generator=generator))
    return net.double().eval()


def tokens(count: int = 6) -> Tensor:
    return torch.randint(11, (count, 5), generator=torch.Generator().manual_seed(0))


def widened(net: nn.Module, x: Any = None, **options: Any) -> Any:
    x = tokens() if x is None else x
    return fxsvd.compile(net, x, passes=[Widen(**options)], progress=False)


def require_same(net: Any, wide: Any, x: Tensor) -> None:
    with torch.no_grad():
        for a, b in zip(net(x), wide(x), strict=True):
            assert (a - b).abs().max() < 1e-9 * b.abs().max()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_a_stream_behind_norms_grows_to_any_width(norm: str, tied: bool) -> None:
    net = filled_with_noise(Decoder(NORMS[norm], tied=tied))
    if tied and norm == "layer without gain":
        pytest.skip("nothing could take the scale of the stream back before the tied head")
    wide = widened(net, to={"token": 11})
    assert wide.get_submodule("token").weight.shape == (11, 11)
    assert wide.get_submodule("blocks.0.up").in_features == 11
    for training in (False, True):
        require_same(net.train(training), wide.train(training), tokens(2))


@pytest.mark.parametrize("norm", NORMS)
def test_everything_may_grow_at_once(norm: str) -> None:
    net = filled_with_noise(Decoder(NORMS[norm], scale=LayerScale, drop=0.1))
    wide = widened(net, ratio=0.5)
    assert {row.before: row.after for row in wide.report.spaces} == {8: 12, 12: 18, 11: 11, 3: 3}
    require_same(net, wide, tokens(2))


def test_with_a_tied_head_that_nothing_can_scale_it_stays() -> None:
    net = filled_with_noise(Decoder(NORMS["layer without gain"], tied=True))
    skips = widened(net, ratio=0.5).report.plan.skips
    assert any("`token.weight` is used in two places" in skip.why for skip in skips)


@pytest.mark.parametrize(("tied", "scale"), [(False, LayerScale), (True, nn.Identity)])
@pytest.mark.parametrize("norm", ["layer", "layer without gain", "root mean square by hand"])
def test_all_new_numbers_learn(norm: str, tied: bool, scale: Any) -> None:
    net = filled_with_noise(Decoder(NORMS[norm], scale=scale, tied=tied))
    wide = widened(net, ratio=0.5).train()
    before = {n: p.detach().clone() for n, p in wide.named_parameters()}
    optimizer = torch.optim.SGD(wide.parameters(), lr=1e-2)
    for _ in range(2):  # with zeros on one side, the other gets its gradient a step later
        optimizer.zero_grad()
        sum(out.square().sum() for out in wide(tokens())).backward()
        optimizer.step()
    for name, parameter in wide.named_parameters():
        moved = (parameter - before[name]).abs()
        for dim in range(moved.dim()):
            if moved.dim() > 1 and not (name == "token.weight" and dim == 0):
                assert (moved.movedim(dim, 0).flatten(1).amax(1) > 0).all(), (name, dim)


def test_new_channels_are_the_mean_of_the_others_or_zero() -> None:
    seen: dict[str, Tensor] = {}
    for name in ("layer", "root mean square"):
        wide = widened(filled_with_noise(Decoder(NORMS[name])), to={"token": 11})
        hook = wide.get_submodule("blocks.1.norm2").register_forward_pre_hook(
            lambda _, given, name=name: seen.update({name: given[0]})
        )
        wide(tokens())
        hook.remove()
        new = widen_places(wide, "token")
        old = seen[name][..., ~new].mean(-1, keepdim=True) if name == "layer" else torch.zeros(1)
        assert (seen[name][..., new] - old).abs().max() < 1e-12


def widen_places(wide: Any, space: str) -> Tensor:
    (edit,) = (e for e in wide.report.plan.edits if e.space == space)
    keep = torch.tensor(edit.keep)
    return torch.cat([torch.tensor([False]), keep[1:] == keep[:-1]])


def test_a_rectifier_behind_a_norm_does_not_stop_new_channels_from_learning() -> None:
    layers = nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 2)
    net = filled_with_noise(nn.Sequential(*layers))
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(3)).double()
    wide = widened(net, x, ratio=0.5)
    require_same(net, wide, x)
    optimizer = torch.optim.SGD(wide.parameters(), lr=1e-2)
    before = {n: p.detach().clone() for n, p in wide.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        wide(x).square().sum().backward()
        optimizer.step()
    for name, parameter in wide.named_parameters():
        assert (parameter != before[name]).flatten(1 if parameter.dim() > 1 else 0).any(), name
    assert (wide.get_submodule("0").weight != before["0.weight"]).any(1).all()


@pytest.mark.parametrize("name", ["layer", "root mean square"])
def test_streams_grow_before_a_head_of_zeros(name: str) -> None:
    layers = nn.Linear(4, 6), NORMS[name](6), nn.Linear(6, 2)
    net = filled_with_noise(nn.Sequential(*layers))
    nn.init.zeros_(layers[2].weight)
    nn.init.zeros_(layers[2].bias)
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(3)).double()
    wide = widened(net, x, ratio=0.5)
    assert wide(x).abs().max() < 1e-14  # what the norm makes of the mean is no zero to the last bit
    F.cross_entropy(wide(x), torch.zeros(9, dtype=torch.int64)).backward()
    new = widen_places(wide, "0")
    assert new.sum() == 3
    assert (wide.get_submodule("0").weight.grad[new] != 0).any(1).all()


class PostNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.norm1, self.norm2 = nn.LayerNorm(6), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.a(x))
        return self.out(self.norm2(x + self.b(x)))


class Grouped(nn.Module):
    """The norm's input is a convolution of single channels (ConvNeXt)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.depth = nn.Conv1d(4, 6, 1), nn.Conv1d(6, 6, 3, padding=1, groups=6)
        self.norm, self.out = nn.LayerNorm(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depth(self.a(x.unsqueeze(-1))).squeeze(-1)
        return self.out(self.norm(x))


@pytest.mark.parametrize(
    ("net", "why"),
    [
        (PostNorm(), "adds what a norm made of it to the stream"),
        (Grouped(), "`depth` (Conv1d) stands in between and is not linear"),
        (
            nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 2)),
            "`_1` (GELU) stands in between and is not linear",
        ),
        (
            nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(2, 6), nn.Linear(6, 2)),
            "takes a statistic over channels",
        ),
    ],
    ids=["post-norm", "depthwise", "bent", "group norm"],
)
def test_what_cannot_grow_exactly_stays_with_the_reason(net: nn.Module, why: str) -> None:
    x = torch.randn(5, 4).double()
    report = widened(filled_with_noise(net), x, ratio=0.5).report
    assert any(why in skip.why for skip in report.plan.skips)
    assert all(row.before == row.after for row in report.spaces)


def test_pruning_what_came_gives_the_original_shapes() -> None:
    net = filled_with_noise(Decoder())
    wide = widened(net, ratio=1.0)
    small = fxsvd.compile(wide, tokens(), passes=[Prune(0.5)], progress=False)
    shapes = {n: p.shape for n, p in net.named_parameters()}
    assert {n: p.shape for n, p in small.named_parameters()} == shapes


def test_a_narrower_type_is_scaled_as_well() -> None:
    net = filled_with_noise(Decoder()).float()
    wide = widened(net, ratio=0.5)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    with torch.no_grad():
        for a, b in zip(net(tokens()), wide(tokens()), strict=True):
            assert (a - b).abs().max() < 1e-5 * b.abs().max()


@pytest.mark.parametrize(
    ("mark", "expected"),
    [
        (Mark(2, "zero"), [1.5, 0.0, 4.5]),
        (Mark(-2, "copy"), [2 / 3, 2 / 3, 2.0]),
        (Mark(0, "one"), [1.0, 1.0, 3.0]),
        (Mark(0, "level"), [1.0, 2.0, 3.0]),
        (Mark(0, "mean", "gamma"), [1.0, -5 / 3, 3.0]),  # (1·2 - 3·4) / 2 over (2 + 4) / 2
    ],
)
def test_numbers_are_those_of_the_mark(mark: Mark, expected: list[float]) -> None:
    value, new = torch.tensor([1.0, 1.0, 3.0]).double(), torch.tensor([False, True, False]).numpy()
    gain = torch.tensor([2.0, -4.0]).double() if mark.gain else None
    out = filled(value, 0, new, mark, gain, torch.Generator())
    assert (out - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-12


# ---------------------------------------------------------------- whole heads

HEADS = (
    "attention_by_einsum",
    "packed_qkv_as_in_timm",
    "packed_qkv_indexed",
    "grouped_query_by_expand",
    "multihead_attention_self",
    "window_attention_with_relative_position_bias",
    "attention_with_embedded_position_bias",
)


def double_graph(name: str) -> tuple[Any, Any]:
    torch.manual_seed(0)
    inputs = IDIOMS[name].inputs(4)
    graph = doubled(fxsvd.capture(randomized(IDIOMS[name].build()).eval(), inputs))
    return graph, to_double(inputs)


@pytest.mark.parametrize(("init", "ratio", "width"), [("orthogonal", 0.5, 12), ("split", 1.0, 16)])
@pytest.mark.parametrize("name", HEADS)
def test_whole_heads_are_added(name: str, init: Any, ratio: float, width: int) -> None:
    graph, x = double_graph(name)
    wide = widened(graph, x, ratio=ratio, init=init, heads=True)
    after = {row.name: row.after for row in wide.report.spaces}
    heads = [n for n in after if n.startswith(("q", "v", "attend")) and "out_proj" not in n]
    assert {after[n] for n in heads} == {width}
    with torch.no_grad():
        for a, b in zip(leaves(call(wide, x)), leaves(call(graph, x)), strict=True):
            assert (a - b).abs().max() < 1e-9 * b.abs().max()


def test_a_head_lies_behind_its_original_and_learns() -> None:
    graph, x = double_graph("packed_qkv_as_in_timm")
    wide = widened(graph, x, ratio={"qkv": 0.5}, heads=True, init="split").train()
    keeps = [edit.keep for edit in wide.report.plan.edits]
    assert keeps[0] in ((0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7), (0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7))
    rows = wide.get_parameter("qkv.weight").detach().reshape(3, 3, 4, 8)
    first = 0 if keeps[0][4] == 0 else 1
    assert torch.equal(rows[:, first], rows[:, first + 1])
    call(wide, x).square().sum().backward()
    gradient = wide.get_parameter("qkv.weight").grad.reshape(3, 3, 4, 8)
    assert not torch.allclose(gradient[:, first], gradient[:, first + 1])


def test_a_mean_over_heads_sees_new_ones_but_not_equally_many_copies() -> None:
    graph, x = double_graph("multihead_attention_cross")  # it returns its weights
    report = widened(graph, x, ratio=0.5, heads=True).report
    skips = [skip.why for skip in report.plan.skips if skip.space == "attend#1"]
    assert any("`mean` takes a statistic" in why for why in skips)
    rows = widened(graph, x, ratio=1.0, heads=True, init="split").report.spaces
    assert {row.name: row.after for row in rows}["attend#1"] == 16


def test_heads_that_were_added_can_be_pruned() -> None:
    graph, x = double_graph("attention_by_einsum")
    wide = widened(graph, x, ratio={"q": 1.0}, heads=True)
    small = fxsvd.compile(wide, x, passes=[Prune({"q": 0.5}, heads=True)], progress=False)
    with torch.no_grad():
        assert (call(small, x) - call(graph, x)).abs().max() < 1e-9


def test_a_part_of_a_head_is_refused() -> None:
    graph, x = double_graph("packed_qkv_as_in_timm")
    plan = fxsvd.plan(graph, x, passes=[Widen(ratio={"qkv": 0.5}, heads=True)])
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(PlanError, match="a part of a head"):
        fxsvd.apply(graph, replace(plan, edits=plan.edits[:1]))


def test_growing_heads_by_their_gradient_is_refused() -> None:
    with pytest.raises(PlanError, match="not heads"):
        Widen(ratio=1.0, init="gradient", heads=True, loss=F.mse_loss, data=[])
