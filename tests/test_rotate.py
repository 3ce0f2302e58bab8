"""Rotations across linear edges: exact in full width, the tail of a spectrum below it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxsvd
from fxsvd.capture import capture
from fxsvd.dependency import analyze
from fxsvd.edits import Plan
from fxsvd.errors import PlanError, VerificationError
from fxsvd.passes import Fold, Rotate, Select
from fxsvd.rotating import commuting, edges
from fxsvd.rotating.bases import input_moments
from fxsvd.rotating.edges import linear_edges, linear_maps, places


class Run(nn.Module):
    """Layers by name, and a function that runs them."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.run(self, x)


def filled(model):
    """Every parameter random, biases and norm statistics too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                scaled = noise.abs() + 0.5 if "running_var" in name else noise * 0.4
                tensor.copy_(scaled.to(tensor.dtype))
    return model.eval()


def data_like(*shape, batches=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    mix = torch.randn(shape[-1], shape[-1], generator=generator, dtype=torch.float64)
    out = []
    for _ in range(batches):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        out.append((x @ mix + 0.7).to(dtype))
    return out


def inner_product_net():
    def run(m, x):
        x = m.a(x)
        x = x + m.c(F.avg_pool2d(m.b(x), 1))
        return m.out(F.relu(m.d(x * 2.0))).mean((2, 3))

    return Run(
        run,
        a=nn.Conv2d(3, 12, 3, padding=1),
        b=nn.Conv2d(12, 9, 3, padding=1, bias=False),
        c=nn.Conv2d(9, 12, 1),
        d=nn.Conv2d(12, 8, 3, padding=1, padding_mode="reflect"),
        out=nn.Conv2d(8, 4, 1),
    )


def flattened():
    layers = nn.Conv2d(3, 6, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5)
    return nn.Sequential(*layers)


class Attention(nn.Module):
    """Values of their own, so that heads of values narrow without queries and keys."""

    def __init__(self, heads=2, width=8):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(5, width) for _ in range(3))
        self.o = nn.Linear(width, 6)

    def forward(self, x):
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v)
        )
        weights = (q @ k.transpose(-1, -2) / 2).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        x = F.gelu(self.inner(x))
        return self.out(F.gelu(x + self.attention(x, x, x, need_weights=False)[0]))


NETS = {
    "linear": (lambda: nn.Sequential(nn.Linear(7, 9), nn.Linear(9, 8), nn.Linear(8, 3)), (6, 7)),
    "residual": (inner_product_net, (2, 3, 6, 6)),
    "flattened": (flattened, (4, 3, 4, 4)),
    "attention": (Attention, (3, 4, 5)),
    "packed": (Packed, (3, 4, 5)),
}


def compiled(net, x, **options):
    data = options.pop("data", None) or data_like(*x.shape, dtype=x.dtype)
    options = {"positions": "all"} | options
    return fxsvd.compile(net, x, passes=[Rotate(**options)], data=data, progress=False)


@pytest.mark.parametrize("name", NETS)
def test_in_full_width_nothing_changes(name):
    make, shape = NETS[name]
    net = filled(make().double())
    small = compiled(net, data_like(*shape)[0], ratio=0.0)
    assert small.report.plan.exact
    assert small.report.plan.values
    assert small.report.error < 1e-9
    assert small.report.change < 1e-18


@pytest.mark.parametrize("name", NETS)
def test_narrower_networks_verify_and_lose_little_of_what_they_compute(name):
    make, shape = NETS[name]
    net = filled(make().double())
    small = compiled(net, data_like(*shape)[0], ratio=0.3)
    assert small.report.plan.edits
    assert 0 < small.report.change < 0.2


def test_one_edge_loses_the_tail_of_the_output_spectrum():
    first, second = filled(nn.Linear(9, 8).double()), filled(nn.Linear(8, 6).double())
    net = nn.Sequential(first, second, nn.ReLU(), nn.Linear(6, 2).double())
    data = data_like(50, 9)
    small = compiled(net, data[0], ratio=0.5, data=data)
    with torch.no_grad():
        outputs = second(first(torch.cat(data)))
    spectrum = torch.linalg.eigvalsh(outputs.T.cov(correction=0))
    (site,) = small.report.sites
    assert small.report.plan.edits[0].keep == (0, 1, 2, 3)
    assert site.predicted == pytest.approx(float(spectrum[:2].sum() / spectrum.sum()), rel=1e-9)
    assert site.measured == pytest.approx(site.predicted, rel=1e-6)


def test_prediction_is_what_comes_with_several_consumers_and_kernels():
    def run(m, x):
        x = m.a(x)
        return m.out(F.relu(m.b(x)) + F.relu(m.c(x)))

    net = Run(
        run,
        a=nn.Conv2d(3, 10, 1),
        b=nn.Conv2d(10, 6, 3, padding=1),
        c=nn.Conv2d(10, 6, 1, bias=False),
        out=nn.Conv2d(6, 2, 1),
    )
    data = data_like(8, 3, 5, 5)
    small = compiled(filled(net.double()), data[0], ratio=0.8, data=data)
    found = {s.layer: s for s in small.report.sites}
    assert found.keys() == {"b", "c"}
    for site in found.values():
        assert site.predicted > 1e-3
        assert site.measured == pytest.approx(site.predicted, rel=1e-6)


def test_no_other_projection_does_better():
    first, second = filled(nn.Linear(6, 4).double()), filled(nn.Linear(4, 5).double())
    net = nn.Sequential(first, second, nn.ReLU(), nn.Linear(5, 2).double())
    data = data_like(40, 6)
    with torch.no_grad():
        z = first(torch.cat(data))
        y = second(z)
    y, z = y - y.mean(0), z - z.mean(0)

    def lost(encode):
        seen = z @ encode.T
        fit = torch.linalg.lstsq(seen, y).solution
        return float((y - seen @ fit).square().sum() / y.square().sum())

    best = compiled(net, data[0], ratio=0.5, data=data).report.sites[0].predicted
    generator = torch.Generator().manual_seed(0)
    tries = [torch.randn(2, 4, generator=generator, dtype=torch.float64) for _ in range(200)]
    assert best <= min(map(lost, tries))
    by_values = compiled(net, data[0], ratio=0.5, data=data, metric="values")
    _, axes = torch.linalg.eigh(z.T @ z)
    assert by_values.report.sites[0].predicted == pytest.approx(lost(axes[:, 2:].T), rel=1e-9)
    assert best < by_values.report.sites[0].predicted


def test_lost_means_move_to_biases_new_ones_and_running_means():
    layers = nn.Linear(5, 6), nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU()
    normed = filled(nn.Sequential(*layers, nn.Linear(4, 2)))
    with torch.no_grad():
        normed[0].weight.zero_()
    small = compiled(normed, data_like(20, 5, dtype=torch.float32)[0], ratio=0.5)
    assert small.get_submodule("1").bias is None
    assert small.report.change < 1e-12
    bare = nn.Sequential(normed[0], normed[1], nn.ReLU(), normed[4])
    small = compiled(bare.double(), data_like(20, 5)[0], ratio=0.5)
    assert small.get_submodule("1").bias is not None
    assert small.report.change < 1e-18


def test_bias_of_attention_values_folds_into_the_projection_exactly():
    net = filled(Attention().double())
    with torch.no_grad():
        net.v.weight.zero_()
    small = compiled(net, data_like(3, 4, 5)[0], ratio=0.5)
    assert small.get_submodule("v").out_features == 4
    assert small.report.change < 1e-18


@pytest.mark.parametrize(("make", "space"), [(Attention, "v"), (Packed, "attention#2")])
def test_every_head_has_a_basis_of_its_own_and_keeps_equally_many(make, space):
    net = filled(make().double())
    small = compiled(net, data_like(3, 4, 5)[0], ratio=0.5)
    (edit,) = small.report.plan.edits
    assert (edit.space, edit.keep) == (space, (0, 1, 4, 5))
    found, _ = linear_edges(analyze(capture(net, data_like(3, 4, 5)[0])))
    assert [len(block) for block in found[0].blocks] == [4, 4]


def test_a_mixed_head_shows_the_rank_of_its_outputs():
    net = filled(Attention().double())
    with torch.no_grad():
        for head in (0, 1):
            rows = net.v.weight[4 * head : 4 * head + 4]
            rows.copy_(torch.randn(4, 2).double() @ rows[:2])
    assert compiled(net, data_like(3, 4, 5)[0], ratio=0.5).report.change < 1e-18


def between(layer, **extra):
    return nn.Sequential(nn.Conv2d(3, 6, 1), layer, nn.Conv2d(6, 4, 1))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.ReLU(), "`_1` (ReLU) stands in between and is not linear"),
        (
            nn.BatchNorm2d(6),
            "a batch norm (`_1`) stands in between: put Fold() before Rotate()",
        ),
        (nn.Dropout(0.2), "`_1` stands in between and drops single numbers in train mode"),
        (nn.Dropout2d(0.2), "`_1` stands in between and drops single numbers in train mode"),
        (nn.MaxPool2d(2), "`_1` (MaxPool2d) stands in between and is not linear"),
        (nn.GroupNorm(1, 6), "`_1` (GroupNorm) stands in between and is not linear"),
        (nn.PReLU(6), "`_1` (PReLU) stands in between and is not linear"),
        (nn.Conv2d(6, 6, 3, groups=6), "`1` is depthwise: it mixes some channels only"),
    ],
)
def test_what_does_not_commute_is_named(layer, reason):
    x = torch.randn(2, 3, 6, 6)
    skips = {s.space: s.why for s in compiled(between(layer).eval(), x).report.plan.skips}
    assert skips["0"] == reason


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (lambda m, x: x + 1.0, "`add` (add) stands in between and is not linear"),
        (lambda m, x: x + m.p, "`add` (add) stands in between and is not linear"),
        (lambda m, x: x * m.p, "`p` holds a number for each channel"),
        (lambda m, x: x * x, "`mul` (mul) stands in between and is not linear"),
        (lambda m, x: 1.0 / (x + x), "`truediv` (truediv) stands in between and is not linear"),
        (lambda m, x: F.dropout(x, 0.1), "`dropout` stands in between and drops"),
        (lambda m, x: torch.cat([2 * x[:, :3], x[:, 3:]], 1), "`getitem` takes it apart"),
        (lambda m, x: F.pad(x, (1, 1), value=1.0), "`pad` (pad) stands in between"),
    ],
)
def test_functions_that_do_not_commute_are_named(step, reason):
    net = Run(
        lambda m, x: m.b(step(m, m.a(x))),
        a=nn.Conv2d(3, 6, 1),
        b=nn.Conv2d(6, 4, 1),
        p=nn.Parameter(torch.randn(6, 1, 1)),
    )
    _, why = linear_edges(analyze(capture(net, torch.randn(2, 3, 6, 6))))
    assert why["a"].startswith(reason)


@pytest.mark.parametrize(
    "step",
    [
        lambda m, x: -x.flip(3) / 3,
        lambda m, x: F.pad(x, (1, 1)),
        lambda m, x: m.drop(m.same(x)),
        lambda m, x: F.dropout(x, 0.3, training=False),
        lambda m, x: x * torch.linspace(0, 1, 6, dtype=x.dtype),
        lambda m, x: F.interpolate(x, scale_factor=2, mode="bilinear"),
        lambda m, x: x.roll(1, 2).chunk(2, 2)[1],
        lambda m, x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    ],
)
def test_what_commutes_is_let_through(step):
    net = Run(
        lambda m, x: m.b(step(m, m.a(x))),
        a=nn.Conv2d(3, 6, 1),
        b=nn.Conv2d(6, 4, 1),
        drop=nn.Dropout(0.0),
        same=nn.Identity(),
    )
    x = data_like(2, 3, 6, 6)[0]
    small = compiled(filled(net.double()), x, ratio=0.0)
    assert small.report.plan.values
    assert small.report.error < 1e-9


def test_train_mode_equals_too():
    def run(m, x):
        return m.c(F.relu(m.norm(m.b(m.drop(m.a(x))))))

    net = Run(
        run,
        a=nn.Conv2d(3, 6, 1),
        drop=nn.Dropout(0.0),
        b=nn.Conv2d(6, 4, 1, bias=False),
        norm=nn.BatchNorm2d(4),
        c=nn.Conv2d(4, 2, 1),
    )
    net, x = filled(net.double()), data_like(4, 3, 6, 6)[0]
    turned = compiled(net, x, ratio=0.0)
    with torch.no_grad():
        expected, found = net.train()(x), turned.train()(x)
    assert float((expected - found).abs().max()) < 1e-9


class Inverted(nn.Module):
    """An inverted residual block, as in MobileNetV2."""

    def __init__(self, width, hidden):
        super().__init__()
        layers = nn.Conv2d(width, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()
        depth = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        rest = nn.BatchNorm2d(hidden), nn.ReLU6(), nn.Conv2d(hidden, width, 1, bias=False)
        self.conv = nn.Sequential(*layers, depth, *rest, nn.BatchNorm2d(width))

    def forward(self, x):
        return x + self.conv(x)


def bottlenecks():
    stem = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
    head = nn.Conv2d(8, 12, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)
    return filled(nn.Sequential(*stem, Inverted(8, 16), Inverted(8, 16), *head).double())


def test_linear_bottlenecks_rotate_once_their_norms_are_folded():
    net, data = bottlenecks(), data_like(4, 3, 6, 6)
    before = compiled(net, data[0], ratio=0.5, data=data).report.plan
    assert {s.space: s.why for s in before.skips}["0"].startswith("a batch norm (")
    exact = fxsvd.compile(
        net, data[0], passes=[Fold(), Rotate(ratio=0.0)], data=data, progress=False
    )
    assert exact.report.error < 1e-9
    assert exact.report.change < 1e-18
    passes = [Fold(), Rotate(ratio=0.25, only=("0",)), Select(ratio=0.25, ignore=("0",))]
    small = fxsvd.compile(net, data[0], passes=passes, data=data, progress=False)
    assert small.get_submodule("2.conv.6").out_channels == 6
    assert small.get_submodule("2.conv.0").out_channels == 12
    assert {s.edit for s in small.report.sites} == {"rotate", "select"}


def test_an_edge_that_is_not_linear_after_all_is_found_out(monkeypatch):
    monkeypatch.setattr(edges, "why_not", lambda *args: "")
    with pytest.raises(VerificationError, match="differs"):
        compiled(between(nn.ReLU()), torch.randn(2, 3, 6, 6), ratio=0.0)
    assert commuting.why_not is not edges.why_not


def test_coupled_widths_are_left_alone_but_rotate():
    class Heads(Attention):
        def forward(self, x):
            q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(q, k, v)
            return self.o(attended.transpose(1, 2).flatten(2))

    net = Heads()
    net.qkv = nn.Linear(5, 24)
    net, x = filled(net.double()), data_like(3, 4, 5)[0]
    plan = compiled(net, x, ratio=0.5).report.plan
    reasons = {s.space: s.why for s in plan.skips}
    assert reasons["qkv#2"].startswith("its width is tied to that of qkv#1: ")
    assert plan.values == ()
    turned = compiled(net, x, ratio=0.0)
    assert turned.report.plan.values
    assert turned.report.error < 1e-9


def test_ratios_by_name_multiples_and_exceptions():
    net = filled(nn.Sequential(*(nn.Linear(12, 12) for _ in range(4))))
    x = torch.randn(4, 12)

    def widths(**options):
        edits = compiled(net, x, **options).report.plan.edits
        return {e.space: len(e.keep) for e in edits}

    assert widths(ratio=0.25) == {"0": 9, "1": 9, "2": 9}
    assert widths(ratio=0.25, round_to=8) == {}
    assert widths(ratio=0.5, round_to=8) == {"0": 8, "1": 8, "2": 8}
    assert widths(ratio={"1": 0.5}) == {"1": 6}
    assert widths(only=("1", "2"), ignore=("2",)) == {"1": 6}


def test_only_what_is_meant_is_rotated():
    net = filled(nn.Sequential(*(nn.Linear(6, 6) for _ in range(4))))
    plan = compiled(net, torch.randn(4, 6), ratio={"1": 0.0}).report.plan
    assert sorted(v.parameter for v in plan.values) == ["1.bias", "1.weight", "2.bias", "2.weight"]


def test_bad_options_say_what_to_do():
    with pytest.raises(PlanError, match="metric is"):
        Rotate(metric="weights")
    with pytest.raises(PlanError, match="fraction removed"):
        Rotate(ratio=1.0)
    with pytest.raises(PlanError, match="data=batches"):
        fxsvd.compile(nn.Linear(2, 2), torch.randn(2, 2), passes=[Rotate()], progress=False)


def test_a_network_without_linear_edges_stays():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    plan = compiled(net, torch.randn(2, 3)).report.plan
    assert (plan.values, plan.edits, plan.exact) == ((), (), False)


def test_plans_survive_json_and_apply_again():
    net = filled(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)))
    x = data_like(5, 6, dtype=torch.float32)[0]
    small = compiled(net, x, ratio=0.5)
    plan = Plan.from_json(small.report.plan.to_json())
    assert torch.equal(fxsvd.apply(net, plan)(x), small(x))


def test_moments_of_functional_calls_are_those_of_their_inputs():
    net, x = filled(Packed().double()), data_like(3, 4, 5)[0]
    deps = analyze(capture(net, x))
    maps = linear_maps(deps)
    moments = input_moments(deps, [maps["attention.in_proj_weight"]], [x], positions="all")
    with torch.no_grad():
        rows = F.gelu(net.inner(x)).flatten(0, 1)
    found = moments["attention.in_proj_weight"].covariance[0]
    assert torch.allclose(found, rows.T.cov(correction=0), rtol=0, atol=1e-12)


def test_places_refuses_channels_that_stand_unequally_often():
    import numpy as np

    with pytest.raises(ValueError, match="more often"):
        places(np.array([0, 0, 1]), np.array([0, 1]))
