"""Chains of small kernels, by convolving with them, against closed forms and proven bounds."""

from __future__ import annotations

from functools import reduce
from itertools import pairwise
from math import sqrt

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fxsvd.linalg.kernels import channel_svd, cp, spatial_svd, tucker2

CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
STRIDE, PADDING, DILATION = (2, 3), (3, 1), (1, 2)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def size(a: Tensor) -> float:
    return float(torch.linalg.vector_norm(a))


def tail(matrix: Tensor, k: int) -> float:
    return size(torch.linalg.svdvals(matrix)[k:])


def composed(kernels: tuple[Tensor, ...]) -> Tensor:
    """The kernel of the chain: what it answers to an impulse, for each input channel."""
    chain = kernels[0]
    for kernel in kernels[1:]:
        depthwise = kernel.shape[1] != chain.shape[0]
        equation = "orab,oicd->oiacbd" if depthwise else "orab,ricd->oiacbd"
        chain = torch.einsum(equation, kernel, chain).flatten(4).flatten(2, 3)
    return chain


def settings_of(kernel: Tensor) -> dict[str, tuple[int, int]]:
    """Stride, padding and dilation where the kernel is long."""
    long = [length > 1 for length in kernel.shape[2:]]

    def share(values: tuple[int, int], other: int) -> tuple[int, int]:
        return tuple(v if yes else other for v, yes in zip(values, long, strict=True))  # type: ignore[return-value]

    return {
        "stride": share(STRIDE, 1),
        "padding": share(PADDING, 0),
        "dilation": share(DILATION, 1),
    }


def convolved(x: Tensor, kernels: tuple[Tensor, ...]) -> Tensor:
    for kernel in kernels:
        x = F.conv2d(x, kernel, **settings_of(kernel), groups=x.shape[1] // kernel.shape[1])
    return x


SMALL = normal(6, 4, 3, 5)
CHAINS = {
    "channel": channel_svd(SMALL, 3),
    "channel, data": channel_svd(SMALL, 3, torch.diag(torch.arange(60.0))),
    "spatial": spatial_svd(SMALL, 3),
    "tucker": tucker2(SMALL, 3, 2),
    "cp": cp(SMALL, 3),
}


@pytest.mark.parametrize("kernels", CHAINS.values(), ids=CHAINS.keys())
def test_the_chain_is_a_convolution_with_the_composed_kernel(kernels: tuple[Tensor, ...]) -> None:
    """With stride, padding and dilation shared out to the kernel that is long in each direction."""
    x = normal(2, 4, 11, 13)
    whole = F.conv2d(x, composed(kernels), stride=STRIDE, padding=PADDING, dilation=DILATION)
    torch.testing.assert_close(convolved(x, kernels), whole, rtol=0, atol=1e-12)


MATRICES = {
    channel_svd: lambda w: w.flatten(1),
    spatial_svd: lambda w: w.permute(1, 2, 0, 3).flatten(2).flatten(0, 1),
}


@pytest.mark.parametrize("factorize", MATRICES)
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_error_is_the_tail_of_the_matrix(factorize: object, rank: int) -> None:
    error = size(SMALL - composed(factorize(SMALL, rank)))  # type: ignore[operator]
    assert error == pytest.approx(tail(MATRICES[factorize](SMALL), rank), rel=1e-9, abs=1e-13)  # type: ignore[index]


EDGES = {
    "zero": torch.zeros(4, 3, 3, 3),
    "constant": torch.full((4, 3, 3, 3), 2.0),
    "single precision": normal(4, 3, 3, 3).float(),
    "huge": normal(4, 3, 3, 3) * 1e20,
    "tiny": normal(4, 3, 3, 3) * 1e-20,
    "one output": normal(1, 3, 3, 3),
    "one input": normal(4, 1, 3, 3),
    "one by one": normal(4, 3, 1, 1),
    "low rank": torch.einsum("or,rihw->oihw", normal(6, 2), normal(2, 4, 3, 3)),
}


@pytest.mark.parametrize("w", EDGES.values(), ids=EDGES.keys())
def test_full_rank_or_more_is_exact(w: Tensor) -> None:
    exact = w.double()
    on_data = channel_svd(w, 99, torch.eye(w[0].numel()))
    for kernels in (channel_svd(w, 99), on_data, spatial_svd(w, 99), tucker2(w, 99, 99)):
        assert all(kernel.dtype == torch.float64 for kernel in kernels)
        assert size(composed(kernels) - exact) <= 1e-13 * size(exact)


@pytest.mark.parametrize("shape", [(6, 4, 5), (6, 4, 3, 3), (6, 4, 2, 3, 2)])
def test_lines_and_volumes_are_factorized_likewise(shape: tuple[int, ...]) -> None:
    w, conv = normal(*shape), CONV[len(shape)]
    x = normal(2, 4, *[7] * (len(shape) - 2))
    for kernels in (channel_svd(w, 6), tucker2(w, 6, 4)):
        torch.testing.assert_close(reduce(conv, kernels, x), conv(x, w), rtol=0, atol=1e-12)


def patches(x: Tensor) -> Tensor:
    return F.unfold(x, 3).transpose(1, 2).flatten(0, 1)


def test_on_data_the_error_is_the_tail_of_the_outputs() -> None:
    """Exactly, and below that of the weight's own SVD, at every rank."""
    w, x = normal(6, 4, 3, 3), normal(3, 4, 8, 8).cumsum(2)
    seen = patches(x)
    y = F.conv2d(x, w)
    for rank in range(1, 7):
        on_data = channel_svd(w, rank, seen.T @ seen)
        error = size(y - F.conv2d(F.conv2d(x, on_data[0]), on_data[1]))
        closed = tail(y.transpose(0, 1).flatten(1), rank)
        assert error == pytest.approx(closed, rel=1e-9, abs=1e-11 * size(y))
        plain = channel_svd(w, rank)
        assert error <= size(y - F.conv2d(F.conv2d(x, plain[0]), plain[1])) + 1e-11 * size(y)


def test_inputs_of_low_rank_need_no_more_channels() -> None:
    w, base = normal(8, 4, 3, 3), normal(2, 36)
    first, last = channel_svd(w, 7, base.T @ base)
    assert first.shape[0] == 2
    y = base @ w.flatten(1).T
    assert size(y - base @ composed((first, last)).flatten(1).T) <= 1e-12 * size(y)


def hosvd(w: Tensor, rank_out: int, rank_in: int) -> Tensor:
    u = torch.linalg.svd(w.flatten(1)).U[:, :rank_out]
    v = torch.linalg.svd(w.transpose(0, 1).flatten(1)).U[:, :rank_in]
    return torch.einsum("oihw,op,ij,qp,kj->qkhw", w, u, v, u, v)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ranks", [(1, 1), (2, 3), (5, 1), (6, 2), (3, 4)])
def test_tucker_is_between_its_bounds(seed: int, ranks: tuple[int, int]) -> None:
    """At least each tail, at most the HOSVD, which is at most the root of both tails' squares."""
    w = normal(6, 4, 3, 3, seed=seed)
    error = size(w - composed(tucker2(w, *ranks)))
    tails = tail(w.flatten(1), ranks[0]), tail(w.transpose(0, 1).flatten(1), ranks[1])
    start = size(w - hosvd(w, *ranks))
    margin = 1e-12 * size(w)
    assert max(tails) - margin <= error <= start + margin
    assert start <= sqrt(tails[0] ** 2 + tails[1] ** 2) + margin


def test_tucker_ends_at_a_stationary_point_with_orthonormal_sides() -> None:
    """Each side is the leading space of the tensor projected on the other: HOOI's fixed point."""
    w = normal(6, 4, 3, 3)
    into, core, out = (kernel.flatten(1) for kernel in tucker2(w, 3, 2, most=2000, tolerance=0))
    for side in (into.T, out):
        eye = torch.eye(side.shape[1]).double()
        torch.testing.assert_close(side.T @ side, eye, rtol=0, atol=1e-12)
    for projected, side in [
        (torch.einsum("oihw,ji->ojhw", w, into).flatten(1), out),
        (torch.einsum("oihw,or->irhw", w, out).flatten(1), into.T),
    ]:
        best = float(torch.linalg.svdvals(projected)[: side.shape[1]].square().sum())
        assert size(side.T @ projected) ** 2 == pytest.approx(best, rel=1e-9)
    assert size(core) ** 2 == pytest.approx(best, rel=1e-9)


def outer_products(rank: int, seed: int) -> Tensor:
    sides = [normal(n, rank, seed=10 * seed + i) for i, n in enumerate((6, 5, 3, 4))]
    return torch.einsum("or,ir,hr,wr->oihw", *sides)


@pytest.mark.parametrize("scale", [1.0, 1e20, 1e-20])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_cp_finds_what_is_a_sum_of_outer_products(rank: int, scale: float) -> None:
    w = outer_products(rank, seed=1) * scale
    kernels = cp(w, rank, most=2000)
    assert size(w - composed(kernels)) <= 1e-9 * size(w)


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_cp_keeps_what_is_proven_of_every_such_sum(rank: int) -> None:
    """No less error than any matricisation's tail, and less with every iteration."""
    w = normal(6, 5, 3, 4)
    errors = [size(w - composed(cp(w, rank, most=most))) for most in (1, 2, 4, 8, 16, 200)]
    assert all(later <= earlier for earlier, later in pairwise(errors))
    floor = max(tail(w.movedim(dim, 0).flatten(1), rank) for dim in range(4))
    assert floor * (1 - 1e-12) <= errors[-1] < size(w)


def test_cp_shares_a_term_equally_among_its_factors() -> None:
    into, high, wide, out = cp(normal(6, 5, 3, 4), 4)
    norms = [kernel.flatten(1).norm(dim=1) for kernel in (into, high, wide)]
    norms.append(out.flatten(1).norm(dim=0))
    for norm in norms[1:]:
        torch.testing.assert_close(norm, norms[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("w", [EDGES["zero"], EDGES["constant"], EDGES["one by one"]])
def test_cp_of_simple_kernels_is_exact_at_any_rank_that_allows(w: Tensor) -> None:
    for rank in (3, 7):
        kernels = cp(w, rank)
        assert all(bool(torch.isfinite(kernel).all()) for kernel in kernels)
        assert size(w.double() - composed(kernels)) <= 1e-9 * size(w)


def test_cp_is_repeated_by_its_seed() -> None:
    w = normal(6, 5, 3, 4)
    first, again, other = (cp(w, 5, seed, most=3)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_bad_kernels_and_ranks_are_refused() -> None:
    nan = torch.full((2, 2, 3, 3), float("nan"))
    for call, words in [
        (lambda: channel_svd(torch.ones(2, 2), 1), "need a kernel"),
        (lambda: spatial_svd(torch.ones(2, 2, 3), 1), "need a kernel"),
        (lambda: channel_svd(SMALL, 1, torch.eye(4)), "patches of 60"),
        (lambda: channel_svd(SMALL, 0), "rank 0"),
        (lambda: spatial_svd(SMALL, 0), "rank 0"),
        (lambda: tucker2(SMALL, 1, 0), "rank 0"),
        (lambda: cp(SMALL, 0), "rank 0"),
        (lambda: channel_svd(nan, 1), "not finite"),
        (lambda: tucker2(nan, 1, 1), "not finite"),
        (lambda: cp(nan, 1), "not finite"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
