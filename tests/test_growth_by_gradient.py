"""Widen(init="gradient"): new channels that change nothing yet, and learn fastest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxsvd
from fxsvd.errors import PlanError
from fxsvd.growing.ends import opened
from fxsvd.growing.gradients import Prospects, prospects
from fxsvd.passes import Widen
from fxsvd.rewrite import rewrite
from fxsvd.running import doubled
from fxsvd.widening import Widening
from tests.helpers.nets import IDIOMS, call, leaves, randomized, to_double
from tests.helpers.nets.base import Net

Case = tuple[nn.Module, Tensor, str]


GROWING = (
    "bilinear_by_hand",
    "attention_fused",
    "packed_qkv_by_chunk",
    "multi_query",
    "swiglu",
    "glu_layer",
    "u_net",
    "squeeze_and_excite",
    "selective_kernel",
    "convnext_block",
    "feature_pyramid",
    "cat_of_branches",
    "option_a_shortcut",
    "split_in_unequal_parts",
    "pixel_shuffle",
    "residual_network",
    "flatten_channels_last",
)


def mlp(act: nn.Module) -> Case:
    return nn.Sequential(nn.Linear(5, 6), act, nn.Linear(6, 3)), torch.randn(16, 5), "0"


def convolutions() -> Case:
    """Padding, strides, a pool in between, and kernels of both sides."""
    parts = [nn.Conv2d(2, 4, 3, padding=1), nn.GELU(), nn.AvgPool2d(2), nn.Conv2d(4, 3, 3, 2, 1)]
    return nn.Sequential(*parts), torch.randn(6, 2, 8, 8), "0"


def flattened() -> Case:
    parts = [nn.Conv1d(2, 4, 3), nn.Tanh(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(12, 2)]
    return nn.Sequential(*parts), torch.randn(7, 2, 8), "0"


def stream() -> Case:
    """Three writers and three readers of one space, one of which is both; a cat and a gate."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        x = x + m.both(F.silu(x))
        x = x + m.b(torch.tanh(m.a(x)) * m.gate(x).sigmoid())
        return m.head(torch.cat([F.gelu(x), x * 2, m.other(x)], 1))

    layers = {"stem": (3, 4), "both": (4, 4), "a": (4, 5), "b": (5, 4), "gate": (4, 5)}
    made: Any = {name: nn.Linear(*sizes) for name, sizes in layers.items()}
    return Net(run, **made, other=nn.Linear(4, 2), head=nn.Linear(10, 3)), torch.randn(9, 3), "stem"


CASES: dict[str, Callable[[], Case]] = {
    "tanh": lambda: mlp(nn.Tanh()),
    "relu": lambda: mlp(nn.ReLU()),
    "leaky": lambda: mlp(nn.LeakyReLU(0.2)),
    "convolutions": convolutions,
    "flattened": flattened,
    "stream": stream,
}


def made(name: str) -> tuple[Any, Any, tuple[Tensor, Tensor], str]:
    """A captured network in float64, its analysis, a batch, and the name of a space."""
    torch.manual_seed(0)
    net, x, space = CASES[name]()
    net, x = net.double(), x.double()
    target = torch.randn_like(net(x).detach())
    graph = fxsvd.capture(net, x)
    return graph, fxsvd.analyze(graph), (x, target), space


def grown(deps: Any, name: str, batch: Any, count: int) -> Any:
    space = deps.space(name)
    options: Any = {"loss": F.mse_loss, "data": [batch], "init": "gradient"}
    plan = Widen(to={name: space.width + count}, only=f"{name}", **options).propose(deps)
    assert [edit.space for edit in plan.edits] == [name], str(plan)
    return rewrite(deps, plan), plan


def incoming(wide: Any, plan: Any, found: Prospects) -> list[tuple[nn.Parameter, Tensor]]:
    """What writes the new channels: parameters, and which rows of them are new."""
    keep = plan.edits[0].keep
    copies = [i for i in range(1, len(keep)) if keep[i] == keep[i - 1]]
    return [(wide.get_parameter(p.names[0]), torch.tensor(copies)) for p in found.ends.incoming]


def rows_of(wide: Any, batch: Any, where: list[tuple[nn.Parameter, Tensor]]) -> Tensor:
    """The gradients of new rows, ``[new, incoming]``."""
    loss = F.mse_loss(wide(batch[0]), batch[1])
    parts = torch.autograd.grad(loss, [p for p, _ in where])
    return torch.cat(
        [
            g[rows].flatten(1) if g.dim() > 1 else g[rows, None]
            for g, (_, rows) in zip(parts, where, strict=True)
        ],
        dim=1,
    )


@pytest.mark.parametrize("name", CASES)
def test_nothing_changes_in_either_mode(name: str) -> None:
    graph, deps, batch, space = made(name)
    wide, plan = grown(deps, space, batch, 3)
    for mode in (True, False):
        expected = graph.train(mode)(batch[0])
        assert (wide.train(mode)(batch[0]) - expected).abs().max() <= 1e-9 * expected.abs().max()
    for p, rows in incoming(wide, plan, prospects(deps, deps.space(space), F.mse_loss, [batch])):
        assert p[rows].abs().max() <= 1e-28


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_new_rows_are_what_was_predicted(name: str) -> None:
    _, deps, batch, space = made(name)
    found = prospects(deps, deps.space(space), F.mse_loss, [batch])
    wide, plan = grown(deps, space, batch, 3)
    norms = rows_of(wide, batch, incoming(wide, plan, found)).norm(dim=1)
    expected = found.gradients[:3]
    assert sorted(norms.tolist(), reverse=True) == pytest.approx(expected.tolist(), rel=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_no_other_direction_has_a_longer_gradient(name: str) -> None:
    """Brute force: 200 new channels with random columns of the same length."""
    _, deps, batch, name = made(name)
    space = deps.space(name)
    found = prospects(deps, space, F.mse_loss, [batch])
    wide, plan = grown(deps, name, batch, 200)
    columns = torch.randn(len(found.columns), 200, dtype=torch.float64)
    columns *= found.columns[:, 0].norm() / columns.norm(dim=0)
    counts = torch.ones(deps.channels.count, dtype=torch.int64).numpy()
    keep = torch.bincount(torch.tensor(plan.edits[0].keep))
    counts[space.channels] = keep.numpy()
    for edit in opened(Widening(deps.channels.of, counts), [(found.ends, columns)]):
        wide.get_parameter(edit.parameter).data.copy_(edit.value)
    norms = rows_of(wide, batch, incoming(wide, plan, found)).norm(dim=1)
    assert norms.max() <= found.gradients[0] * (1 + 1e-9)
    assert norms.max() > 0.2 * found.gradients[0]
    wide, plan = grown(deps, name, batch, 1)
    (best,) = rows_of(wide, batch, incoming(wide, plan, found)).norm(dim=1)
    assert best >= norms.max()


@pytest.mark.parametrize("name", ["tanh", "convolutions", "stream"])  # all that have no kink at 0
def test_the_next_step_lowers_the_loss_by_the_squared_gradients(name: str) -> None:
    _, deps, batch, space = made(name)
    found = prospects(deps, deps.space(space), F.mse_loss, [batch])
    wide, plan = grown(deps, space, batch, 2)
    where = incoming(wide, plan, found)
    gradients = torch.autograd.grad(F.mse_loss(wide(batch[0]), batch[1]), [p for p, _ in where])
    losses = []
    for rate in (1e-5, -1e-5):  # both ways, so that the second order cancels
        with torch.no_grad():
            for (p, rows), g in zip(where, gradients, strict=True):
                p[rows] -= rate * g[rows]
            losses.append(float(F.mse_loss(wide(batch[0]), batch[1]).detach()))
            for (p, rows), g in zip(where, gradients, strict=True):
                p[rows] += rate * g[rows]
    expected = -1e-5 * float(found.gradients[:2].square().sum())
    assert (losses[0] - losses[1]) / 2 == pytest.approx(expected, rel=1e-6)


def test_the_matrix_is_that_of_the_paper() -> None:
    """GradMax for fully connected layers: E[∂L/∂z hᵀ], with a constant input for the bias."""
    graph, deps, (x, target), name = made("tanh")
    found = prospects(deps, deps.space(name), F.mse_loss, [(x, target)])
    delta = 2 * (graph(x) - target).detach() / target.numel()
    inputs = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    u, s, _ = torch.linalg.svd(delta.T @ inputs, full_matrices=False)
    length = graph.get_submodule("2").weight.detach().norm(dim=0).mean()
    assert torch.allclose(found.gradients, length * s, rtol=1e-9)
    aligned = (u.T @ found.columns / length).abs()
    assert torch.allclose(aligned, torch.eye(3).double(), atol=1e-9)
    assert torch.allclose(found.columns.norm(dim=0), length, rtol=1e-9)


def test_neighbours_grow_at_once_and_learn_as_predicted() -> None:
    """New rows of one read nothing of the other's new channels, whose columns stay as they are."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)]
    net, x = nn.Sequential(*layers).double(), torch.randn(9, 4).double()
    batch = (x, torch.randn(9, 4).double())
    deps = fxsvd.analyze(fxsvd.capture(net, x))
    grow = Widen(ratio=0.5, init="gradient", loss=F.mse_loss, data=[batch])
    wide: Any = rewrite(deps, grow.propose(deps))
    assert (wide(x) - net(x)).abs().max() <= 1e-9
    F.mse_loss(wide(x), batch[1]).backward()
    for name in ("0", "2"):
        layer = wide.get_submodule(name)
        rows = (layer.weight == 0).all(1)
        both = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)[rows]
        found = prospects(deps, deps.space(name), F.mse_loss, [batch])
        assert isinstance(found, Prospects)
        norms = both.norm(dim=1).sort(descending=True).values
        assert torch.allclose(norms, found.gradients[:3], rtol=1e-9)


def test_a_relu_learns_at_the_first_step() -> None:
    _, deps, batch, space = made("relu")
    wide, _ = grown(deps, space, batch, 2)
    optimizer = torch.optim.SGD(wide.parameters(), lr=1e-2)
    before = wide.get_submodule("0").weight.detach().clone()
    F.mse_loss(wide(batch[0]), batch[1]).backward()
    optimizer.step()
    moved = (wide.get_submodule("0").weight - before).abs().amax(1)
    assert (moved > 0).all()


def test_batches_count_alike() -> None:
    _, deps, (x, y), name = made("convolutions")
    halves = [(x[:3], y[:3]), (x[3:], y[3:])]
    one = prospects(deps, deps.space(name), F.mse_loss, [(x, y)])
    two = prospects(deps, deps.space(name), F.mse_loss, halves)
    assert isinstance(one, Prospects)
    assert isinstance(two, Prospects)
    assert torch.allclose(one.gradients, two.gradients, rtol=1e-9)


def test_beyond_the_best_there_are_random_columns_of_the_same_length() -> None:
    _, deps, batch, name = made("tanh")
    found = prospects(deps, deps.space(name), F.mse_loss, [batch])
    assert isinstance(found, Prospects)
    columns = found.first(7, torch.Generator().manual_seed(0))
    assert columns.shape == (3, 7)
    assert torch.allclose(columns.norm(dim=0), columns[:, 0].norm(), rtol=1e-9)


def conv_norm(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 3, 1))


REFUSED: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "batch norm": (
        lambda: conv_norm(nn.BatchNorm2d(4)),
        torch.zeros(2, 2, 5, 5),
        "mean` acts on each",
    ),
    "plain norm": (
        lambda: conv_norm(nn.BatchNorm2d(4, affine=False, track_running_stats=False)),
        torch.zeros(2, 2, 5, 5),
        "`_1` divides by a deviation or norm",
    ),
    "group norm": (
        lambda: conv_norm(nn.GroupNorm(1, 4, affine=False)),
        torch.zeros(2, 2, 5, 5),
        "takes a statistic over channels",
    ),
    "prelu": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2)),
        torch.zeros(2, 3),
        "`1.weight` acts on each of its channels",
    ),
    "sigmoid": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2)),
        torch.zeros(2, 3),
        "is not zero where they are read",
    ),
    "relu without a bias": (
        lambda: nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2)),
        torch.zeros(2, 3),
        "takes a layer with a bias",
    ),
    "groups": (
        lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.Tanh(), nn.Conv1d(4, 4, 1, groups=2)),
        torch.zeros(2, 4, 3),
        "not between plain linear layers or convolutions",
    ),
    "what does not learn": (
        lambda: nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.Linear(4, 2)),
        torch.zeros(2, 3),
        "`0.weight` does not learn",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_grow_says_why(name: str) -> None:
    build, x, message = REFUSED[name]
    batch = (torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), None)
    options: Any = {"loss": lambda y, _: y.square().mean(), "data": [batch], "init": "gradient"}
    plan = fxsvd.plan(build(), x, passes=[Widen(ratio=1.0, only="0", **options)])
    assert not plan.edits
    assert message in plan.skips[0].why


@pytest.mark.parametrize("name", GROWING)
def test_idioms_compute_what_they_did(name: str) -> None:
    torch.manual_seed(0)
    net = randomized(IDIOMS[name].build()).eval()
    inputs = IDIOMS[name].inputs(2)

    def loss(y: Any, _: None) -> Tensor:
        return sum(t.square().mean() for t in leaves(y) if t.is_floating_point())

    options: Any = {"loss": loss, "data": [(inputs, None)], "init": "gradient"}
    wide = fxsvd.compile(net, inputs, passes=[Widen(ratio=0.5, **options)], progress=False)
    assert wide.report.plan.edits
    wide, graph = doubled(wide), doubled(fxsvd.capture(net, inputs))
    with torch.no_grad():
        expected = leaves(call(graph, to_double(inputs)))
        for a, b in zip(leaves(call(wide, to_double(inputs))), expected, strict=True):
            assert float((a - b).abs().max()) <= 1e-9 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("lacking", ["loss", "data"])
def test_without_loss_or_data_it_is_refused(lacking: str) -> None:
    options: Any = {"loss": F.mse_loss, "data": []}
    del options[lacking]
    with pytest.raises(PlanError, match=r"init='gradient' needs loss=.* and data="):
        Widen(ratio=1.0, init="gradient", **options)
    _, deps, _, _ = made("tanh")
    with pytest.raises(PlanError, match="no batch"):
        Widen(ratio=1.0, init="gradient", loss=F.mse_loss, data=[]).propose(deps)


def test_gradients_are_normal_numbers() -> None:
    """Those below cost a processor ten times as much, at every step until a channel has learnt."""
    net = nn.Sequential(nn.Linear(4, 3), nn.LeakyReLU(0.2), nn.Linear(3, 2))
    inputs, target = torch.randn(8, 4), torch.randn(8, 2)
    grow = Widen(to={"0": 6}, init="gradient", loss=F.mse_loss, data=[(inputs, target)])
    wide = fxsvd.compile(net, inputs, passes=[grow])
    (1e-4 * F.mse_loss(wide(inputs), target)).backward()
    for p in wide.parameters():
        assert p.grad is not None
        assert not ((p.grad != 0) & (p.grad.abs() < torch.finfo(p.dtype).tiny)).any()
