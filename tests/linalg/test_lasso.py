"""The group lasso: optimality conditions, an independent solver, bounds and closed forms."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fxsvd.linalg.lasso import (
    group_lasso,
    kkt_residual,
    largest_penalty,
    norms,
    support_of_width,
)
from fxsvd.linalg.reconstruction import Reconstruction, least_squares
from fxsvd.linalg.second_moments import Root


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def correlated(groups: int, size: int, outputs: int, seed: int = 0) -> Reconstruction:
    d = groups * size
    mix = normal(d, d, seed=seed) / d**0.5 + torch.eye(d, dtype=torch.float64)
    x = mix @ normal(d, 3 * d, seed=seed + 1)
    w = normal(outputs, d, seed=seed + 2)
    order = torch.randperm(d, generator=torch.Generator().manual_seed(seed))
    return Reconstruction.of_weight(w, x @ x.T / (3 * d), order.view(groups, size))


def objective(problem: Reconstruction, m: Tensor, penalty: float) -> float:
    return problem.loss(m) + penalty * float(norms(problem, m).sum())


def one_block(r: Tensor, target: Tensor, penalty: float) -> Tensor:
    """The minimum over one group: M = T (R + λ/n I)⁻¹ with n = ‖M‖, found by bisection."""
    if target.norm() <= penalty:
        return torch.zeros_like(target)
    values, vectors = torch.linalg.eigh(r)
    energy = (target @ vectors).square().sum(dim=0)
    low, high = 0.0, float(target.norm() / values[0])
    for _ in range(60):
        n = (low + high) / 2
        # ‖M‖² = Σ energy/(values + λ/n)² = n² at the solution.
        low, high = (n, high) if (energy / (n * values + penalty) ** 2).sum() > 1 else (low, n)
    inverse: Tensor = torch.linalg.inv(r + penalty / high * torch.eye(len(r), dtype=r.dtype))
    return target @ inverse


def block_descent(problem: Reconstruction, penalty: float, sweeps: int = 3000) -> Tensor:
    """Exact minimisation over one group after the other."""
    m = torch.zeros_like(problem.ryx)
    for _ in range(sweeps):
        before = m.clone()
        for group in problem.groups:
            r = problem.r[group][:, group]
            target = m[:, group] @ r - problem.gradient(m)[:, group]
            m[:, group] = one_block(r, target, penalty)
        if float((m - before).norm()) <= 1e-12 * float(m.norm()):
            break
    return m


@pytest.mark.parametrize("share", [0.9, 0.5, 0.1, 0.02])
@pytest.mark.parametrize(("groups", "size", "outputs"), [(8, 1, 3), (6, 3, 2), (1, 4, 3)])
def test_it_agrees_with_block_coordinate_descent(
    groups: int, size: int, outputs: int, share: float
) -> None:
    problem = correlated(groups, size, outputs)
    penalty = share * largest_penalty(problem)
    found = group_lasso(problem, penalty, tolerance=1e-12, most=100_000)
    expected = block_descent(problem, penalty)
    assert found.residual <= 1e-12
    assert (norms(problem, found.m) > 0).tolist() == (norms(problem, expected) > 0).tolist()
    assert float((found.m - expected).norm()) <= 1e-8 * float(expected.norm())


@pytest.mark.parametrize("share", [0.7, 0.2, 0.02])
def test_of_a_root_it_is_what_it_is_of_the_second_moment(share: float) -> None:
    z, y = normal(7, 24), normal(7, 3, seed=1)
    groups = torch.randperm(24, generator=torch.Generator().manual_seed(0))[:21].view(7, 3)
    of_root, dense = (
        Reconstruction(r, y.T @ z, float(y.square().sum()), groups) for r in (Root(z), z.T @ z)
    )
    penalty = share * largest_penalty(dense)
    found, expected = (group_lasso(p, penalty, tolerance=1e-10) for p in (of_root, dense))
    assert found.residual <= 1e-10
    torch.testing.assert_close(norms(of_root, found.m), norms(dense, expected.m))
    torch.testing.assert_close(found.m @ z.T, expected.m @ z.T)
    assert torch.equal(support_of_width(of_root, 4), support_of_width(dense, 4))


@pytest.mark.parametrize("share", [0.7, 0.2, 0.02])
def test_the_optimality_conditions_hold_at_the_solution(share: float) -> None:
    problem = correlated(12, 2, 5)
    penalty = share * largest_penalty(problem)
    m = group_lasso(problem, penalty, tolerance=1e-11, most=50_000).m
    gradient, scale = problem.gradient(m), largest_penalty(problem)
    kept = [bool(m[:, g].any()) for g in problem.groups]
    assert 0 < sum(kept) <= 12
    for group, active in zip(problem.groups, kept, strict=True):
        if active:
            direction = m[:, group] / m[:, group].norm()
            assert (gradient[:, group] + penalty * direction).norm() <= 1e-10 * scale
        else:
            assert gradient[:, group].norm() <= penalty + 1e-10 * scale


def test_the_residual_is_zero_at_the_optimum_only() -> None:
    problem = correlated(6, 2, 3)
    penalty = 0.3 * largest_penalty(problem)
    m = block_descent(problem, penalty)
    assert kkt_residual(problem, m, penalty) < 1e-11
    assert kkt_residual(problem, m + 0.01 * normal(*m.shape), penalty) > 1e-3
    assert kkt_residual(problem, torch.zeros_like(m), penalty) == pytest.approx(0.7, rel=1e-12)


def test_the_objective_is_within_the_proven_bound_and_never_rises() -> None:
    problem = correlated(10, 2, 4)
    penalty = 0.05 * largest_penalty(problem)
    best = block_descent(problem, penalty)
    optimum = objective(problem, best, penalty)
    start = normal(*best.shape)
    distance = float((start - best).square().sum())
    steps = (*range(1, 40), 50, 70, 100, 150)
    values = [
        objective(
            problem, group_lasso(problem, penalty, start=start, tolerance=0, most=k).m, penalty
        )
        for k in steps
    ]
    for k, value in zip(steps, values, strict=True):
        assert value - optimum <= 2 * problem.curvature * distance / k**2
    assert all(b <= a * (1 + 1e-14) for a, b in itertools.pairwise(values))


def test_the_step_descends_and_the_one_with_the_sign_reversed_does_not() -> None:
    problem = correlated(5, 1, 2)
    one = group_lasso(problem, 0.0, tolerance=0, most=1).m
    assert torch.equal(one, -problem.gradient(torch.zeros_like(one)) / problem.curvature)
    assert problem.loss(one) < problem.loss(torch.zeros_like(one)) < problem.loss(-one)


def test_the_first_steps_are_those_of_the_published_recursion() -> None:
    problem = correlated(6, 2, 3)
    penalty = 0.1 * largest_penalty(problem)
    m = p = torch.zeros_like(problem.ryx)
    for k in range(1, 9):
        ahead = m + (k - 1) / (k + 2) * (m - p)
        p, m = m, ahead - (ahead @ problem.r - problem.ryx) / problem.curvature
        for group in problem.groups:
            m[:, group] *= max(0.0, 1 - penalty / problem.curvature / float(m[:, group].norm()))
        found = group_lasso(problem, penalty, tolerance=0.0, most=k).m
        torch.testing.assert_close(found, m, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("groups", "size"), [(9, 1), (5, 3), (1, 4)])
def test_the_largest_penalty_is_where_the_first_group_enters(groups: int, size: int) -> None:
    problem = correlated(groups, size, 4)
    penalty = largest_penalty(problem)
    largest = max(float(problem.ryx[:, g].norm()) for g in problem.groups)
    assert penalty == pytest.approx(largest, rel=1e-14)
    assert (group_lasso(problem, penalty).m == 0).all()
    below = group_lasso(problem, penalty * (1 - 1e-6), tolerance=1e-12).m
    assert int((norms(problem, below) > 0).sum()) == 1


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_an_orthogonal_design_is_solved_by_shrinking_once(share: float) -> None:
    ryx = normal(3, 8)
    groups = torch.arange(8).view(4, 2)
    problem = Reconstruction(torch.eye(8) * 2, ryx, float(ryx.square().sum()), groups)
    penalty = share * largest_penalty(problem)
    found = group_lasso(problem, penalty, tolerance=1e-13)
    size = ryx.view(3, 4, 2).square().sum(dim=(0, 2)).sqrt()
    expected = ryx / 2 * (1 - penalty / size).clamp(min=0).repeat_interleave(2)
    torch.testing.assert_close(found.m, expected, rtol=1e-12, atol=1e-14)
    assert found.iterations == 1


def test_duplicates_share_what_one_of_them_would_get() -> None:
    single = correlated(5, 2, 3)
    copies = torch.arange(10)[torch.cat([single.groups, single.groups[:1]]).flatten()]
    double = Reconstruction(
        single.r[copies][:, copies],
        single.ryx[:, copies],
        single.energy,
        torch.arange(12).view(6, 2),
    )
    penalty = 0.2 * largest_penalty(single)
    expected = block_descent(single, penalty)[:, single.groups.flatten()]
    m = group_lasso(double, penalty, tolerance=1e-12, most=50_000).m
    assert torch.equal(m[:, :2], m[:, 10:])
    m = torch.cat([m[:, :2] + m[:, 10:], m[:, 2:10]], dim=1)
    assert float((m - expected).norm()) <= 1e-8 * float(expected.norm())


def test_without_a_penalty_it_is_least_squares() -> None:
    x = normal(6, 60)
    problem = Reconstruction(x @ x.T / 60, normal(2, 6), 20.0, torch.arange(6)[:, None])
    expected = least_squares(problem.r, problem.ryx, torch.arange(6), ridge=0.0)
    found = group_lasso(problem, 0.0, tolerance=1e-13, most=10_000).m
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_a_target_or_an_input_of_zero_gives_zero_at_once() -> None:
    groups = torch.arange(4).view(2, 2)
    r = torch.eye(4, dtype=torch.float64)
    for problem in (
        Reconstruction(r, torch.zeros(3, 4), 0.0, groups),
        Reconstruction(torch.zeros(4, 4), torch.zeros(3, 4), 1.0, groups),
    ):
        found = group_lasso(problem, 0.1)
        assert (found.iterations, found.residual) == (0, 0.0)
        assert (found.m == 0).all()
        assert largest_penalty(problem) == 0.0
        assert support_of_width(problem, 1).sum() == 1
    no_target = Reconstruction(r, torch.zeros(3, 4), 0.0, groups)
    assert (group_lasso(no_target, 0.1, start=normal(3, 4)).m == 0).all()


def test_entries_without_a_group_are_not_penalised() -> None:
    problem = correlated(6, 2, 3)
    groups = problem.groups[:4].clone()
    groups[3, 1] = -1
    partly = Reconstruction(problem.r, problem.ryx, problem.energy, groups)
    free = partly.owner == 4
    assert int(free.sum()) == 5
    at_most = largest_penalty(partly)
    top = group_lasso(partly, at_most * (1 + 1e-9), tolerance=1e-11, most=20_000).m
    torch.testing.assert_close(
        top[:, free], least_squares(partly.r, partly.ryx, free, ridge=0.0), rtol=1e-6, atol=1e-8
    )
    assert (norms(partly, top) == 0).all()
    assert kkt_residual(partly, torch.zeros_like(top), 2 * float(partly.ryx.norm())) > 1e-2
    half = group_lasso(partly, at_most / 2, tolerance=1e-11, most=20_000).m
    assert 0 < int((norms(partly, half) > 0).sum()) < 4
    assert float(partly.gradient(half)[:, free].norm()) <= 1e-10 * float(partly.ryx.norm())


@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_the_solution_scales_with_the_inputs(size: float) -> None:
    problem = correlated(6, 2, 3)
    scaled = Reconstruction(problem.r * size**2, problem.ryx * size, problem.energy, problem.groups)
    penalty = 0.2 * largest_penalty(problem)
    expected = group_lasso(problem, penalty, tolerance=1e-10, most=20_000).m
    found = group_lasso(scaled, penalty * size, tolerance=1e-10, most=20_000).m
    torch.testing.assert_close(found * size, expected, rtol=1e-6, atol=1e-8)


def test_a_warm_start_at_the_solution_takes_no_step() -> None:
    problem = correlated(8, 2, 3)
    penalty = 0.1 * largest_penalty(problem)
    first = group_lasso(problem, penalty)
    assert group_lasso(problem, penalty, start=first.m).iterations == 0


def test_steps_are_limited() -> None:
    problem = correlated(8, 2, 3)
    found = group_lasso(problem, 1e-3 * largest_penalty(problem), tolerance=0.0, most=3)
    assert found.iterations == 3
    assert found.residual > 0


@pytest.mark.parametrize("penalty", [-1.0, float("nan"), float("inf")])
def test_a_penalty_out_of_bounds_is_refused(penalty: float) -> None:
    problem = correlated(3, 1, 2)
    with pytest.raises(ValueError, match="penalty"):
        group_lasso(problem, penalty)
    with pytest.raises(ValueError, match="penalty"):
        kkt_residual(problem, problem.ryx, penalty)


def test_a_start_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="start"):
        group_lasso(correlated(3, 1, 2), 1.0, start=torch.zeros(1, 3))


@pytest.mark.parametrize("size", [1, 3])
def test_every_width_is_reached_by_a_support_that_the_lasso_chose(size: int) -> None:
    problem = correlated(12, size, 4)
    top = largest_penalty(problem)
    path = []
    for step in range(400):
        m = group_lasso(problem, top * 0.97**step, tolerance=1e-7, most=2000).m
        path.append((norms(problem, m) > 0).tolist())
        if sum(path[-1]) >= 8:
            break
    for width in range(13):
        kept = support_of_width(problem, width, tolerance=1e-7, most=2000)
        assert int(kept.sum()) == width
        same_width = [kept_there for kept_there in path if sum(kept_there) == width]
        assert not same_width or kept.tolist() in same_width


def test_supports_of_an_orthogonal_design_are_the_largest_norms() -> None:
    ryx = normal(3, 10)
    problem = Reconstruction(torch.eye(10), ryx, 1.0, torch.arange(10)[:, None])
    order = ryx.norm(dim=0).argsort(descending=True)
    for width in range(11):
        kept = support_of_width(problem, width)
        assert set(kept.nonzero()[:, 0].tolist()) == set(order[:width].tolist())


def test_groups_that_enter_together_still_give_the_width() -> None:
    problem = Reconstruction(torch.eye(6), torch.ones(1, 6), 6.0, torch.arange(6)[:, None])
    for width in range(7):
        assert int(support_of_width(problem, width).sum()) == width


def test_groups_that_never_enter_come_last() -> None:
    ryx = torch.tensor([[0.0, 2.0, 0.0, 1.0]])
    problem = Reconstruction(torch.diag((ryx[0] > 0).double()), ryx, 5.0, torch.arange(4)[:, None])
    assert support_of_width(problem, 2).tolist() == [False, True, False, True]
    assert int(support_of_width(problem, 3).sum()) == 3


@pytest.mark.parametrize("width", [-1, 4])
def test_a_width_out_of_bounds_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match="width"):
        support_of_width(correlated(3, 1, 2), width)
