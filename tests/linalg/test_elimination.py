"""Elimination and forward selection against solving every candidate anew."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fxsvd.linalg.elimination import backward_elimination, forward_selection
from fxsvd.linalg.nested import errors_without
from fxsvd.linalg.reconstruction import RIDGE, Reconstruction, least_squares
from fxsvd.linalg.second_moments import Root


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def correlated(groups: int, size: int, outputs: int, seed: int = 0) -> Reconstruction:
    d = groups * size
    x = normal(d, d, seed=seed) @ normal(d, 3 * d, seed=seed + 1)
    w = normal(outputs, d, seed=seed + 2) * torch.rand(
        d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    order = torch.randperm(d, generator=torch.Generator().manual_seed(seed))
    return Reconstruction.of_weight(w, x @ x.T / (3 * d), order.view(groups, size))


def refit_error(
    problems: Sequence[Reconstruction],
    kept: Sequence[int],
    weights: Sequence[float] | None = None,
    ridge: float = RIDGE,
) -> float:
    """The relative error of the ridge regression on the kept channels, solved from nothing."""
    total = 0.0
    for p, weight in zip(problems, weights or [1.0] * len(problems), strict=True):
        mask = torch.zeros(len(p.groups), dtype=torch.bool)
        mask[list(kept)] = True
        s = p.support(mask)
        s = s[p.r.diagonal()[s] > 0]
        system = p.r[s][:, s] + ridge * torch.diag(p.r.diagonal()[s])
        explained = (torch.linalg.solve(system, p.ryx[:, s].T).T * p.ryx[:, s]).sum()
        total += weight * (1 - float(explained) / p.energy) if p.energy else 0.0
    return total


def naive_elimination(problems: Sequence[Reconstruction], ridge: float = RIDGE) -> list[int]:
    left, order = list(range(len(problems[0].groups))), []
    while len(left) > 1:
        rest = {g: [h for h in left if h != g] for g in left}
        order.append(min(left, key=lambda g: refit_error(problems, rest[g], ridge=ridge)))
        left.remove(order[-1])
    return order + left


def naive_selection(problems: Sequence[Reconstruction], width: int) -> list[int]:
    chosen: list[int] = []
    for _ in range(width):
        rest = [g for g in range(len(problems[0].groups)) if g not in chosen]
        chosen.append(min(rest, key=lambda g: refit_error(problems, [*chosen, g])))
    return chosen


def three_problems() -> list[Reconstruction]:
    """Of different sizes: one with pads and entries that stay, one that lacks a channel."""
    second = correlated(9, 3, 4, seed=10)
    groups = second.groups.clone()
    groups[2, 1] = groups[5, 0] = groups[5, 2] = -1
    third = correlated(9, 2, 30, seed=20)
    lacking = third.groups.clone()
    lacking[4] = -1
    return [
        correlated(9, 1, 5),
        Reconstruction(second.r, second.ryx, second.energy, groups),
        Reconstruction(third.r, third.ryx, third.energy, lacking),
    ]


def of_few_rows(rows: int, groups: Tensor, d: int, seed: int) -> Reconstruction:
    """Of outputs with noise, so that no fit is exact; one input never differs from zero."""
    z = normal(rows, d, seed=seed) @ (torch.eye(d) + 0.5 * normal(d, d, seed=seed + 1) / d**0.5)
    z[:, -1] = 0
    y = z @ normal(d, 4, seed=seed + 2) + 0.1 * normal(rows, 4, seed=seed + 3)
    return Reconstruction(Root(z), y.T @ z, float(y.square().sum()), groups)


def rooted_problems() -> list[Reconstruction]:
    """Of the same channels: with single entries, and with pads and entries that stay."""
    groups = torch.randperm(44, generator=torch.Generator().manual_seed(0)).view(11, 4)
    few = groups[:9].clone()
    few[3, 2] = few[7, 0] = -1
    return [of_few_rows(6, torch.arange(9)[:, None], 9, 30), of_few_rows(13, few, 44, 40)]


PROBLEMS = {
    "few rows": rooted_problems(),
    "linear": [correlated(10, 1, 4)],
    "convolution": [correlated(8, 4, 6)],
    "several": three_problems(),
}


# Of one row, all inputs say the same, and every order is as good.
TIED = {"one row": [of_few_rows(1, torch.arange(5)[:, None], 5, 60)]}


@pytest.mark.parametrize("name", PROBLEMS | TIED)
def test_costs_are_the_errors_after_refitting(name: str) -> None:
    problems = (PROBLEMS | TIED)[name]
    count = len(problems[0].groups)
    found = backward_elimination(problems, stop=0)
    assert sorted(found.order.tolist()) == list(range(count))
    expected = [refit_error(problems, found.order[n + 1 :].tolist()) for n in range(count)]
    torch.testing.assert_close(
        found.costs, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-10
    )


@pytest.mark.parametrize("name", PROBLEMS | TIED)
def test_errors_without_the_first_channels_are_those_of_refitting(name: str) -> None:
    for problem in (PROBLEMS | TIED)[name]:
        count = len(problem.groups)
        expected = [refit_error([problem], range(n + 1, count)) for n in range(count)]
        torch.testing.assert_close(
            errors_without(problem),
            torch.tensor(expected, dtype=torch.float64),
            rtol=1e-9,
            atol=1e-9,
        )


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_order_is_that_of_solving_every_candidate_anew(name: str) -> None:
    problems = PROBLEMS[name]
    assert backward_elimination(problems).order.tolist() == naive_elimination(problems)


@pytest.mark.parametrize("name", PROBLEMS)
def test_selection_is_that_of_solving_every_candidate_anew(name: str) -> None:
    problems = PROBLEMS[name]
    for width in (0, 1, 5, len(problems[0].groups)):
        assert forward_selection(problems, width).tolist() == naive_selection(problems, width)


def test_without_a_ridge_costs_are_errors_of_the_least_squares_fit() -> None:
    problem = correlated(10, 2, 4)
    found = backward_elimination([problem], ridge=0.0)
    for n, cost in enumerate(found.costs.tolist()):
        kept = torch.ones(10, dtype=torch.bool)
        kept[found.order[: n + 1]] = False
        m = torch.zeros_like(problem.ryx)
        s = problem.support(kept)
        m[:, s] = least_squares(problem.r, problem.ryx, s, ridge=0.0)
        assert cost == pytest.approx(problem.error(m), rel=1e-9, abs=1e-10)


@pytest.mark.parametrize("stop", [0, 1, 4, 9, 10])
def test_stopping_early_changes_no_removal_and_ranks_the_rest_by_cost(stop: int) -> None:
    problems = [correlated(10, 1, 4)]
    full, found = backward_elimination(problems), backward_elimination(problems, stop=stop)
    removed = 10 - stop
    assert found.order[:removed].tolist() == full.order[:removed].tolist()
    assert len(found.costs) == removed
    rest = found.order[removed:].tolist()
    costs = [refit_error(problems, [h for h in rest if h != g]) for g in rest]
    assert costs == sorted(costs)


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [100.0, 1.0, 0.0]])
def test_weights_say_how_much_each_problem_counts(weights: list[float]) -> None:
    problems = PROBLEMS["several"]
    found = backward_elimination(problems, weights=weights, stop=0)
    for n, cost in enumerate(found.costs.tolist()):
        expected = refit_error(problems, found.order[n + 1 :].tolist(), weights)
        assert cost == pytest.approx(expected, rel=1e-9, abs=1e-10)
    only = forward_selection(problems, 9, weights=[0.0, 1.0, 0.0])
    assert only.tolist() == forward_selection(problems[1:2], 9).tolist()


def test_orthogonal_inputs_are_kept_as_by_the_best_of_all_subsets() -> None:
    ryx = normal(3, 7)
    size = torch.rand(7, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    r, each = torch.diag(size), torch.arange(7)[:, None]
    problem = Reconstruction(r, ryx, 100.0, each)
    order = backward_elimination([problem]).order.tolist()
    for width in range(1, 7):
        subsets = itertools.combinations(range(7), width)
        best = set(min(subsets, key=lambda kept: refit_error([problem], list(kept))))
        assert set(order[-width:]) == best
        assert set(forward_selection([problem], width).tolist()) == best


@pytest.mark.parametrize("ridge", [0.0, 1e-10, 1e-8, RIDGE])
def test_the_first_of_two_duplicates_costs_nothing_and_the_other_takes_over(ridge: float) -> None:
    single = correlated(5, 2, 3)
    copies = torch.cat([torch.arange(10), single.groups[1]])
    groups = torch.cat([single.groups, torch.tensor([[10, 11]])])
    r, ryx = single.r[copies][:, copies], single.ryx[:, copies]
    problem = Reconstruction(r, ryx, single.energy, groups)
    found = backward_elimination([problem], ridge=ridge)
    assert found.order[0] in (1, 5)
    assert abs(float(found.costs[0])) <= 1e2 * max(ridge, 1e-10)
    expected = backward_elimination([single], ridge=ridge).costs
    torch.testing.assert_close(found.costs[1:], expected, rtol=1e-6, atol=1e2 * max(ridge, 1e-8))
    kept = torch.ones(6, dtype=torch.bool)
    kept[found.order[0]] = False
    s = problem.support(kept)
    m = torch.zeros_like(problem.ryx)
    m[:, s] = least_squares(r, ryx, s, ridge=0.0)
    assert problem.error(m) < 1e-12


def test_of_many_copies_one_each_stays() -> None:
    """A pooled feature map that repeats each of 8 values 6 times."""
    base = normal(8, 50)
    x = base.repeat_interleave(6, dim=0)
    problem = Reconstruction.of_weight(normal(5, 48), x @ x.T / 50, torch.arange(48)[:, None])
    found = backward_elimination([problem], stop=8)
    assert sorted((found.order[-8:] // 6).tolist()) == list(range(8))
    assert float(found.costs[39]) < 1e-4
    assert sorted((forward_selection([problem], 8) // 6).tolist()) == list(range(8))


def test_inputs_that_never_differ_from_zero_go_first_at_no_cost() -> None:
    x = normal(6, 30)
    x[[1, 4]] = 0
    problem = Reconstruction.of_weight(normal(3, 6), x @ x.T / 30, torch.arange(6)[:, None])
    found = backward_elimination([problem])
    assert sorted(found.order[:2].tolist()) == [1, 4]
    torch.testing.assert_close(found.costs[0], found.costs[1], rtol=0, atol=0)
    assert not {1, 4} & set(forward_selection([problem], 4).tolist())


def test_a_target_of_zero_costs_nothing() -> None:
    groups = torch.arange(4)[:, None]
    problem = Reconstruction(torch.eye(4), torch.zeros(2, 4), 0.0, groups)
    assert backward_elimination([problem]).costs.tolist() == [0.0, 0.0, 0.0]
    other = correlated(4, 2, 3)
    both = backward_elimination([problem, other])
    assert both.order.tolist() == backward_elimination([other]).order.tolist()


@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_scaling_the_channels_changes_nothing(size: float) -> None:
    problem = correlated(9, 2, 4)
    scale = torch.logspace(0, 3, 18, dtype=torch.float64) * size
    r, ryx = problem.r * scale[:, None] * scale, problem.ryx * scale
    scaled = Reconstruction(r, ryx, problem.energy, problem.groups)
    first, second = backward_elimination([problem]), backward_elimination([scaled])
    assert first.order.tolist() == second.order.tolist()
    torch.testing.assert_close(first.costs, second.costs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("samples", [20, 200])
def test_downdates_stay_exact_over_many_removals(samples: int) -> None:
    """With 20 samples 120 inputs are almost all redundant, and only the ridge keeps R regular."""
    x = normal(120, samples)
    groups = torch.arange(120).view(60, 2)
    problem = Reconstruction.of_weight(normal(7, 120), x @ x.T / samples, groups)
    found = backward_elimination([problem])
    for n in (0, 6, 7, 30, 50, 58):
        expected = refit_error([problem], found.order[n + 1 :].tolist())
        assert float(found.costs[n]) == pytest.approx(expected, rel=1e-7, abs=1e-9)


def test_arguments_out_of_bounds_are_refused() -> None:
    problem, other = correlated(4, 1, 2), correlated(5, 1, 2)
    for problems in ([], [problem, other]):
        with pytest.raises(ValueError, match="same number of channels"):
            backward_elimination(problems)
    for stop in (-1, 5):
        with pytest.raises(ValueError, match="stop"):
            backward_elimination([problem], stop=stop)
        with pytest.raises(ValueError, match="width"):
            forward_selection([problem], stop)
    for weights in ([1.0, 1.0], [-1.0], [float("nan")]):
        with pytest.raises(ValueError, match="weights"):
            backward_elimination([problem], weights=weights)
    with pytest.raises(ValueError, match="ridge"):
        backward_elimination([problem], ridge=-1.0)
