"""Factorize: closed forms of what is lost, ranks, kinds, and what stays."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxsvd
from fxsvd.data.readers import readers
from fxsvd.dependency import analyze
from fxsvd.edits import Left, Plan
from fxsvd.errors import FxsvdError, PlanError
from fxsvd.factoring.candidates import by_channel, by_kernel, weight_metrics
from fxsvd.factoring.maps import METHODS, Metric, factored, steep
from fxsvd.factoring.outputs import Outputs
from fxsvd.factoring.slopes import Slopes
from fxsvd.factoring.splitting import KINDS, Shape
from fxsvd.linalg.low_rank import RIDGES
from fxsvd.passes import Factorize, Fold, Select
from fxsvd.substitution import build


def convnet():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, 2, padding=1, groups=2)
    head = nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 5)
    return nn.Sequential(*layers, nn.ReLU(), *head).double().eval()


def batches(shape=(3, 8, 8), count=3):
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(count * 16, *shape, generator=generator, dtype=torch.float64)
    return list((mixed + 0.5 * mixed.flip(-1) + 1).split(16))


def compiled(net, *passes, data=None, x=None, **options):
    x = batches()[0] if x is None else x
    passes = passes or [Factorize(positions="all", **options)]
    return fxsvd.compile(net, x, passes=passes, data=data, progress=False)


def dense(seed=0, m=12, n=18, rows=40):
    """A weight, inputs with an offset, and the layer."""
    torch.manual_seed(seed)
    layer = nn.Linear(n, m).double()
    x = torch.randn(rows, n).double() @ torch.randn(n, n).double() + 3
    return layer, x


def lost(layer, small, x):
    with torch.no_grad():
        y, seen = layer(x), small(x)
    return float((y - seen).square().sum() / (y - y.mean(0)).square().sum())


# -------------------------------------------------------------------------------- what is lost


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_on_data_the_error_is_the_tail_of_the_output_spectrum(rank):
    layer, x = dense()
    y = layer(x).detach()
    energy = torch.linalg.eigvalsh(torch.cov(y.T)).flip(0)
    small = compiled(nn.Sequential(layer), data=[x[:7], x[7:]], x=x, rank=rank, last=True)
    expected = float(energy[rank:].sum() / energy.sum())
    (site,) = small.report.sites
    assert site.predicted == pytest.approx(expected, rel=1e-9)
    assert site.measured == pytest.approx(expected, rel=1e-9)
    assert lost(layer, small, x) == pytest.approx(expected, rel=1e-9)  # the mean is kept as well


@pytest.mark.parametrize("rank", range(1, 7))
def test_on_data_nothing_of_that_rank_loses_less(rank):
    layer, x = dense(seed=3)
    errors = {}
    for name in METHODS:
        if name != "gradient":
            for aware in (True, False):
                one = Factorize(rank=rank, last=True, method=name, data_aware=aware)
                small = compiled(nn.Sequential(layer), one, data=[x], x=x)
                (site,) = small.report.sites
                assert site.predicted == pytest.approx(site.measured, rel=1e-6)
                errors[name, aware] = site.predicted
    assert min(errors, key=errors.get) == ("svd", True)


def test_without_data_it_is_the_svd_of_the_weight():
    layer, x = dense()
    small = compiled(nn.Sequential(layer), x=x, rank=4, last=True)
    u, s, vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    first, second = (p.detach() for n, p in small.named_parameters() if "weight" in n)
    assert (second @ first - (u[:, :4] * s[:4]) @ vh[:4]).abs().max() < 1e-12
    assert torch.equal(small.get_parameter("0.1.bias"), layer.bias)
    assert (torch.linalg.vector_norm(first, dim=1) - s[:4]).abs().max() < 1e-12


@pytest.mark.parametrize("method", METHODS[2:])
def test_a_cur_keeps_rows_of_the_weight(method):
    layer, x = dense()
    for data in (None, [x]):
        small = compiled(nn.Sequential(layer), data=data, x=x, rank=4, last=True, method=method)
        rows = small.get_parameter("0.0.weight")
        kept = [(layer.weight == row).all(1).any() for row in rows]
        assert all(kept)


def test_balanced_factors_have_equal_norms_and_the_same_product():
    layer, x = dense()
    pair = [
        compiled(nn.Sequential(layer), data=[x], x=x, rank=4, last=True, split=split)
        for split in ("source", "balanced")
    ]
    a, b = (s.get_parameter("0.0.weight") for s in pair)
    c, d = (s.get_parameter("0.1.weight") for s in pair)
    assert (c @ a - d @ b).abs().max() < 1e-12
    assert (
        torch.linalg.vector_norm(b, dim=1) - torch.linalg.vector_norm(d, dim=0)
    ).abs().max() < 1e-12


def test_the_gradient_metric_keeps_what_the_loss_sees():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2)).double()
    with torch.no_grad():
        net[0].weight[2:] *= 10  # loud, but the second layer looks at the first two alone
        net[1].weight[:, 2:] = 0
    x = torch.randn(64, 8).double()
    target = torch.randn(64, 2).double()
    errors = {}
    for method in ("svd", "gradient"):
        one = Factorize(rank=2, method=method, loss=F.mse_loss, data=[(x, target)])
        small = compiled(net, one, data=[x], x=x)
        errors[method] = small.report.change
        (site,) = small.report.sites
        assert site.predicted == pytest.approx(site.measured, rel=1e-9)
    assert errors["gradient"] < 1e-2 * errors["svd"]


def test_in_the_gradient_metric_the_error_is_the_tail_of_the_weighted_spectrum():
    layer, x = dense()
    gradients = torch.randn(200, 12).double() @ torch.randn(12, 12).double()
    y = layer(x).detach()
    root = y - y.mean(0)
    seen = steep(Metric(root), Slopes.of(gradients))
    found = factored(layer.weight, Metric(root), 5, method="gradient", slopes=seen)
    g = gradients.T @ gradients
    g = g + 1e-3 * g.diagonal().mean() * torch.eye(12)
    half = torch.linalg.cholesky(g)
    rest = (root - root @ found.pick.T @ found.left.T) @ half
    tail = torch.linalg.svdvals(root @ half)[5:]
    assert float(rest.square().sum()) == pytest.approx(float(tail.square().sum()), rel=1e-9)


@pytest.mark.parametrize("rows", [3, 8, 50])
def test_slopes_are_the_root_of_the_damped_moment_of_gradients(rows):
    torch.manual_seed(0)
    g, x = torch.randn(rows, 8).double(), torch.randn(5, 8).double()
    moment = g.T @ g
    moment = moment + 1e-3 * moment.diagonal().mean() * torch.eye(8).double()
    slopes = Slopes.of(g)
    assert (slopes.half(slopes.half(x)) - x @ moment).abs().max() < 1e-9
    assert (slopes.inverse(slopes.half(x)) - x).abs().max() < 1e-9
    flat = Slopes.of(torch.zeros(rows, 8).double())
    assert torch.equal(flat.half(x), x)


# ------------------------------------------------------------------ one layer after the other


def perceptron(*between):
    torch.manual_seed(0)
    first, second, last = nn.Linear(10, 24), nn.Linear(24, 20), nn.Linear(20, 4)
    return nn.Sequential(first, *between, second, nn.ReLU(), last).double()


def by_hand(x, y, w, rank, ridges=RIDGES):
    """Rows of outputs of the best layer of a rank, by least squares on all rows."""
    centred, target = x - x.mean(0), y - y.mean(0)
    weight = centred.square().sum(0)
    best, least = None, torch.inf
    for ridge in ridges:
        inverse = torch.linalg.pinv(centred.T @ centred + ridge * weight.diag())
        m = w + (inverse @ centred.T @ (target - centred @ w.T)).T
        free = 1 - (1 + (centred @ inverse @ centred.T).trace()) / len(x)
        score = (target - centred @ m.T).square().sum() / free.square()
        if free > 0 and score < least:
            best, least = m, score
    u = torch.linalg.svd(centred @ best.T)[2][:rank]
    return y.mean(0) + centred @ best.T @ u.T @ u


@pytest.mark.parametrize("between", [(nn.ReLU(),), ()])
@pytest.mark.parametrize("rows", [200, 15])
def test_top_down_is_reduced_rank_regression_on_what_the_layer_gets(between, rows):
    net, x = perceptron(*between), torch.randn(rows, 10).double()
    first, second = net[0], net[1 + len(between)]
    options = {"rank": 3, "split": "balanced", "chaining": "top-down"}
    small = compiled(net, data=list(x.split(64)), x=x, **options)
    with torch.no_grad():
        y = first(x)
        u = torch.linalg.svd(y - y.mean(0))[2][:3]
        seen = y.mean(0) + (y - y.mean(0)) @ u.T @ u
        for layer in between:
            y, seen = layer(y), layer(seen)
        target = second(y)
        expected = by_hand(seen, target, second.weight, 3)
        assert (small(x) - net[-2:](expected)).abs().max() < 1e-9
    share = (expected - target).square().sum() / (target - target.mean(0)).square().sum()
    site = small.report.sites[-1]
    assert site.predicted == pytest.approx(float(share), rel=1e-9)
    assert site.measured == pytest.approx(float(share), rel=1e-9)


def test_top_down_predicts_what_is_measured_in_every_layer():
    options = {"rank": 3, "last": True, "chaining": "top-down"}
    small = compiled(convnet(), data=batches(), **options)
    assert [site.layer for site in small.report.sites] == ["0", "2", "6", "8"]
    for site in small.report.sites:
        assert site.predicted == pytest.approx(site.measured, rel=1e-6)


def test_top_down_loses_less_than_every_layer_by_itself():
    lost = [
        compiled(convnet(), data=batches(count=12), rank=3, chaining=c).report.sites[-1].measured
        for c in ("parallel", "top-down")
    ]
    assert lost[1] < lost[0]


def test_a_layer_that_gets_what_it_used_to_get_is_fitted_by_itself():
    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(8, 9), nn.Linear(8, 9), nn.Linear(9, 2)

        def forward(self, x):
            return self.out(F.relu(self.a(x)) * self.b(x))

    torch.manual_seed(0)
    net, x = Apart().double(), torch.randn(40, 8).double()
    pair = [
        compiled(net, data=[x], x=x, rank=2, chaining=c).state_dict()
        for c in ("parallel", "top-down")
    ]
    assert pair[0].keys() == pair[1].keys()
    assert all(torch.equal(pair[0][n], pair[1][n]) for n in pair[0])


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.out(self.fc(F.relu(self.fc(x))))


def test_top_down_a_layer_called_twice_keeps_its_own_fit():
    torch.manual_seed(0)
    net, x = Twice().double(), torch.randn(40, 8).double()
    pair = [
        compiled(net, data=[x], x=x, rank=2, chaining=c).get_parameter("fc.0.weight")
        for c in ("parallel", "top-down")
    ]
    assert torch.equal(*pair)


# ------------------------------------------------------------------------- statistics of outputs


def test_outputs_in_any_order_have_the_covariance_of_all_rows():
    torch.manual_seed(0)
    rows = torch.randn(700, 2, 5).double() * 3 + 1e4
    seen, other = Outputs(), Outputs()
    for part in rows[:300].split([1, 7, 292]):
        seen.add(part)
    other.add(rows[300:])
    other.merge(seen)
    assert other.count == 700
    for g in range(2):
        expected = 700 * torch.cov(rows[:, g].T, correction=0)
        z = other.root[g]
        assert (z.T @ z - expected).abs().max() < 1e-9 * expected.abs().max()
    assert (other.mean - rows.mean(0)).abs().max() < 1e-9


def test_outputs_keep_small_singular_values_exactly():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(6, 6).double()).Q
    sizes = torch.logspace(0, -12, 6, dtype=torch.float64)
    rows = torch.randn(500, 6).double() * sizes @ basis
    seen = Outputs()
    for part in rows.split(50):
        seen.add(part.unsqueeze(1))
    centred = torch.linalg.svdvals(rows - rows.mean(0))
    assert (torch.linalg.svdvals(seen.root[0]) / centred - 1).abs().max() < 1e-3


# ------------------------------------------------------------------------------------------ ranks


def test_each_goal_gives_the_rank_it_asks_for():
    layer, x = dense(m=20, n=30)
    energy = torch.linalg.eigvalsh(torch.cov(layer(x).detach().T)).flip(0)
    kept = energy.cumsum(0) / energy.sum()
    wanted = {
        "cr": (4, 20 * 30 // (4 * 50)),
        "rank": (5, 5),
        "energy": (0.9, int((kept < 0.9).sum()) + 1),
        "error": (0.25, int((1 - kept > 0.25).sum()) + 1),
    }
    for goal, (number, rank) in wanted.items():
        small = compiled(nn.Sequential(layer), data=[x], x=x, last=True, **{goal: number})
        assert small.get_parameter("0.0.weight").shape == (rank, 30), goal


def test_the_ranks_of_the_reported_experiment():
    ranks = {25: (141, 82), 150: (24, 14), 225: (16, 10), 300: (12, 7), 600: (6, 4)}
    for ratio, (first, second) in ranks.items():
        for size, rank in ((25088, first), (4096, second)):
            assert Shape(4096, size).for_ratio("channel", ratio, "up") == (rank,)


@pytest.mark.parametrize("kind", KINDS)
def test_a_ratio_is_the_largest_rank_that_keeps_it(kind):
    shape = Shape(24, 16, (3, 5))
    for ratio in (1.5, 4, 11):
        rank = shape.for_ratio(kind, ratio)
        more = shape.rank(kind, rank[0] + 1)
        assert shape.size(kind, rank) * ratio <= shape.numbers < shape.size(kind, more) * ratio
        up = shape.for_ratio(kind, ratio, "up")
        assert shape.size(kind, up) * ratio >= shape.numbers


def test_copies_of_few_values_make_an_exact_small_layer():
    net = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(7 * 16, 40)).float()
    data = [torch.randn(32, 7, 1, 1) for _ in range(3)]
    small = compiled(net, data=data, x=data[0], error=1e-18, last=True)
    assert small.get_parameter("2.0.weight").shape[0] <= 7
    assert small.report.change < 1e-11
    again = compiled(net, data=data, x=data[0], energy=1.0, last=True)
    assert again.get_parameter("2.0.weight").shape[0] <= 7


def test_a_rank_above_what_the_data_spans_is_filled_from_the_weight():
    layer, x = dense(rows=3)
    small = compiled(nn.Sequential(layer), data=[x], x=x, rank=6, last=True)
    first, second = small.get_parameter("0.0.weight"), small.get_parameter("0.1.weight")
    assert first.shape == (6, 18)
    assert torch.linalg.matrix_rank(second @ first) == 6
    assert small.report.sites[0].measured < 1e-20


# ---------------------------------------------------------------------------------- convolutions


@pytest.mark.parametrize("aware", [True, False])
@pytest.mark.parametrize("kernel", ["auto", *KINDS])
def test_every_kind_predicts_what_is_measured(kernel, aware):
    small = compiled(
        convnet(), data=batches(), cr=2, kernel=kernel, data_aware=aware, ignore=("2",)
    )
    site = small.report.sites[0] if small.report.sites else None
    if aware:
        assert site.layer == "0"
        assert site.predicted == pytest.approx(site.measured, rel=1e-6)
    assert small.report.error < 1e-12
    assert small.report.after.parameters < small.report.before.parameters


def test_a_refit_loses_less_than_the_weight_alone():
    for kernel in ("spatial", "tucker", "cp"):
        changes = [
            compiled(convnet(), data=batches(), cr=3, kernel=kernel, only=("0",), data_aware=aware)
            for aware in (True, False)
        ]
        assert changes[0].report.change < changes[1].report.change


def test_auto_takes_what_loses_least():
    errors = {}
    for kernel in ("auto", "channel", "spatial", "tucker"):
        small = compiled(convnet(), data=batches(), cr=2, kernel=kernel, only=("0",))
        errors[kernel] = small.report.sites[0].predicted
    assert errors["auto"] == min(errors.values())


@pytest.mark.parametrize("padding", [(2, 1), "same"])
@pytest.mark.parametrize("kind", ["channel", "spatial", "tucker"])
def test_at_full_rank_the_parts_compute_what_the_layer_does(kind, padding):
    stride = 1 if padding == "same" else (1, 2)
    conv = nn.Conv2d(8, 12, (3, 5), stride, padding, (2, 1), groups=2, padding_mode="reflect")
    net, x = nn.Sequential(conv).double(), torch.randn(2, 8, 12, 12).double()
    reader = readers(analyze(fxsvd.capture(net, x)))["0"]
    full = Shape.of(conv).rank(kind, Shape.of(conv).most(kind))
    if kind == "channel":
        pairs = zip(reader.matrices(), weight_metrics(reader), strict=True)
        made = by_channel(reader, [factored(w, m, *full) for w, m in pairs], None, None)
    else:
        made = by_kernel(reader, kind, full, 0)
    chain = nn.Sequential(*(build(part, conv.weight) for part in made.parts()))
    assert (chain(x) - conv(x)).abs().max() < 1e-10


# ------------------------------------------------------------------------------------ what stays


def test_layers_that_stay_say_why():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.tiny, self.depthwise = nn.Linear(8, 2), nn.Conv1d(4, 4, 3, groups=4, padding=1)
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight
            self.more, self.fc, self.last = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, x):
            x = self.depthwise(x)
            x = self.b(F.relu(self.a(x)))
            return self.last(F.relu(self.fc(self.more(x)))) + self.tiny(x).sum(-1, keepdim=True)

    x = torch.randn(2, 4, 8)
    small = compiled(Net(), x=x, rank=2, ignore=("fc",))
    why = {left.layer: left.why for left in small.report.plan.left}
    assert why["fc"] == "in `ignore`"
    assert "last layer" in why["last"]
    assert "last layer" in why["tiny"]
    assert "shares its weight" in why["a"]
    assert why["depthwise"].startswith("rank 2 is above the 1")
    assert "layers left as they are:\n" in str(small.report)
    again = compiled(Net(), x=x, rank=2, last=True, only=("fc",))
    assert {left.why for left in again.report.plan.left} == {"not in `only`"}
    assert Plan.from_json(small.report.plan.to_json()) == small.report.plan
    assert str(Left("fc", "x")) == "fc: left (x)"


def test_a_layer_called_twice_is_replaced_in_both_places():
    x = torch.randn(5, 8).double()
    small = compiled(Twice().double(), data=[x], x=x, rank=2)
    assert small.code.count("self.fc") >= 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one"),
        ({"cr": 2, "rank": 3}, "exactly one"),
        ({"cr": 0.5}, "1 or more; got 0.5"),
        ({"cr": {"0": 2, "7": 0}}, "1 or more; got 0"),
        ({"rank": 0}, "1 or more"),
        ({"rank": 2.5}, "whole number"),
        ({"energy": 1.5}, "up to 1"),
        ({"error": 1}, "below 1"),
        ({"cr": 2, "method": "best"}, "no method 'best'"),
        ({"cr": 2, "kernel": "wide"}, "no kernel 'wide'"),
        ({"cr": 2, "method": "qr", "kernel": "tucker"}, "splits by channel"),
        ({"energy": 0.5, "kernel": "cp"}, "no spectrum"),
        ({"cr": 2, "method": "gradient"}, "needs loss"),
        ({"cr": 2, "chaining": "sideways"}, "no chaining 'sideways'"),
        ({"cr": 2, "chaining": "top-down", "method": "qr"}, "fits layers by themselves"),
        ({"cr": 2, "chaining": "top-down", "kernel": "tucker"}, "splits by channel"),
        ({"cr": 2, "chaining": "top-down"}, r"give compile\(…, data=batches\)"),
        ({"cr": 2, "data_aware": True}, r"give compile\(…, data=batches\)"),
        ({"rank": {"0": 13}}, "rank 13 is above the 12 that 0 can have"),
        ({"rank": 13, "only": ("0",)}, "above the 12"),
        ({"cr": 2, "only": ("fc",)}, "no layer is called 'fc'"),
        ({"cr": {"fc": 2}}, "no layer is called 'fc'"),
    ],
)
def test_bad_options_say_what_is_wrong(options, message):
    with pytest.raises(PlanError, match=message):
        compiled(convnet(), **options)


def test_numbers_that_are_not_finite_are_named():
    data = batches()
    data[1][0] = torch.nan
    with pytest.raises(FxsvdError, match="0 puts out numbers that are not finite"):
        compiled(convnet(), data=data, cr=2)
    with pytest.raises(FxsvdError, match="no batch"):
        compiled(convnet(), data=[], cr=2)


def test_ratios_by_name_and_known_decompositions():
    known = {}
    for _ in range(2):
        small = compiled(convnet(), data=batches(), cr={"0": 2, "6": 4}, known=known)
        changed = {s.layer for s in small.report.plan.substitutes}
        assert changed == {"0", "6"}
        assert {left.layer: left.why for left in small.report.plan.left}["2"] == (
            "no pattern matches it"
        )
        once = dict(known)
    assert once == known
    assert ("0", "outputs") in known


def test_the_network_itself_is_not_touched():
    net = convnet()
    before = {n: p.clone() for n, p in net.state_dict().items()}
    compiled(net, data=batches(), cr=2)
    assert all(torch.equal(p, before[n]) for n, p in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


# ------------------------------------------------------------------------------------ end to end


def test_folding_selecting_and_factorizing_compose(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, 2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        *(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 5)),
    ).eval()
    data = [b.float() for b in batches(count=10)]
    small = compiled(net, Fold(), Select(ratio=0.5), Factorize(cr=4), data=data, x=data[0])
    edits = {site.edit for site in small.report.sites}
    assert edits == {"select", "factorize"}
    assert small.report.after.parameters < small.report.before.parameters / 6
    fxsvd.verify(net, small, data[0])
    fxsvd.export_onnx(small, tmp_path / "small.onnx", data[0])
    small.train()(data[0]).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["channel", "spatial", "tucker", "cp"])
def test_resnet18_with_every_kernel(kernel):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    net = models.resnet18(weights=None).eval()
    x = torch.randn(2, 3, 64, 64)
    # The rank of a core or a sum of products is kept low: what is tested is that all layers fit.
    small = compiled(net, Factorize(cr=6 if kernel != "cp" else 40, kernel=kernel), x=x)
    assert small.report.error < 1e-8
    assert len(small.report.plan.substitutes) == 20
