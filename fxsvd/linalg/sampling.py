"""Rows and columns drawn by their importance, without replacement and from a seed.

What is drawn twice is stored twice, and what hangs on an unseeded generator cannot be repeated:
with replacement and without a seed two runs at the same rank differ by points of accuracy. The
drawing here keeps the inclusion probabilities that are asked for, exactly, at a fixed count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxsvd.linalg.svd import possible_rank

CERTAIN = 1 - 1e-9


def squared_norms(a: Tensor) -> Tensor:
    """‖A_:j‖² of every column, relative to the largest entry squared: nothing overflows.

    >>> squared_norms(torch.tensor([[3.0, 0.0], [4.0, 2.0]])).tolist()
    [1.5625, 0.25]
    """
    largest = a.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    return (a / largest).square().sum(0)


def leverage_scores(vectors: Tensor) -> Tensor:
    """p_j = (1/k) Σ_ξ V²_jξ: each row's share of the top k singular vectors (n×k); sums to 1.

    M. Mahoney and P. Drineas, *CUR Matrix Decompositions for Improved Data Analysis*, 2009.

    >>> leverage_scores(torch.eye(3)[:, :2]).tolist()
    [0.5, 0.5, 0.0]
    """
    return vectors.square().mean(1)


def inclusion_probabilities(scores: Tensor, count: int) -> Tensor:
    """π_j = min(1, c·p_j), with what the cap takes off given to the others, so that Σπ = count.

    Args:
        scores: importance (n), not negative, of any scale. Where fewer than ``count`` are positive,
            the others share the rest equally.
        count: how many will be drawn.

    Raises:
        ValueError: the count is below 1 or above n, or a score is negative or not finite.

    >>> inclusion_probabilities(torch.tensor([8.0, 1.0, 1.0]), 2).tolist()
    [1.0, 0.5, 0.5]
    """
    n = len(scores)
    if not 1 <= count <= n:
        raise ValueError(f"cannot draw {count} of {n}: ask for 1 to {n}")
    weight = scores.to(torch.float64)
    if not bool(torch.isfinite(weight).all()) or bool((weight < 0).any()):
        raise ValueError("scores are finite and not negative")
    out = torch.zeros_like(weight)
    certain = torch.zeros_like(weight, dtype=torch.bool)
    while (left := count - int(certain.sum())) > 0:
        share = torch.where(certain, 0.0, weight)
        if not bool((share > 0).any()):  # nothing but zeros is left to draw from
            share = (~certain).to(weight.dtype)
        share = share / share.max()
        out = share * (left / share.sum())
        if not bool((out >= CERTAIN).any()):
            break
        certain |= out >= CERTAIN
    return torch.where(certain, 1.0, out * bool(left))


def draw(probabilities: Tensor, seed: int) -> Tensor:
    """As many indices as the inclusion probabilities sum to, each included with its probability.

    Systematic sampling in random order (H. Hartley and J. Rao, *Sampling with Unequal
    Probabilities and without Replacement*, 1962): a comb with unit spacing and a random start is
    laid over a line on which every index owns a stretch as long as its probability.

    Args:
        probabilities: as ``inclusion_probabilities`` gives them (n).
        seed: drawn on the CPU: the same on every device.

    Returns:
        The indices, ascending.

    >>> draw(torch.tensor([1.0, 0.5, 0.5, 1.0]), seed=0).shape
    torch.Size([3])
    """
    chance = probabilities.to("cpu", torch.float64)
    certain = chance >= CERTAIN
    rest = round(float(chance.sum())) - int(certain.sum())
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(chance), generator=generator)
    order = order[~certain[order] & (chance[order] > 0)]
    start = torch.rand(1, generator=generator, dtype=torch.float64)
    line = chance[order].cumsum(0)
    if rest:
        line = line * (rest / line[-1])
    comb = torch.arange(rest, dtype=torch.float64) + start
    # A stretch shorter than the comb's spacing is hit once at most.
    hit = torch.searchsorted(line, comb, right=True).clamp(max=len(order) - 1)
    drawn = torch.cat([certain.nonzero().flatten(), order[hit]])
    return drawn.sort().values.to(probabilities.device)


def most_important(scores: Tensor, count: int) -> Tensor:
    """The indices of the largest scores, the first among equals, in descending order.

    Raises:
        ValueError: the count is below 1.

    >>> most_important(torch.tensor([1.0, 3.0, 3.0]), 2).tolist()
    [1, 2]
    """
    count = possible_rank(count, len(scores))
    return scores.sort(descending=True, stable=True).indices[:count]
