"""Least-squares reconstruction of a layer's output from second moments of its input.

Everything about min over M of ½E‖y − M x‖² is in three statistics, whatever the number of samples:
R = E[x xᵀ], R_yx = E[y xᵀ] and E‖y‖². An input channel owns a *group* of entries of x: one for a
linear layer, all kernel positions for a convolution, all pixels where a linear layer reads a
flattened image. Entries that no group names stay for good.

A ridge is relative to each input's own second moment, R + ε·diag(R): the answer then neither
depends on how channels are scaled, nor on which others are kept (ε·mean(diag R_SS) does).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fxsvd.linalg.second_moments import (
    AnySecondMoment,
    Root,
    SecondMoment,
    restricted,
    standardize,
)
from fxsvd.linalg.svd import finite_matrix
from fxsvd.linalg.systems import system

# Above what rounding of float32 activations and sums does to the spectrum of correlations; it adds
# at most ε/4·Σᵢ rᵢᵢ‖mᵢ‖² to E‖y − M x‖², and O(ε²) in directions that are well determined.
RIDGE = 1e-6
CONSTANT = 1e-12  # the share of its second moment below which a variance is rounding


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """The problem min over M of ½E‖y − M x‖², given by second moments (kept in float64).

    Args:
        second: R = E[x xᵀ] or the covariance of x, d×d, or its root.
        ryx: E[y xᵀ], m×d.
        energy: E‖y‖².
        groups: G×s, the entries of x that belong to each channel; −1 pads.

    Raises:
        ValueError: shapes do not fit, numbers are not finite, or an entry is in two groups.

    >>> p = Reconstruction(torch.eye(2), torch.tensor([[3.0, 1.0]]), 10.0, torch.tensor([[0], [1]]))
    >>> p
    Reconstruction(2 inputs in 2 channels, 1 outputs)
    >>> fit = torch.tensor([[3.0, 0.0]])
    >>> p.loss(fit), p.error(fit), p.gradient(fit).tolist()
    (0.5, 0.1, [[0.0, -1.0]])
    """

    second: SecondMoment
    ryx: Tensor
    energy: float
    groups: Tensor

    def __post_init__(self) -> None:
        second, ryx = _moments(self.second, self.ryx)
        if not 0 <= self.energy < float("inf"):
            raise ValueError(f"energy {self.energy} is E‖y‖²: from 0, and finite")
        groups = self.groups.to(ryx.device, torch.int64)
        _require_disjoint(groups, len(second))
        for name, value in (("second", second), ("ryx", ryx), ("groups", groups)):
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        d, count, m = len(self.second), len(self.groups), len(self.ryx)
        return f"Reconstruction({d} inputs in {count} channels, {m} outputs)"

    @classmethod
    def of_weight(cls, w: Tensor, r: Tensor, groups: Tensor) -> Reconstruction:
        """The problem whose target is a layer's own output, y = W x.

        With more outputs than inputs the target is reduced to d rows, W = Q T and y → Qᵀy = T x: no
        error, group norm or support changes, but M is then in those coordinates.

        Args:
            w: m×d.
            r: d×d second moment of x.
            groups: G×s, the entries of each channel; −1 pads.

        >>> each = torch.tensor([[0], [1]])
        >>> problem = Reconstruction.of_weight(torch.ones(9, 2), torch.eye(2), each)
        >>> problem.ryx.shape, problem.energy
        (torch.Size([2, 2]), 18.0)
        """
        r, w = _moments(r, w)
        wr = w @ r
        energy = max(0.0, float((wr * w).sum()))
        if len(w) > len(r):
            wr = torch.linalg.qr(w, mode="r").R @ r
        return cls(r, wr, energy, groups)

    @cached_property
    def r(self) -> Tensor:
        """R, d×d; multiplied out where its root was given."""
        return self.second.dense() if isinstance(self.second, Root) else self.second

    @cached_property
    def owner(self) -> Tensor:
        """The group of each entry of x, d numbers; G where there is none."""
        owner = self.groups.new_full((len(self.second),), len(self.groups))
        used = self.groups >= 0
        owner[self.groups[used]] = used.nonzero()[:, 0]
        return owner

    @cached_property
    def curvature(self) -> float:
        """λmax(R), the Lipschitz constant of the gradient."""
        same = self.second
        same = same.z @ same.z.T if isinstance(same, Root) else same  # in other than zeros
        return max(0.0, float(torch.linalg.eigvalsh(same)[-1]))

    def support(self, kept: Tensor) -> Tensor:
        """The entries of x, ascending, that stay when only the ``kept`` channels (G bools) do.

        >>> two = Reconstruction(torch.eye(3), torch.eye(3), 3.0, torch.tensor([[0, 2], [1, -1]]))
        >>> two.support(torch.tensor([True, False]))
        tensor([0, 2])
        """
        if kept.shape != (len(self.groups),) or kept.dtype != torch.bool:
            raise ValueError(f"kept has to be one bool for each of the {len(self.groups)} channels")
        kept = kept.to(self.ryx.device)
        return torch.cat([kept, kept.new_ones(1)])[self.owner].nonzero()[:, 0]

    def loss(self, m: Tensor) -> float:
        """½E‖y − M x‖² of an m×d matrix."""
        m = m.double()
        return 0.5 * (self.energy + float(((self.gradient(m) - self.ryx) * m).sum()))

    def error(self, m: Tensor) -> float:
        """Relative error E‖y − M x‖² / E‖y‖² of an m×d matrix: M = 0 has an error of 1."""
        absolute = max(0.0, 2 * self.loss(m))
        if self.energy == 0:
            return 0.0 if absolute == 0 else float("inf")
        return absolute / self.energy

    def gradient(self, m: Tensor, entries: Tensor | None = None) -> Tensor:
        """The loss' gradient M R − R_yx, m×d, of an M that is zero but for some entries of x."""
        m = m.double() if entries is None else m.double()[:, entries]
        if isinstance(self.second, Root):
            z = self.second.z
            return (m @ (z if entries is None else z[:, entries]).T) @ z - self.ryx
        return m @ (self.second if entries is None else self.second[entries]) - self.ryx


def _moments(r: AnySecondMoment, ryx: Tensor) -> tuple[AnySecondMoment, Tensor]:
    if isinstance(r, Tensor):
        r = finite_matrix(r)
    ryx = finite_matrix(ryx)
    if r.shape != (ryx.shape[1], ryx.shape[1]):
        raise ValueError(f"{tuple(r.shape)} and {tuple(ryx.shape)} do not fit: want d×d and m×d")
    return r, ryx


def _require_disjoint(groups: Tensor, d: int) -> None:
    if groups.ndim != 2 or len(groups) == 0:
        raise ValueError(f"groups has to be channels × entries, but is {tuple(groups.shape)}")
    used = groups[groups != -1]
    if len(used) and not 0 <= int(used.min()) <= int(used.max()) < d:
        raise ValueError(f"groups have to name entries 0 … {d - 1} of x, or −1 for none")
    if len(used.unique()) != len(used):
        raise ValueError("groups name an entry of x twice: each belongs to one channel at most")


def least_squares(r: SecondMoment, ryx: Tensor, support: Tensor, *, ridge: float = RIDGE) -> Tensor:
    """The best matrix on the kept inputs, R_yx,S (R_SS + ε·diag R_SS)⁻¹.

    Inputs without variance get coefficients of zero, inputs that repeat each other equal ones (in
    units of their size). Where the ridge is too small to solve the system it is raised.

    Args:
        r: E[x xᵀ], d×d, or its root.
        ryx: E[y xᵀ], m×d.
        support: the inputs that stay: d bools, or their indices.
        ridge: ε, relative to each input's own second moment.

    Returns:
        m×|S|, float64.

    Raises:
        ValueError: shapes do not fit, numbers are not finite, or ``r`` is indefinite.

    >>> r, ryx = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[3.0, 3.0]])
    >>> least_squares(r, ryx, torch.tensor([True, False]), ridge=0)
    tensor([[1.5000]], dtype=torch.float64)
    """
    r, ryx = _moments(r, ryx)
    support = support.to(ryx.device)
    matrix, scale = standardize(restricted(r, support))
    return system(matrix, ridge).solved(ryx[:, support] * scale) * scale


def centred(second_moment: Tensor, mean: Tensor) -> Tensor:
    """The covariance E[x xᵀ] − μ μᵀ; an input that is constant but for rounding becomes zero.

    >>> centred(torch.tensor([[5.0, 2.0], [2.0, 1.0]]), torch.tensor([2.0, 1.0])).tolist()
    [[1.0, 0.0], [0.0, 0.0]]
    """
    second_moment, mean = _moments(second_moment, mean[None])
    covariance = second_moment - mean.T @ mean
    varies = covariance.diagonal() > CONSTANT * second_moment.diagonal()
    return covariance * (varies[:, None] & varies)


def intercept(b: Tensor | None, w: Tensor, mean_x: Tensor, m: Tensor, mean_xhat: Tensor) -> Tensor:
    """The bias b + W μ_x − M μ_x̂ that keeps the output's mean when W x + b becomes M x̂ + b̂.

    With M fitted to covariances it is what an unpenalised constant input would give. Shapes: b m
    (or none), W m×d and its input's mean d, M m×k and its input's mean k.

    >>> one = torch.ones(1)
    >>> intercept(None, torch.ones(1, 2), torch.tensor([1.0, 4.0]), torch.ones(1, 1), one)
    tensor([4.], dtype=torch.float64)
    """
    shift = w.double() @ mean_x.double() - m.double() @ mean_xhat.double()
    return shift if b is None else b.double() + shift
