"""Residual streams behind norms: found, turned without loss, and narrowed."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F

import fxsvd
from fxsvd.capture import capture
from fxsvd.dependency import analyze
from fxsvd.errors import PlanError
from fxsvd.passes import Prune, Slice
from fxsvd.rotating.streams import streams
from fxsvd.rotating.turning import encoder, second_moments, zero_sum_basis


class Block(nn.Module):
    def __init__(self, width, norm, bias):
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True, bias=bias)
        self.up = nn.Linear(width, 3 * width, bias=bias)
        self.down = nn.Linear(3 * width, width, bias=bias)

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Tokens and positions in, pre-norm blocks, a norm and a head."""

    def __init__(self, width=12, norm=nn.LayerNorm, bias=True, blocks=2):
        super().__init__()
        self.token = nn.Embedding(11, width)
        self.position = nn.Parameter(torch.randn(1, 5, width))
        self.blocks = nn.Sequential(*(Block(width, norm, bias) for _ in range(blocks)))
        self.norm = norm(width)
        self.head = nn.Linear(width, 4, bias=bias)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.token(x) + self.position)).mean(1))


def filled(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)
    return model.double().eval()


def tokens(batches=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(11, (6, 5), generator=generator) for _ in range(batches)]


def sliced(net, data, **options):
    return fxsvd.compile(net, data[0], passes=[Slice(**options)], data=data, progress=False)


NORMS = {
    "layer": lambda n: nn.LayerNorm(n),
    "layer without gain": lambda n: nn.LayerNorm(n, elementwise_affine=False),
    "root mean square": lambda n: nn.RMSNorm(n),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_in_full_width_nothing_changes(norm, bias):
    if norm == "layer" and not bias:
        pytest.skip("a call of F.linear without bias cannot take over that of the norm")
    net = filled(Transformer(norm=NORMS[norm], bias=bias))
    small = sliced(net, tokens(), ratio=0.0)
    assert small.report.plan.exact
    assert {v.parameter for v in small.report.plan.values} >= {"token.weight", "position"}
    assert small.report.error < 1e-9
    assert small.report.change < 1e-18


@pytest.mark.parametrize("norm", NORMS)
def test_narrower_streams_verify(norm):
    small = sliced(filled(Transformer(norm=NORMS[norm])), tokens(), ratio=0.25)
    assert [len(e.keep) for e in small.report.plan.edits] == [9]
    assert small.get_submodule("token").embedding_dim == 9
    assert small.get_submodule("blocks.1.down").out_features == 9
    assert 0 < small.report.change < 1


def in_few_dimensions(net, width, rank):
    """All that writes the stream stays in a random subspace."""
    basis = torch.linalg.qr(torch.randn(width, rank, dtype=torch.float64)).Q
    project = basis @ basis.T
    with torch.no_grad():
        net.token.weight.copy_(net.token.weight @ project)
        net.position.copy_(net.position @ project)
        for block in net.blocks:
            for layer in (block.attention.out_proj, block.down):
                layer.weight.copy_(project @ layer.weight)
                if layer.bias is not None:
                    layer.bias.copy_(project @ layer.bias)
    return net


@pytest.mark.parametrize(
    ("norm", "dimensions"),
    [(lambda n: nn.RMSNorm(n, eps=0.0), 6), (lambda n: nn.LayerNorm(n, eps=0.0), 5)],
)
def test_a_stream_of_few_dimensions_loses_nothing(norm, dimensions):
    torch.manual_seed(0)
    net = in_few_dimensions(filled(Transformer(norm=norm)), 12, dimensions)
    if dimensions == 5:  # means may be subtracted: that takes the place of one dimension
        dimensions += 1
    small = sliced(net, tokens(), ratio=0.5)
    assert small.get_submodule("token").embedding_dim == dimensions
    assert small.report.change < 1e-18


def test_readers_scale_by_the_root_of_old_over_new_width():
    torch.manual_seed(0)
    net = filled(Transformer(norm=lambda n: nn.RMSNorm(n, eps=0.0)))
    net = in_few_dimensions(net, 12, 3)
    small = sliced(net, tokens(), ratio=0.75)
    assert small.report.change < 1e-18
    head = small.get_submodule("head").weight.detach()
    turned = sliced(net, tokens(), ratio=0.0).get_submodule("head").weight.detach()
    assert float(head.norm() / turned[:, :3].norm()) == pytest.approx((12 / 3) ** 0.5, rel=1e-9)


def test_it_loses_less_than_dropping_channels():
    net = filled(Transformer())
    data = tokens(6)
    by_slices = sliced(net, data, ratio=0.25).report.change
    space = sliced(net, data, ratio=0.25).report.plan.edits[0].space
    pruned = fxsvd.compile(
        net, data[0], passes=[Prune(ratio=0.25, only=(space,))], data=data, progress=False
    )
    assert by_slices < pruned.report.change


def test_encoders_keep_sizes_and_zero_means():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(7, 7, generator=generator, dtype=torch.float64)
    second = root @ root.T
    plain = encoder(second, 3, centred=False)
    assert torch.allclose(plain @ plain.T, torch.eye(3).double(), rtol=0, atol=1e-12)
    best = torch.linalg.eigvalsh(second)[-3:].sum()
    assert float(torch.trace(plain @ second @ plain.T)) == pytest.approx(float(best), rel=1e-12)
    centred = encoder(second, 3, centred=True)
    assert float(centred.sum(0).abs().max()) < 1e-12
    assert float(centred.sum(1).abs().max()) < 1e-12
    expected = torch.eye(3).double() - 1 / 3
    assert torch.allclose(centred @ centred.T, expected, rtol=0, atol=1e-12)
    whole = zero_sum_basis(7)
    assert torch.allclose(whole.T @ whole, torch.eye(6).double(), rtol=0, atol=1e-12)


def why(net, x):
    return streams(analyze(capture(net.eval(), x)))[1]


class Post(nn.Module):
    """A norm behind the sum, as in the first transformers."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        x = self.norm(self.a(x))
        return self.out(x + self.b(x))


class Scaled(Post):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(8))

    def forward(self, x):
        x = self.a(x)
        return self.out(self.norm(x + self.scale * self.b(self.norm(x))))


class Raw(Post):
    def forward(self, x):
        x = self.a(x)
        return self.out(self.norm(x)) + self.out(x)


class Plain(Post):
    def forward(self, x):
        x = self.a(x)
        return self.out(self.norm(x)) + self.b(x).mean(-1, keepdim=True)


class Mixed(Post):
    def __init__(self):
        super().__init__()
        self.rms = nn.RMSNorm(8)

    def forward(self, x):
        x = self.a(x)
        return self.out(self.norm(x)) + self.b(self.rms(x)).mean(-1, keepdim=True)


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (Post, "`add` adds what a norm made of it to the stream"),
        (Scaled, "`mul` (mul) stands in between"),
        (Raw, "`out` reads it twice, through different norms"),
        (Plain, "a norm subtracts its mean, but ['b'] does not"),
        (Mixed, "a norm subtracts its mean, but another does not"),
    ],
)
def test_what_is_no_stream_is_told(net, reason):
    assert why(net(), torch.randn(2, 4))["a"].startswith(reason)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Identity(), "no norm reads it"),
        (nn.Dropout(0.1), "`_1` stands in between and drops single numbers in train mode"),
        (nn.LayerNorm((5, 8)), "`_1` takes its statistics over more than the channels"),
    ],
)
def test_layers_that_are_no_norm_of_the_channels_are_told(layer, reason):
    net = nn.Sequential(nn.Linear(4, 8), layer, nn.Linear(8, 3))
    assert why(net, torch.randn(2, 5, 4))["0"] == reason


def test_train_mode_equals_too():
    net = filled(Transformer())
    turned = sliced(net, tokens(), ratio=0.0).train()
    with torch.no_grad():
        change = turned(tokens()[0]) - net.train()(tokens()[0])
    assert float(change.abs().max()) < 1e-9


def test_vision_transformers_of_timm_have_a_stream():
    timm = pytest.importorskip("timm")
    options = {"depth": 2, "img_size": 32, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
    net = filled(timm.create_model("vit_tiny_patch16_224", pretrained=False, **options))
    data = [torch.randn(4, 3, 32, 32, dtype=torch.float64) for _ in range(2)]
    assert sliced(net, data, ratio=0.0).report.error < 1e-9
    small = sliced(net, data, ratio=0.25, round_to=6)
    assert small.get_submodule("head").in_features == 18


def test_bad_options_say_what_to_do():
    with pytest.raises(PlanError, match="data=batches"):
        fxsvd.compile(nn.Linear(2, 2), torch.randn(2, 2), passes=[Slice()], progress=False)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    plan = sliced(net, [torch.randn(2, 3)]).report.plan
    assert (plan.values, plan.edits, plan.exact) == ((), (), False)


def moments_of(data):
    torch.manual_seed(0)  # the positions
    deps = analyze(capture(filled(Transformer()), tokens()[0]))
    found, _ = streams(deps)
    return second_moments(deps, found, data)


def work(rank, store, out):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.save(moments_of(tokens()[rank::2]), f"{out}{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_see_the_second_moments_that_one_sees(tmp_path):
    mp.spawn(work, (str(tmp_path / "store"), str(tmp_path / "out")), nprocs=2)
    for rank in range(2):
        for found, expected in zip(
            torch.load(tmp_path / f"out{rank}.pt"), moments_of(tokens()), strict=True
        ):
            assert (found - expected).abs().max() < 1e-10 * expected.abs().max()
