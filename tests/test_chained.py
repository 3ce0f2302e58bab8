"""Layers refitted one after the other, against least squares on rows made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxsvd.capture import capture
from fxsvd.data.readers import readers
from fxsvd.dependency import Dependencies, analyze
from fxsvd.edits import Plan, Remap
from fxsvd.errors import FxsvdError
from fxsvd.narrowing import Narrowing
from fxsvd.selecting.chained import alive, refit_chained
from fxsvd.selecting.fit import RIDGE, Fit

CLOSE = {"rtol": 1e-7, "atol": 1e-8}
WIDTH, KEPT = 6, [0, 2, 3, 5]


class Mlp(nn.Module):
    """Three layers, and a bias that one of them lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.c = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


class Residual(nn.Module):
    """Two blocks on a stream that nobody narrows; the second one's branch runs before its skip."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 5)
        self.c, self.d, self.skip = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 4), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.b(F.relu(self.a(x)))
        return self.d(F.relu(self.c(x))) + self.skip(x)


def setup(
    kind: type[nn.Module], spaces: tuple[str, ...]
) -> tuple[Any, Dependencies, Narrowing, list[Tensor]]:
    torch.manual_seed(0)  # of the weights too: a channel that never fires may have any weights
    net = kind().double().eval()
    data = [torch.randn(n, 5, dtype=torch.float64) + 1 for n in (60, 60, 30)]
    deps = analyze(capture(net, data[0], check=False))
    plan = Plan(tuple(Remap(s, WIDTH, tuple(KEPT)) for s in spaces))
    return net, deps, Narrowing.of(deps, plan), data


def refitted(
    deps: Dependencies, narrowing: Narrowing, data: list[Tensor], layers: tuple[str, ...]
) -> dict[str, Fit]:
    found = readers(deps)
    wanted = {name: found[name] for name in layers}
    fits = list(refit_chained(deps, narrowing, wanted, data, positions="all"))
    return {f.reader.layer: f for f in fits}


def solved(x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor, float]:
    """Ridge regression towards w with a free intercept, by QR; and the share of y that is lost."""
    n, pull = len(x), (RIDGE * x.var(0, unbiased=False)).sqrt()
    data = torch.cat([x, torch.ones(n, 1, dtype=x.dtype)], 1) / n**0.5
    prior = torch.cat([torch.diag(pull), torch.zeros(len(pull), 1, dtype=x.dtype)], 1)
    right = torch.cat([y / n**0.5, pull.unsqueeze(1) * w.T])
    solution = torch.linalg.lstsq(torch.cat([data, prior]), right, driver="gelsd").solution
    m, b = solution[:-1].T, solution[-1]
    left = (y - x @ m.T - b).square().sum() / (y - y.mean(0)).square().sum()
    return m, b, float(left)


def assert_is(found: Fit, expected: tuple[Tensor, Tensor, float]) -> None:
    m, b, share = expected
    full = torch.zeros_like(found.matrices[0])
    full[:, KEPT if m.shape[1] < full.shape[1] else slice(None)] = m
    torch.testing.assert_close(found.matrices[0], full, **CLOSE)
    torch.testing.assert_close(found.intercept, b, **CLOSE)
    assert found.error == pytest.approx(share, rel=1e-6, abs=1e-12)


@torch.no_grad()
def test_each_layer_is_fitted_to_what_those_before_it_have_become() -> None:
    net, deps, narrowing, data = setup(Mlp, ("a", "b"))
    fits = refitted(deps, narrowing, data, ("b", "c"))
    assert list(fits) == ["b", "c"]
    x = torch.cat(data)
    first = F.relu(net.a(x))
    expected = solved(first[:, KEPT], net.b(first), net.b.weight[:, KEPT])
    assert_is(fits["b"], expected)
    second = F.relu(first[:, KEPT] @ expected[0].T + expected[1])
    wanted = net.c(F.relu(net.b(first)))
    assert_is(fits["c"], solved(second[:, KEPT], wanted, net.c.weight[:, KEPT]))


@torch.no_grad()
def test_a_layer_that_is_not_refitted_passes_errors_on() -> None:
    net, deps, narrowing, data = setup(Mlp, ("a",))
    fits = refitted(deps, narrowing, data, ("c",))
    x = torch.cat(data)
    first = F.relu(net.a(x))
    silent = first.clone()
    silent[:, [1, 4]] = 0
    seen, wanted = F.relu(net.b(silent)), net.c(F.relu(net.b(first)))
    assert_is(fits["c"], solved(seen, wanted, net.c.weight))


@torch.no_grad()
def test_what_a_stream_has_lost_is_part_of_the_next_target() -> None:
    net, deps, narrowing, data = setup(Residual, ("a", "c"))
    fits = refitted(deps, narrowing, data, ("b", "c", "d"))
    assert list(fits) == ["b", "c", "d"]
    x = torch.cat(data)
    hidden = F.relu(net.a(x))
    m, b, share = solved(hidden[:, KEPT], net.b(hidden), net.b.weight[:, KEPT])
    assert_is(fits["b"], (m, b, share))  # the input of the network is no error
    before, after = x + net.b(hidden), x + hidden[:, KEPT] @ m.T + b
    inner = solved(after, net.c(before), net.c.weight)
    assert_is(fits["c"], inner)
    seen = F.relu(after @ inner[0].T + inner[1])[:, KEPT]
    own = net.d(F.relu(net.c(before)))
    target = own + net.skip(before) - net.skip(after)
    m, b, _ = solved(seen, target, net.d.weight[:, KEPT])
    change = own - seen @ m.T  # the error is that of the layer's own outputs
    share = float(change.var(0).sum() / own.var(0).sum())
    assert_is(fits["d"], (m, b, share))


def test_without_errors_nothing_changes() -> None:
    net, deps, _, data = setup(Mlp, ())
    fits = refitted(deps, Narrowing.of(deps, Plan()), data, ("a", "b", "c"))
    for name, found in fits.items():
        torch.testing.assert_close(found.weight(), net.get_submodule(name).weight.detach(), **CLOSE)
        assert found.error < 1e-12


def test_the_network_stays_as_it_was() -> None:
    net, deps, narrowing, data = setup(Residual, ("a", "c"))
    net.train()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    refitted(deps, narrowing, data, ("b", "c", "d"))
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert net.b.training
    bad = [data[0], torch.full_like(data[1], torch.nan)]
    with pytest.raises(FxsvdError, match="b sees numbers that are not finite"):
        refitted(deps, narrowing, bad, ("b", "c", "d"))
    assert net.b.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_alive_names_the_entries_that_stay() -> None:
    _, deps, narrowing, _ = setup(Mlp, ("a",))
    found = readers(deps)
    assert np.flatnonzero(alive(found["b"], deps, narrowing)[0]).tolist() == KEPT
    assert alive(found["a"], deps, narrowing).all()
    assert alive(found["c"], deps, narrowing).all()


class Noisy(nn.Module):
    """In-place additions and activations, and a convolution on a stream with a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(5, 5, 1)
        self.a, self.b = nn.Conv2d(5, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 5, 1, bias=False)
        self.norm, self.fc = nn.BatchNorm2d(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x), inplace=True)
        out = self.norm(self.b(F.relu(self.a(x), inplace=True)))
        out += x
        return self.fc(F.relu(out, inplace=True).mean((2, 3)))


def test_activations_that_are_overwritten_later_are_seen_as_they_were() -> None:
    torch.manual_seed(0)
    net = Noisy().double().eval()
    net.norm.running_var.uniform_(0.5, 2)
    data = [torch.randn(20, 5, 4, 4, dtype=torch.float64) for _ in range(2)]
    deps = analyze(capture(net, data[0], check=False))
    narrowing = Narrowing.of(deps, Plan((Remap("a", WIDTH, tuple(KEPT)),)))
    found = refitted(deps, narrowing, data, ("b",))["b"]
    with torch.no_grad():
        hidden = F.relu(net.a(F.relu(net.stem(torch.cat(data))))).movedim(1, -1).flatten(0, 2)
        w = net.b.weight.flatten(1)
        assert_is(found, solved(hidden[:, KEPT], hidden @ w.T, w[:, KEPT]))
