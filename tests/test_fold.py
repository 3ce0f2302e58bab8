"""Fold and Unfactorize: the same outputs from fewer layers."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxsvd
from fxsvd.edits import Plan
from fxsvd.errors import PlanError
from fxsvd.passes import Factorize, Fold, Unfactorize

NORMS = nn.modules.batchnorm._BatchNorm


def trained(net):
    """In eval mode and float64, with statistics and scales that are not those of a new norm."""
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, NORMS) and module.track_running_stats:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return net.double().eval()


def folded(net, x, *passes):
    """What the passes make of a network; its outputs are the network's own."""
    small = fxsvd.compile(net, x, passes=passes or [Fold()], progress=False).eval()
    with torch.no_grad():
        expected = net(x)
        assert (small(x) - expected).abs().max() < 1e-9 * expected.abs().max()
    return small


def kinds(graph):
    return [type(m).__name__ for m in graph.modules() if not list(m.children())]


def x2(channels=3, size=9):
    return torch.randn(2, channels, size, size, dtype=torch.float64)


@pytest.mark.parametrize(
    ("layer", "norm", "x"),
    [
        (nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), x2()),
        (nn.Conv2d(4, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6, affine=False), x2(4)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), x2(4)),
        (nn.Conv1d(3, 5, 2), nn.BatchNorm1d(5), torch.randn(2, 3, 7).double()),
        (nn.Conv3d(2, 3, 2), nn.SyncBatchNorm(3), torch.randn(2, 2, 3, 3, 3).double()),
        (nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5), torch.randn(4, 3).double()),
    ],
)
def test_a_batch_norm_goes_into_the_layer_in_front(layer, norm, x):
    net = trained(nn.Sequential(layer, norm, nn.ReLU()))
    small = folded(net, x)
    assert kinds(small) == [type(layer).__name__, "ReLU"]
    assert str(small.report.plan).splitlines()[0] == "1: folded into 0"


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, bias=False),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", groups=2),
        nn.Conv2d(4, 4, 1, padding="valid", groups=4),
    ],
)
def test_a_batch_norm_goes_into_the_layer_behind(layer):
    net = trained(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), layer))
    assert kinds(folded(net, x2(4))) == ["ReLU", "Conv2d"]


class Shared(nn.Module):
    """A norm that two layers feed, a layer that is called twice, a value that leaves."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.norm, self.once = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.d, self.seen = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        x = self.norm(self.a(x)) + self.norm(self.b(x))
        x = self.once(self.c(x)) + self.c(F.relu(x))
        d = self.d(x)
        return self.seen(d) + d


class Tokens(nn.Module):
    """A batch norm over positions, not features."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 5), nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.fc(x))


@pytest.mark.parametrize(
    ("net", "x"),
    [
        (Shared(), torch.randn(3, 4).double()),
        (Tokens(), torch.randn(2, 3, 4).double()),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)), x2()),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(0.5), nn.BatchNorm2d(4)), x2()),
    ],
)
def test_what_somebody_else_sees_stays(net, x):
    small = folded(trained(net), x)
    assert kinds(small) == kinds(net)
    assert any("no plain layer" in left.why for left in small.report.plan.left)


def test_a_norm_without_statistics_stays():
    net = trained(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)))
    assert folded(net, x2()).report.plan.substitutes == ()


LINE, IMAGE = torch.randn(3, 4).double(), torch.randn(2, 3, 9, 9).double()


@pytest.mark.parametrize(
    ("layers", "x", "left"),
    [
        ([nn.Linear(4, 9), nn.Linear(9, 5, bias=False)], LINE, 1),
        ([nn.Linear(4, 9), nn.Identity(), nn.Dropout(0.0), nn.Linear(9, 5)], LINE, 1),
        ([nn.Linear(4, 1), nn.Linear(1, 9)], LINE, 2),
        ([nn.Linear(4, 9), nn.Dropout(0.1), nn.Linear(9, 5)], LINE, 3),
        ([nn.Conv2d(3, 9, 1), nn.Conv2d(9, 4, 1, 2)], IMAGE, 1),
        ([nn.Conv2d(3, 9, 1), nn.Conv2d(9, 4, 3)], IMAGE, 1),
        ([nn.Conv2d(3, 9, 1, bias=False), nn.Conv2d(9, 4, 3, padding=1)], IMAGE, 1),
        ([nn.Conv2d(3, 9, 1), nn.Conv2d(9, 4, 3, padding=1)], IMAGE, 2),
        ([nn.Conv2d(3, 9, 3, padding=1), nn.Conv2d(9, 4, 1)], IMAGE, 1),
    ],
)
def test_linear_maps_in_a_row_become_one_where_that_is_smaller(layers, x, left):
    assert len(kinds(folded(trained(nn.Sequential(*layers)), x))) == left


def test_norms_go_before_what_they_separate_is_merged():
    net = trained(
        nn.Sequential(nn.Conv2d(3, 9, 3), nn.BatchNorm2d(9), nn.Conv2d(9, 4, 1), nn.BatchNorm2d(4))
    )
    assert kinds(folded(net, x2())) == ["Conv2d"]


class Pooled(nn.Module):
    def __init__(self, flatten):
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d((2, 4))
        self.flat, self.drop = nn.Flatten(), nn.Dropout(0.0)
        self.fc, self.flatten = nn.Linear(48, 5), flatten

    def forward(self, x):
        x = self.pool(F.relu(self.conv(x)))
        x = {
            "module": self.flat,
            "function": lambda x: torch.flatten(x, start_dim=1),
            "method": lambda x: x.flatten(1, -1),
        }[self.flatten](x)
        return self.fc(self.drop(x))


@pytest.mark.parametrize("flatten", ["module", "function", "method"])
def test_a_pool_that_copies_single_pixels_goes_into_the_layer_behind(flatten):
    net = trained(Pooled(flatten))
    small = folded(net, x2(size=3))
    assert small.fc[0].weight.shape == (5, 6)
    assert (small.fc[0].weight - net.fc.weight.reshape(5, 6, 8).sum(2)).abs().max() < 1e-15
    again = fxsvd.compile(small, x2(size=3), passes=[Fold()], progress=False)
    assert again.report.plan.substitutes == ()


def test_in_float32_the_promise_is_checked_before_rounding():
    layers = nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 4)
    net = trained(nn.Sequential(*layers)).float()
    small = fxsvd.compile(net, torch.randn(3, 6), passes=[Fold()], progress=False)
    assert kinds(small) == ["Linear"]
    assert small.report.error < 1e-14


def test_what_was_folded_can_be_factorised():
    net = trained(Pooled("module"))
    passes = [Fold(), Factorize(rank={"fc": 2}, last=True)]
    small = fxsvd.compile(net, x2(size=3), passes=passes, progress=False)
    row = next(r for r in small.report.layers if r.name == "fc")
    assert (row.before, row.after, row.parts) == ((5, 48), (), ((2, 6), (5, 2)))
    assert small.report.error < 1e-12


def test_a_pool_that_averages_stays():
    net = trained(Pooled("module"))
    assert folded(net, x2(size=6)).fc.weight.shape == (5, 48)


def test_dead_channels_go_and_constants_with_them():
    net = trained(
        nn.Sequential(
            nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4), nn.Linear(4, 2)
        )
    )
    with torch.no_grad():
        net[1].weight[2] = 0
        net[1].bias[2] = 3
        net[3].weight[:, 4] = 0
    x = torch.randn(5, 3).double()
    small = folded(net, x)
    assert small.get_submodule("0").out_features == 4
    waiting = {left.layer: left.why for left in small.report.plan.left}
    assert waiting == dict.fromkeys(["3", "4"], "dead channels go first: run Fold() again")
    twice = folded(net, x, Fold(), Fold())
    assert kinds(twice) == ["Linear", "ReLU", "Linear"]
    assert kinds(folded(net, x, Fold(dead=False))) == ["Linear", "ReLU", "Linear"]


def test_only_and_ignore_mean_layers():
    net = trained(nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()) * 2))
    net = trained(nn.Sequential(*(copy.deepcopy(m) for m in net)))
    assert kinds(folded(net, x2(), Fold(ignore=("4",)))).count("BatchNorm2d") == 1
    small = folded(net, x2(), Fold(only=("0", "1")))
    assert {left.layer: left.why for left in small.report.plan.left}["4"] == "not in `only`"
    with pytest.raises(PlanError, match="no layer is called 'norm'"):
        folded(net, x2(), Fold(only=("norm",)))


def test_a_folded_network_trains_exports_and_keeps_its_names(tmp_path):
    net = trained(
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1))
    )
    small = fxsvd.compile(net.float(), x2().float(), passes=[Fold()], progress=False)
    assert list(small.state_dict()) == ["0.weight", "0.bias", "3.weight", "3.bias"]
    small.train()(x2().float()).square().sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    exported = torch.export.export(small.eval(), (x2().float(),))
    assert torch.allclose(exported.module()(x2().float() * 0), small(x2().float() * 0))
    fxsvd.export_onnx(small, tmp_path / "small.onnx", x2().float())


def test_the_plan_survives_json_and_applies_to_the_network_again():
    net = trained(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)))
    small = folded(net, x2())
    plan = Plan.from_json(small.report.plan.to_json())
    assert plan == small.report.plan
    x = x2()
    assert torch.equal(fxsvd.apply(net, plan)(x), small(x))


@pytest.mark.parametrize("kernel", ["channel", "spatial", "tucker", "cp"])
def test_what_was_factorised_is_merged_back(kernel):
    conv = nn.Conv2d(8, 12, (3, 5), stride=(1, 2), padding=(1, 2), groups=2)
    net = trained(nn.Sequential(conv, nn.ReLU()))
    x = x2(8)
    split = fxsvd.compile(
        net, x, passes=[Factorize(rank=3, kernel=kernel, last=True)], progress=False
    )
    assert len(split.get_submodule("0")) > 1
    whole = folded(split, x, Unfactorize(always=True))
    assert kinds(whole) == ["Conv2d", "ReLU"]
    merged = next(m for m in whole.modules() if isinstance(m, nn.Conv2d))
    assert (merged.stride, merged.padding, merged.groups) == (conv.stride, conv.padding, 2)


def test_merging_back_waits_until_it_pays():
    net = trained(
        nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 3), nn.Linear(3, 6))
    )
    x = torch.randn(2, 6).double()
    small = folded(net, x, Unfactorize())
    assert [tuple(p.shape) for p in small.parameters()][:2] == [(2, 6), (2,)]
    assert kinds(small) == ["Linear", "Linear", "ReLU", "Linear"]
    assert {left.why for left in small.report.plan.left} == {"merged it would be larger"}
    assert kinds(folded(net, x, Unfactorize(always=True))) == ["Linear", "ReLU", "Linear"]
    named = folded(net, x, Unfactorize(always=True, only=("0", "1")))
    assert kinds(named) == ["Linear", "ReLU", "Linear", "Linear"]
