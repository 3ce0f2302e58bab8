"""Spectra of residual branches as linear operators, against what becomes of impulses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxsvd
from fxsvd.evolving.operators import Residual, residual_spectra
from fxsvd.passes import Prune
from tests.helpers.nets.base import Net

Run = Callable[[Any, Tensor], Tensor]


def conv(into: int, out: int, size: Any = 3, **options: Any) -> nn.Module:
    return nn.Conv2d(into, out, size, **{"padding": size // 2, **options})


def norm(width: int) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(width)
    for tensor in (made.weight.data, made.bias.data, made.running_mean, made.running_var):
        assert tensor is not None
        tensor.copy_(torch.rand(width) + 0.5)
    return made


def found(net: nn.Module, x: Tensor) -> tuple[Residual, ...]:
    return residual_spectra(fxsvd.analyze(fxsvd.capture(net.eval(), x)))


def responses(linear: Callable[[Tensor], Tensor], width: int, dims: int) -> Tensor:
    """The singular values of all that an impulse becomes, far from the borders, output first."""
    size = 15
    x = torch.zeros(width, width, *[size] * dims).double()
    for channel in range(width):
        x[(channel, channel, *[size // 2] * dims)] = 1
    with torch.no_grad():
        y = linear(x) - linear(torch.zeros_like(x))
    return torch.linalg.svdvals(y.transpose(0, 1).flatten(1))


CASES: dict[str, tuple[Run, dict[str, Callable[[], Any]]]] = {
    "two 3×3": (
        lambda m, x: x + m.b(F.relu(m.a(x))),
        {"a": lambda: conv(4, 3), "b": lambda: conv(3, 4)},
    ),
    "after an activation, with norms, in place": (
        lambda m, x: m.b_norm(m.b(m.a_norm(m.a(x)).relu_())).add_(x),
        {
            "a": lambda: conv(4, 3, bias=False),
            "a_norm": lambda: norm(3),
            "b": lambda: conv(3, 4, bias=False),
            "b_norm": lambda: norm(4),
        },
    ),
    "before an activation": (
        lambda m, x: x + m.b(F.relu(m.b_norm(m.a(F.relu(m.a_norm(x)))))),
        {
            "a_norm": lambda: norm(4),
            "a": lambda: conv(4, 5),
            "b_norm": lambda: norm(5),
            "b": lambda: conv(5, 4),
        },
    ),
    "a norm on the skip": (
        lambda m, x: m.norm(x) + m.b(m.a(x)),
        {"norm": lambda: norm(4), "a": lambda: conv(4, 3), "b": lambda: conv(3, 4)},
    ),
    "1×1 and dilated 5×5, padded unevenly": (
        lambda m, x: m.b(m.a(x)) + x,
        {
            "a": lambda: conv(4, 6, 1, padding=1),
            "b": lambda: conv(6, 4, 5, padding=3, dilation=2),
        },
    ),
    "same padding of even kernels": (
        lambda m, x: x + m.b(m.a(x)),
        {
            "a": lambda: conv(4, 3, 4, padding="same"),
            "b": lambda: conv(3, 4, 2, padding="same", dilation=3),
        },
    ),
    "a skip that tiles": (
        lambda m, x: x.repeat(1, 3, 1, 1)[:, :10] + m.b(F.leaky_relu(m.a(x), 0.1)),
        {"a": lambda: conv(4, 5), "b": lambda: conv(5, 10)},
    ),
    "a skip by an index": (
        lambda m, x: x.index_select(1, m.order) + m.b(F.leaky_relu(m.a(x), 0.1)),
        {
            "a": lambda: conv(4, 5),
            "b": lambda: conv(5, 6),
            "order": lambda: torch.tensor([3, 0, 0, 1, 2, 3]),
        },
    ),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even:UserWarning")  # torch's own
@pytest.mark.parametrize("name", CASES)
def test_the_operator_is_what_becomes_of_impulses(name: str) -> None:
    run, layers = CASES[name]
    torch.manual_seed(0)
    net = Net(run, **{key: make() for key, make in layers.items()}).double().eval()
    (residual,) = found(net, torch.randn(2, 4, 15, 15).double())
    assert (residual.first, residual.second) == ("a", "b")

    linear = copy.deepcopy(net)
    nothing = {"relu": lambda x: x, "leaky_relu": lambda x, *_: x}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in nothing.items():
            patch.setattr(F, key, value)
        patch.setattr(torch.Tensor, "relu_", lambda x: x)
        expected = responses(linear, 4, 2)
    assert torch.allclose(residual.operator, expected, rtol=1e-9, atol=1e-11)


def test_the_spectra_of_the_layers_are_those_of_their_matrices() -> None:
    run, layers = CASES["two 3×3"]
    net = Net(run, **{key: make() for key, make in layers.items()}).double()
    (residual,) = found(net, torch.randn(2, 4, 7, 7).double())
    for values, layer in ((residual.a, net.a), (residual.b, net.b)):
        expected = torch.linalg.svdvals(layer.get_parameter("weight").flatten(1))
        assert torch.allclose(values, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dims", [1, 3])
def test_other_numbers_of_dimensions_compose_as_well(dims: int) -> None:
    torch.manual_seed(0)
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    a, b = kind(3, 2, 3, padding=1), kind(2, 3, 3, padding=1)
    net = Net(lambda m, x: x + m.b(m.a(x)), a=a, b=b).double()
    (residual,) = found(net, torch.randn(2, 3, *[15] * dims).double())
    assert torch.allclose(residual.operator, responses(net, 3, dims), rtol=1e-9, atol=1e-11)


def test_linear_layers_have_the_operator_of_their_product() -> None:
    net = Net(lambda m, x: x + m.b(m.a(x).tanh()), a=nn.Linear(5, 3), b=nn.Linear(3, 5)).double()
    (residual,) = found(net, torch.randn(4, 5).double())
    product = net.b.get_parameter("weight") @ net.a.get_parameter("weight")
    expected = torch.linalg.svdvals(torch.eye(5).double() + product)
    assert torch.allclose(residual.operator, expected, rtol=1e-9)


OTHERS: dict[str, tuple[Run, dict[str, Callable[[], nn.Module]]]] = {
    "no skip": (lambda m, x: m.b(m.a(x)), {"a": lambda: conv(4, 3), "b": lambda: conv(3, 4)}),
    "a projection": (
        lambda m, x: m.c(x) + m.b(m.a(x)),
        {"a": lambda: conv(4, 3), "b": lambda: conv(3, 4), "c": lambda: conv(4, 4, 1)},
    ),
    "a skip around one": (
        lambda m, x: (y := m.a(x)) + m.b(y),
        {"a": lambda: conv(4, 4), "b": lambda: conv(4, 4)},
    ),
    "three layers": (
        lambda m, x: x + m.c(m.b(m.a(x))),
        {"a": lambda: conv(4, 3), "b": lambda: conv(3, 3), "c": lambda: conv(3, 4)},
    ),
    "groups": (
        lambda m, x: x + m.b(m.a(x)),
        {"a": lambda: conv(4, 4, groups=2), "b": lambda: conv(4, 4)},
    ),
    "something between that is no factor": (
        lambda m, x: x + m.b(m.a(x).square()),
        {"a": lambda: conv(4, 3), "b": lambda: conv(3, 4)},
    ),
    "a layer called twice": (
        lambda m, x: x + m.b(m.a(x)) + m.a(x).mean(),
        {"a": lambda: conv(4, 3), "b": lambda: conv(3, 4)},
    ),
    "a weighted sum": (
        lambda m, x: torch.add(x, m.b(m.a(x)), alpha=2),
        {"a": lambda: conv(4, 3), "b": lambda: conv(3, 4)},
    ),
    "a skip that shifts pixels": (
        lambda m, x: x.roll(1, 2) + m.b(m.a(x)),
        {"a": lambda: conv(4, 3), "b": lambda: conv(3, 4)},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_branches_are_left_out(name: str) -> None:
    run, layers = OTHERS[name]
    net = Net(run, **{key: make() for key, make in layers.items()})
    assert found(net, torch.randn(2, 4, 9, 9)) == ()


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = conv(2, 4)
        self.blocks = nn.ModuleList(
            Net(lambda m, x: F.relu(x + m.b(F.relu(m.a(x)))), a=conv(4, 3), b=conv(3, 4))
            for _ in range(2)
        )
        self.head = nn.Linear(4, 2)
        with torch.no_grad():
            weight = self.blocks[1].get_parameter("a.weight")
            weight[1:] = weight[:1]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def test_every_block_of_a_network_gives_advice() -> None:
    residuals = found(Blocks().double(), torch.randn(2, 2, 9, 9).double())
    assert [r.name for r in residuals] == ["blocks.0", "blocks.1"]
    assert residuals[1].advice() == (
        "blocks.1: width by σ > 0.01 σ_max: 4 of 4; "
        "blocks.1.a has rank 1 of 3, blocks.1.b rank 4 of 4"
    )


def test_the_width_is_that_of_the_operator_and_not_of_its_layers() -> None:
    net = Net(lambda m, x: x + m.b(m.a(x)), a=nn.Linear(3, 3), b=nn.Linear(3, 3)).double()
    with torch.no_grad():
        for layer in (net.a, net.b):
            layer.get_parameter("weight").copy_(torch.eye(3))
        net.b.get_parameter("weight")[0, 0] = -1.0  # takes away what the skip hands on
    (residual,) = found(net, torch.randn(4, 3).double())
    assert torch.allclose(residual.operator, torch.tensor([2.0, 2.0, 0.0]).double(), atol=1e-12)
    assert "2 of 3; a has rank 3 of 3, b rank 3 of 3" in residual.advice()


def test_numbers_that_are_not_finite_show_as_such() -> None:
    net = Net(lambda m, x: x + m.b(m.a(x)), a=nn.Linear(3, 2), b=nn.Linear(2, 3))
    net.a.get_parameter("weight").data[0, 0] = torch.inf
    deps = fxsvd.analyze(fxsvd.capture(net, torch.randn(2, 3), check=False))
    (residual,) = residual_spectra(deps)
    assert residual.operator.isnan().all()
    assert "0 of 3" in residual.advice()


def test_the_history_shows_the_advice() -> None:
    net, x = Blocks().double(), torch.randn(2, 2, 9, 9).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    evolver = fxsvd.Evolver(net, x, optimizer, advice=True)
    before = tuple(r.advice() for r in residual_spectra(fxsvd.analyze(evolver.model)))
    event = evolver.resize(Prune(0.5))
    assert event.advice == before
    assert evolver.history.table().endswith("\n\n" + "\n".join(before))
