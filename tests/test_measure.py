"""Errors that are measured, against brute force and against what was predicted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsvd
from fxsvd.capture import capture
from fxsvd.dependency import analyze
from fxsvd.edits import Estimate, Plan, Remap
from fxsvd.measure import measured, output_error
from fxsvd.passes import Prune, Select
from fxsvd.rewrite import rewrite


def network() -> nn.Sequential:
    torch.manual_seed(0)
    convolutions = (
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False),
        nn.BatchNorm2d(8),
    )
    return nn.Sequential(*convolutions, nn.ReLU(), nn.Flatten(), nn.Linear(32, 5)).double().eval()


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [40] * (count - 1) + [11]
    return [torch.randn(n, 3, 6, 6, dtype=torch.float64, generator=generator) for n in sizes]


def outputs(net: nn.Module, layer: str, data: list[Tensor]) -> Tensor:
    """All outputs of a layer, ``[rows, out]``."""
    seen: list[Tensor] = []

    def see(module: nn.Module, args: Any, out: Tensor) -> None:
        seen.append(out.movedim(1, -1).flatten(0, -2) if out.dim() > 2 else out)

    hook = net.get_submodule(layer).register_forward_hook(see)
    with torch.no_grad():
        for batch in data:
            net(batch)
    hook.remove()
    return torch.cat(seen).clone()


def test_a_sites_error_is_the_variance_of_the_change() -> None:
    net, data = network(), batches()
    deps = analyze(capture(net, data[0], check=False))
    estimates = (Estimate("2", "prune", 0.5), Estimate("6", "prune", 0.25))
    plan = Plan((Remap("0", 8, (0, 2, 3, 7)), Remap("2", 8, (1, 4, 6))), estimates=estimates)
    small = rewrite(deps, plan)
    sites = measured(deps, plan, small, data)
    assert [(s.layer, s.edit, s.predicted) for s in sites] == [
        ("2", "prune", 0.5),
        ("6", "prune", 0.25),
    ]
    for site, kept in zip(sites, ([1, 4, 6], range(5)), strict=True):
        y = outputs(net, site.layer, data)[:, list(kept)]
        change = outputs(small, site.layer, data) - y
        share = (change - change.mean(0)).square().sum() / (y - y.mean(0)).square().sum()
        assert site.measured == pytest.approx(float(share), rel=1e-9)


def test_the_output_error_is_relative_to_the_outputs() -> None:
    data = batches()
    before, after = (capture(n, data[0], check=False) for n in (network(), network()))
    with torch.no_grad():
        after.get_submodule("6").weight.mul_(1.1)
        x = torch.cat(data)
        expected = (after(x) - before(x)).square().sum() / before(x).square().sum()
    assert output_error(before, after, data) == pytest.approx(float(expected), rel=1e-12)
    assert output_error(before, before, data) == 0


@pytest.mark.parametrize("space", ["0", "2"])
def test_predicted_is_measured_where_nothing_before_the_layer_changes(space: str) -> None:
    data = batches()
    select = Select(ratio=0.5, chaining="parallel", only=(space,), positions="all")
    small = fxsvd.compile(network(), data[0], passes=[select], data=data, progress=False)
    (site,) = small.report.sites
    assert 1e-4 < site.predicted < 1
    assert site.measured == pytest.approx(site.predicted, rel=1e-6)


@pytest.mark.parametrize("chaining", ["top-down", "bottom-up+refit"])
def test_predicted_is_measured_for_every_layer_that_is_fitted_top_down(chaining: Any) -> None:
    data = batches()
    select = Select(ratio=0.5, chaining=chaining, positions="all")
    small = fxsvd.compile(network(), data[0], passes=[select], data=data, progress=False)
    assert [s.layer for s in small.report.sites] == ["2", "6"]
    if chaining == "top-down":
        assert all(1e-4 < s.predicted < 1 for s in small.report.sites)
    last = small.report.sites[-1]
    assert last.measured == pytest.approx(last.predicted, rel=1e-6)


def test_the_report_holds_the_change_of_the_outputs() -> None:
    net, data = network(), batches()
    small = fxsvd.compile(net, data[0], passes=[Prune(0.5)], data=data, progress=False)
    with torch.no_grad():
        x = torch.cat(data)
        expected = float((small(x) - net(x)).square().sum() / net(x).square().sum())
    assert small.report.change == pytest.approx(expected, rel=1e-9)
    assert small.report.sites == ()


def test_measuring_leaves_networks_as_they_were() -> None:
    net, data = network(), batches()
    net.train()
    deps = analyze(capture(net, data[0], check=False))
    plan = Plan((Remap("0", 8, (0, 1)),), estimates=(Estimate("2", "prune", 0.5),))
    small = rewrite(deps, plan)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    measured(deps, plan, small, data)
    output_error(deps.analysis.graph, small, data)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert all(m.training for m in net.modules())
    assert not any(m._forward_hooks for g in (net, small) for m in g.modules())
