"""How strong a ridge has to be, from the moments that the fit itself uses.

Generalized cross-validation (G. Golub, M. Heath, G. Wahba, *Generalized Cross-Validation as a
Method for Choosing a Good Ridge Parameter*, 1979): GCV(ε) = RSS(ε) / (1 − dof(ε)/n)², where dof is
the trace of the matrix that makes fitted values of targets. With R = Q Λ Qᵀ (standardized) and
q = R_yx Q, all of it is sums over the spectrum:

    RSS = E‖y‖² − Σᵢ ‖qᵢ‖² (λᵢ + 2ε) / (λᵢ + ε)²,    dof = 1 + Σᵢ λᵢ / (λᵢ + ε).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxsvd.linalg.second_moments import Root, SecondMoment, standardize

ZERO = 1e-12
"""The share of the largest eigenvalue below which one is rounding."""


def cross_validation_scores(
    r: SecondMoment, ryx: Tensor, energy: float, rows: int, ridges: Sequence[float]
) -> Tensor:
    """The error on data that was not seen, estimated for each ridge; less is better.

    Args:
        r: covariance of x, d×d, or its root.
        ryx: covariance of y and x, m×d.
        energy: Σ variances of y.
        rows: how many independent rows the moments come from.
        ridges: to compare, relative to each input's variance (see ``least_squares``), above 0.

    Returns:
        A score per ridge, in units of ``energy``.

    Raises:
        ValueError: there is no row.

    >>> one, half = torch.eye(1), torch.tensor([[0.5]])
    >>> cross_validation_scores(one, half, 1.0, 100, [1e-9, 1.0]).round(decimals=2).tolist()
    [0.78, 0.84]
    """
    if rows < 1:
        raise ValueError("moments of no rows validate nothing")
    spectrum, power = _spectrum(r, ryx.double())
    return spectral_scores(spectrum, power, energy, rows, ridges)


def _spectrum(r: SecondMoment, ryx: Tensor) -> tuple[Tensor, Tensor]:
    """The spectrum of the standardized R, and ‖qᵢ‖² beside it; without inputs that are constant."""
    if isinstance(r, Root):
        root, scale = r.standardized()
        spectrum, basis = torch.linalg.eigh(root.z @ root.z.T)  # Q = Zᵀ basis Λ^-½
        power = ((ryx * scale) @ root.z.T @ basis).square().sum(0)
        real = spectrum > ZERO * spectrum[-1]
        return spectrum[real], power[real] / spectrum[real]
    matrix, scale = standardize(r.double())
    varies = scale > 0
    if not bool(varies.all()):
        matrix, scale, ryx = matrix[varies][:, varies], scale[varies], ryx[:, varies]
    spectrum, basis = torch.linalg.eigh(matrix)
    return spectrum.clamp(min=0), ((ryx * scale) @ basis).square().sum(0)


def spectral_scores(
    spectrum: Tensor, power: Tensor, energy: float, rows: int, ridges: Sequence[float]
) -> Tensor:
    """The same from the spectrum.

    Args:
        spectrum: λ of the standardized R, 0 or more.
        power: ‖qᵢ‖², beside it.
        energy: Σ variances of y.
        rows: how many rows there are.
        ridges: to compare.

    Returns:
        A score per ridge, in units of ``energy``; infinity where nothing is left to validate with.

    >>> one = torch.ones(1).double()
    >>> spectral_scores(one, one / 4, 1.0, 100, [1e-9, 1.0]).round(decimals=2).tolist()
    [0.78, 0.84]
    """
    spectrum, power = spectrum.unsqueeze(1), power.unsqueeze(1)
    ridge = spectrum.new_tensor(list(ridges))
    explained = (power * (spectrum + 2 * ridge) / (spectrum + ridge).square()).sum(0)
    free = 1 - (1 + (spectrum / (spectrum + ridge)).sum(0)) / rows
    score = (energy - explained).clamp(min=0) / free.square()
    return torch.where(free > 0, score, torch.full_like(score, torch.inf))


def validated_ridge(
    r: SecondMoment, ryx: Tensor, energy: float, rows: int, ridges: Sequence[float]
) -> float:
    """The smallest of the ridges whose score is within a percent of the best.

    Args and errors are those of ``cross_validation_scores``.

    >>> validated_ridge(torch.eye(2), torch.eye(2), 2.0, 9, [1e-6, 1e-2])
    1e-06
    """
    scores = cross_validation_scores(r, ryx, energy, rows, ridges)
    good = scores <= scores.min() * 1.01 + 1e-12 * energy
    return min(ridge for ridge, fine in zip(ridges, good.tolist(), strict=True) if fine)
