"""Layers as data, replaced in a graph, and merged back."""

import pytest
import torch
from torch import nn

import fxsvd
from fxsvd.dependency import analyze
from fxsvd.edits import Part, Plan, Substitute
from fxsvd.errors import PlanError
from fxsvd.folding.composing import behind, composed, idle, obstacle, partition, runs, size
from fxsvd.folding.plain import plain_layers
from fxsvd.substitution import (
    build,
    common_groups,
    convolution_part,
    in_full,
    linear_part,
    merged,
    options_of,
)

torch.manual_seed(0)


def double(*layers):
    return [layer.double() for layer in layers]


CHAINS = {
    "linear": (double(nn.Linear(5, 3), nn.Linear(3, 7, bias=False)), (4, 5)),
    "channel": (
        double(nn.Conv2d(4, 3, (3, 5), 2, padding=(1, 2), bias=False), nn.Conv2d(3, 6, 1)),
        (2, 4, 9, 11),
    ),
    "spatial": (
        double(
            nn.Conv2d(4, 3, (3, 1), (2, 1), padding=(1, 0), bias=False),
            nn.Conv2d(3, 6, (1, 5), (1, 3), padding=(0, 2), dilation=(1, 2)),
        ),
        (2, 4, 9, 21),
    ),
    "tucker": (
        double(
            nn.Conv2d(4, 3, 1, bias=False),
            nn.Conv2d(3, 2, 3, padding="same", dilation=2, bias=False),
            nn.Conv2d(2, 6, 1),
        ),
        (2, 4, 9, 9),
    ),
    "cp": (
        double(
            nn.Conv2d(4, 6, 1, groups=2, bias=False),
            nn.Conv2d(6, 6, (3, 1), padding=(1, 0), groups=6, bias=False),
            nn.Conv2d(6, 6, (1, 3), padding=(0, 1), groups=6, bias=False),
            nn.Conv2d(6, 8, 1, groups=2),
        ),
        (2, 4, 7, 8),
    ),
    "reflected": (
        double(
            nn.Conv1d(4, 4, 1, groups=4),
            nn.Conv1d(4, 6, 3, padding=2, padding_mode="reflect", groups=2),
        ),
        (2, 4, 9),
    ),
    "three dimensions": (
        double(nn.Conv3d(2, 3, 1), nn.Conv3d(3, 2, 2), nn.Conv3d(2, 3, 1, bias=False)),
        (2, 2, 4, 5, 6),
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_the_composed_layer_computes_what_the_chain_does(name):
    chain, shape = CHAINS[name]
    assert obstacle(chain) is None
    part = composed(chain)
    one = build(part, torch.zeros(1, dtype=torch.float64))
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        expected = nn.Sequential(*chain)(x)
        assert one(x).shape == expected.shape
        assert (one(x) - expected).abs().max() < 1e-12 * expected.abs().max()
    assert size(chain) == sum(p.numel() for p in one.parameters())


@pytest.mark.parametrize(
    ("chain", "why"),
    [
        ([nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, (3, 1))], "one spatial dimension"),
        ([nn.Conv2d(1, 1, 1, 2), nn.Conv2d(1, 1, 3)], "one spatial dimension"),
        ([nn.Conv2d(1, 1, 1, padding=1), nn.Conv2d(1, 1, 3)], "one spatial dimension"),
        ([nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 3, padding="same")], "a bias meets the zeros"),
        ([nn.Conv1d(1, 1, 1), nn.Conv1d(1, 1, 2, padding="same")], "more behind than before"),
    ],
)
def test_what_does_not_compose_is_refused(chain, why):
    assert why in obstacle(chain)


def test_a_bias_of_zeros_meets_no_zeros():
    first, second = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 3, padding=1)
    with torch.no_grad():
        first.bias.zero_()
    assert obstacle([first, second]) is None


def test_merged_grouped_kernels_are_blocks():
    chain, _ = CHAINS["cp"]
    assert common_groups(chain) == 2
    weight, bias = merged(chain)
    assert weight.shape == (8, 2, 3, 3)
    first, high, wide, last = (layer.weight.detach().squeeze() for layer in chain)
    for g in range(2):
        own, out = slice(3 * g, 3 * g + 3), slice(4 * g, 4 * g + 4)
        factors = first[own], high[own], wide[own], last[out]
        expected = torch.einsum("ri,rh,rw,or->oihw", *factors)
        assert (weight[out] - expected).abs().max() < 1e-14
    assert torch.equal(bias, chain[-1].bias)


def test_the_partition_of_a_run_leaves_the_fewest_numbers():
    chain = [nn.Linear(a, b) for a, b in [(6, 2), (2, 6), (6, 9), (9, 5)]]

    def total(parts):
        return sum(size(chain[p.start : p.stop]) for p in parts)

    ways = [
        [range(a, b) for a, b in zip([0, *cuts], [*cuts, 4], strict=True)]
        for cuts in ([], [1], [2], [3], [1, 2], [1, 3], [2, 3], [1, 2, 3])
    ]
    assert total(partition(chain)) == min(map(total, ways))
    assert partition(chain, always=True) == [range(4)]


def test_runs_end_where_somebody_else_looks():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            for i, name in enumerate("abcdef"):
                setattr(self, name, nn.Linear(i + 2, i + 3))
            self.same = nn.Identity()

        def forward(self, x):
            a = self.a(x)
            c = self.same(self.c(self.b(a)))
            e = self.e(self.d(c))
            return self.f(e), a

    deps = analyze(fxsvd.capture(Net(), torch.zeros(2, 2)))
    graph = deps.analysis.graph
    (run,) = runs(graph, plain_layers(deps, last=True)[0])
    assert run.layers == ("b", "c", "d", "e", "f")
    assert run.between == ((), ("same",), (), ())
    call = next(n for n in graph.graph.nodes if n.target == "a")
    assert behind(graph, call, lambda path: idle(graph.get_submodule(path)))[0] is None


def test_shapes_behind_a_layer_that_is_gone_follow():
    net = nn.Sequential(nn.Conv2d(3, 4, 2), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(36, 2))
    part = linear_part(net[3].weight.detach().reshape(2, 4, 9).sum(2), net[3].bias.detach())
    plan = Plan(substitutes=(Substitute("1", (), ""), Substitute("3", (part,), "")), exact=True)
    small = fxsvd.apply(fxsvd.capture(net, torch.zeros(2, 3, 2, 2)), plan)
    shapes = {n.name: tuple(n.meta["val"].shape[1:]) for n in small.graph.nodes if "val" in n.meta}
    out = {"output": (2,)}
    assert shapes == {"input_1": (3, 2, 2), "_0": (4, 1, 1), "_2": (4,), "_3": (2,)} | out
    assert [s.width for s in analyze(small).spaces] == [4, 2]


def test_numbers_in_full_are_those_of_the_plan():
    part = linear_part(torch.full((2, 3), 1 / 3, dtype=torch.float64))
    plan = Plan(substitutes=(Substitute("0", (part,), ""),))
    small = fxsvd.apply(fxsvd.capture(nn.Sequential(nn.Linear(3, 2)), torch.zeros(2, 3)), plan)
    assert small.get_parameter("0.0.weight").dtype == torch.float32
    twin = small.double()
    assert not torch.equal(twin.get_parameter("0.0.weight"), part.tensors["weight"])
    in_full(twin, plan.substitutes)
    assert torch.equal(twin.get_parameter("0.0.weight"), part.tensors["weight"])


def test_options_and_modes_are_kept():
    layer = nn.Conv2d(4, 4, 3, 2, padding=1, padding_mode="circular", groups=2, bias=False)
    part = convolution_part(layer.weight.detach(), **options_of(layer))
    like = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    twin = build(part, like)
    assert repr(twin) == repr(layer)
    assert twin.weight.dtype == torch.float64
    assert twin.weight.requires_grad


TWO = {"in_features": 2, "out_features": 2}


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Part("Dropout", {}, {}), "not 'Dropout'"),
        (Part("Linear", TWO, {"weight": torch.zeros(3, 3)}), "holds a weight"),
        (Part("Linear", TWO, {"mass": torch.zeros(3)}), "holds a mass"),
    ],
)
def test_parts_that_fit_nothing_are_refused(part, message):
    with pytest.raises(PlanError, match=message):
        build(part, torch.zeros(1))


def test_a_plan_for_another_network_is_refused():
    graph = fxsvd.capture(nn.Sequential(nn.Linear(2, 2)), torch.zeros(2, 2))
    with pytest.raises(PlanError, match="calls no layer 'fc'"):
        fxsvd.apply(graph, Plan(substitutes=(Substitute("fc", (), ""),)))
