"""How many channels Select keeps: by count, ratio, penalty or error, against data themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxsvd
from fxsvd.errors import PlanError
from fxsvd.linalg.nested import errors_without
from fxsvd.linalg.reconstruction import RIDGE, Reconstruction
from fxsvd.passes import Select


class Branches(nn.Module):
    """A hidden space that two layers read, and one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 9)
        self.skip, self.out = nn.Linear(12, 4), nn.Linear(9, 4)

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.out(F.relu(self.b(x))) + self.skip(x)


def seeded(make, seed=0):
    torch.manual_seed(seed)
    return make().double()


def mlp():
    return seeded(lambda: nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5)))


def convolutions():
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(24, 3)
        )
    )


X = torch.randn(400, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(60, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def proposed(net, data=X, **options):
    options = {"chaining": "parallel", "positions": "all"} | options
    return fxsvd.plan(net, data[:2], passes=[Select(**options)], data=data.split(50))


def kept(plan):
    return {edit.space: edit.keep for edit in plan.edits}


def widths(plan):
    return {space: len(keep) for space, keep in kept(plan).items()}


def centred(x):
    return x - x.mean(0)


def hidden(net, x=X):
    """What the second layer of a perceptron reads, without its mean."""
    with torch.no_grad():
        return centred(F.relu(net[0](x)))


def lost(x, y, keep):
    """E‖y − M x‖² / E‖y‖² of the best M on some columns."""
    fit = np.linalg.lstsq(x[:, list(keep)].numpy(), y.numpy(), rcond=None)[0]
    rest = y.numpy() - x[:, list(keep)].numpy() @ fit
    return float((rest**2).sum() / (y.numpy() ** 2).sum())


# ---------------------------------------------------------------- widths


def test_every_space_gets_the_width_or_stays_where_it_is_no_wider():
    plan = proposed(seeded(Branches), width=9)
    assert widths(plan) == {"a": 9}
    assert "b: 9 stays (it is no wider than `width`)" in str(plan)


def test_widths_go_by_name_pattern():
    assert widths(proposed(seeded(Branches), width={"b": 2, "*": 7})) == {"a": 7, "b": 2}
    plan = proposed(seeded(Branches), width={"b": 3})
    assert widths(plan) == {"b": 3}
    assert "a: 12 stays (no pattern of `width` matches it)" in str(plan)


@pytest.mark.parametrize("method", ["backward", "forward", "lasso"])
@pytest.mark.parametrize("width", [1, 4, 7, 11])
def test_a_width_is_a_ratio_in_other_words(method, width):
    ratio = 1 - width / 12
    by_width = proposed(mlp(), width=width, method=method)
    assert widths(by_width) == {"0": width}
    assert kept(by_width) == kept(proposed(mlp(), ratio=ratio, method=method))


def test_widths_are_multiples():
    assert widths(proposed(mlp(), width=5, round_to=4)) == {"0": 8}


def test_groups_of_a_convolution_get_equally_many():
    net = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(2, 12, 3), nn.ReLU(), nn.Conv2d(12, 9, 3, groups=3), nn.Conv2d(9, 3, 1)
        )
    )
    keep = kept(proposed(net, IMAGES, width={"0": 6}))["0"]
    assert [sum(4 * g <= channel < 4 * g + 4 for channel in keep) for g in range(3)] == [2, 2, 2]


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("method", ["backward", "forward"])
@pytest.mark.parametrize("error", [0.02, 0.06, 0.3])
def test_an_error_gives_the_smallest_width_of_the_order_within_it(method, error):
    net = mlp()
    x, y = hidden(net), centred(net(X).detach())
    keep = kept(proposed(net, error=error, method=method))["0"]
    fewer = kept(proposed(net, width=len(keep) - 1, method=method))["0"]
    assert lost(x, y, keep) <= error < lost(x, y, fewer)
    assert set(fewer) < set(keep)


@pytest.mark.parametrize("error", [0.02, 0.06, 0.3])
def test_the_supports_of_the_lasso_stay_within_an_error(error):
    net = mlp()
    x, y = hidden(net), centred(net(X).detach())
    keep = kept(proposed(net, error=error, method="lasso"))["0"]
    fewer = kept(proposed(net, width=len(keep) - 1, method="lasso"))["0"]
    assert lost(x, y, keep) <= error < lost(x, y, fewer)


def test_an_error_bounds_every_reader():
    net = seeded(Branches)
    with torch.no_grad():
        x = centred(F.relu(net.a(X)))
        outputs = [centred(layer(F.relu(net.a(X)))) for layer in (net.b, net.skip)]
    keep = kept(proposed(net, error={"a": 0.05}))["a"]
    fewer = kept(proposed(net, width={"a": len(keep) - 1}))["a"]
    assert max(lost(x, y, keep) for y in outputs) <= 0.05
    assert max(lost(x, y, fewer) for y in outputs) > 0.05


def compiled(**options):
    passes = [Select(**({"chaining": "parallel", "positions": "all"} | options))]
    net, data = convolutions(), IMAGES.split(20)
    return fxsvd.compile(net, IMAGES[:2], passes=passes, data=data, progress=False).report


def test_what_is_predicted_and_measured_stays_within_the_error():
    (site,) = compiled(error={"0": 0.2}).sites
    assert site.layer == "2"
    assert 0.1 < site.predicted <= 0.2
    assert site.measured == pytest.approx(site.predicted, rel=1e-9)
    assert {s.layer: s.predicted <= 0.2 for s in compiled(error=0.2).sites} == {"2": 1, "4": 1}


def test_no_error_within_reach_leaves_the_space():
    plan = proposed(mlp(), error=1e-9)
    assert plan.edits == ()
    assert "0: 12 stays (its goal, rounding or coupling leaves nothing to remove)" in str(plan)


def refit(problem, groups):
    s = torch.cat([groups[groups >= 0], (problem.owner == len(problem.groups)).nonzero()[:, 0]])
    if not len(s):
        return 1.0
    system = problem.r[s][:, s] + RIDGE * torch.diag(problem.r.diagonal()[s])
    explained = torch.linalg.solve(system, problem.ryx[:, s].T).T * problem.ryx[:, s]
    return 1 - float(explained.sum()) / problem.energy


def test_one_factor_gives_the_errors_of_all_widths():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(11, 40, dtype=torch.float64, generator=generator)
    w = torch.randn(3, 11, dtype=torch.float64, generator=generator)
    groups = torch.tensor([[4, 0, -1], [1, -1, -1], [9, 7, 6], [2, 3, -1], [-1, -1, -1]])
    for chosen in (groups, torch.arange(11)[:, None]):  # with entries that stay, and without
        problem = Reconstruction.of_weight(w, x @ x.T / 40, chosen)
        want = [refit(problem, chosen[i + 1 :]) for i in range(len(chosen))]
        torch.testing.assert_close(
            errors_without(problem), torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-9
        )


# ---------------------------------------------------------------- penalties


def proximal(x, y, share, steps=20000):
    """The group lasso's M by plain proximal gradients on the samples, and its penalty."""
    r, ryx = x.T @ x / len(x), y.T @ x / len(x)
    penalty, rate = share * float(ryx.norm(dim=0).max()), 1 / float(torch.linalg.eigvalsh(r)[-1])
    m = torch.zeros_like(ryx)
    for _ in range(steps):
        m = m - rate * (m @ r - ryx)
        m = m * (1 - penalty * rate / m.norm(dim=0).clamp(min=1e-300)).clamp(min=0)
    return m, penalty


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_a_penalty_gives_the_support_of_the_lasso(share):
    net = mlp()
    m, _ = proximal(hidden(net), centred(net(X).detach()), share)
    keep = kept(proposed(net, penalty=share, method="lasso"))["0"]
    assert keep == tuple(torch.nonzero(m.norm(dim=0)).flatten().tolist())


def test_the_largest_penalty_leaves_one_channel():
    assert widths(proposed(mlp(), penalty=1, method="lasso")) == {"0": 1}


def test_without_debiasing_a_layer_gets_the_coefficients_of_the_lasso():
    net = mlp()
    x, y = hidden(net), centred(net(X).detach())
    m, penalty = proximal(x, y, 0.1)
    plan = proposed(net, penalty=0.1, method="lasso", debias=False)
    values = {v.parameter: v.value for v in plan.values}
    torch.testing.assert_close(values["2.weight"], m, rtol=0, atol=1e-4)
    slope = (values["2.weight"] @ x.T - y.T) @ x / len(x)
    active = m.norm(dim=0) > 0
    torch.testing.assert_close(
        slope.norm(dim=0)[active], torch.full((int(active.sum()),), penalty).double(), rtol=1e-3,
        atol=0,
    )  # fmt: skip
    small = fxsvd.apply(net, plan)
    torch.testing.assert_close(small(X).mean(0), net(X).mean(0), rtol=0, atol=1e-9)


@pytest.mark.parametrize("chaining", ["parallel", "bottom-up"])
def test_debiasing_lowers_the_error_of_the_same_support(chaining):
    options = {"penalty": {"0": 0.4}, "method": "lasso", "chaining": chaining}
    shrunken, refitted = compiled(**options, debias=False), compiled(**options)
    assert kept(shrunken.plan) == kept(refitted.plan)
    assert len(kept(refitted.plan)["0"]) < 8
    (before,), (after,) = shrunken.sites, refitted.sites
    assert before.predicted > after.predicted
    for site in (before, after):
        assert site.measured == pytest.approx(site.predicted, rel=1e-9)


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give exactly one of ratio, width, penalty, error: none was given"),
        ({"ratio": 0.5, "width": 4}, "ratio and width was given"),
        ({"penalty": 0.1}, "give method='lasso'"),
        ({"width": 0}, "1 or more; got 0"),
        ({"width": 2.5}, "1 or more; got 2.5"),
        ({"width": {"a": float("inf")}}, "got inf"),
        ({"error": 1.0}, "in [0, 1); got 1.0"),
        ({"error": float("nan")}, "got nan"),
        ({"penalty": 1.5, "method": "lasso"}, "in [0, 1]; got 1.5"),
    ],
)
def test_options_that_make_no_goal_are_refused(options, message):
    with pytest.raises(PlanError) as caught:
        Select(**options)
    assert message in str(caught.value)
