"""Refitting a layer to what it used to compute, and where its new numbers go in the network.

The fit is least squares on second moments, per group of the layer:
M = W_S + (R_yx,S − W_S R_SS)(R_SS + εI)⁻¹ on the covariance, b̂ = E y − M E x. The ridge pulls
towards the weights W that the layer has, not to zero.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from fxsvd.data.moments import Moment
from fxsvd.data.readers import Reader
from fxsvd.edits import Assign, Estimate
from fxsvd.linalg.reconstruction import least_squares
from fxsvd.linalg.second_moments import Root, SecondMoment, restricted
from fxsvd.linalg.validation import validated_ridge

Mask = npt.NDArray[np.bool_]
RIDGE = 1e-4
"""Relative to the variance of each input."""
RIDGES = (RIDGE, 1e-3, 1e-2, 0.1, 1.0, 10.0)
"""Where rows are few, the one that cross-validation prefers."""
FEW = 16
"""Rows for each entry of a row below which they are few."""
WIDEST = 4096
"""Entries above which no spectrum is taken: the ridge is then the entries for each row."""


@dataclass(frozen=True, eq=False)
class Fit:
    """A reader's new map, in its full shape (zeros where an input is gone).

    Attributes:
        reader: the layer.
        matrices: ``[groups, out / groups, row]``.
        intercept: what is added to the outputs, ``[out]``.
        error: the variance of the outputs that is lost, relative.
        losses: by output, that variance and the whole; None where it is not known by output.
    """

    reader: Reader
    matrices: Tensor
    intercept: Tensor
    error: float
    losses: tuple[Tensor, Tensor] | None = None

    def weight(self) -> Tensor:
        """In the shape of the layer's weight."""
        return self.matrices.reshape(self.reader.weight.value.shape)

    def assigns(self, graph: fx.GraphModule) -> tuple[Assign, ...]:
        """The parameters that hold the new map.

        Without a bias of its own, a layer in front of a batch norm shifts that norm's running mean;
        any other gets a bias.
        """
        reader, why = self.reader, "reconstructs the layer's output"
        name = reader.weight.names[0]
        out = (Assign(name, self.weight(), why),)
        path = f"{reader.layer}.bias"
        if reader.module.bias is None and reader.norm is not None:
            path = f"{reader.norm}.running_mean"
            mean = graph.get_buffer(path).detach().double()
            return (*out, Assign(path, mean - self.intercept, why))
        if reader.module.bias is None and not bool((self.intercept != 0).any()):
            return out
        return (*out, Assign(path, self.intercept, why))

    def estimate(self, edit: str, stays: Mask | None = None) -> Estimate:
        """What the fit costs, over the outputs that stay."""
        error = self.error
        if stays is not None and self.losses is not None:
            lost, total = (float(part[torch.from_numpy(stays)].sum()) for part in self.losses)
            error = lost / max(total, 1e-300)
        return Estimate(self.reader.layer, edit, error)

    def judged(self, moment: Moment) -> Fit:
        """The same fit, with the error that it makes of other outputs."""
        error = lost(moment, self.matrices)
        return replace(self, error=error, losses=losses(moment, self.matrices))


def own_output(reader: Reader, moment: Moment) -> Moment:
    """A moment of inputs, paired with the outputs that the layer computes of them."""
    w, n = reader.matrices(), moment.count
    assert moment.mean is not None  # something was added
    cross = moment.times(w)
    mean = (w @ moment.mean.unsqueeze(-1)).squeeze(-1)
    if reader.module.bias is not None:
        mean = mean + reader.module.get_parameter("bias").detach().double().reshape(mean.shape)
    energy = (cross * w).sum(-1).clamp(min=0)
    return replace(moment, mean_y=mean, cross=cross * n, scatter_y=energy * n)


def fit(reader: Reader, moment: Moment, alive: Mask, *, ridge: float | None = None) -> Fit:
    """The least-squares map on the inputs that are alive.

    Args:
        reader: the layer.
        moment: of its inputs, paired with the outputs it should have.
        alive: ``[groups, row]``.
        ridge: relative to the variance of each input; None: ``RIDGE``, or more where rows are few.
    """
    w = reader.matrices()
    assert moment.cross is not None  # paired
    assert moment.mean is not None
    assert moment.mean_y is not None
    assert moment.scatter_y is not None
    matrices = w * torch.from_numpy(alive).unsqueeze(1)
    cross = moment.cross / moment.count
    rest = cross - moment.times(matrices)
    energy = moment.scatter_y / moment.count - (matrices * (cross + rest)).sum(-1)
    for g, r in enumerate(covariances(moment)):
        support = torch.from_numpy(np.flatnonzero(alive[g]))
        strength = ridge
        if strength is None:
            left = max(float(energy[g].sum()), 0.0)
            strength = _ridge(r, rest[g], left, moment.count, support)
        matrices[g][:, support] += least_squares(r, rest[g], support, ridge=strength)
    mean_hat = (matrices @ moment.mean.unsqueeze(-1)).squeeze(-1)
    intercept = (moment.mean_y - mean_hat).flatten()
    return Fit(reader, matrices, intercept, 0.0).judged(moment)


def covariances(moment: Moment) -> list[SecondMoment]:
    """Of the inputs, by group; roots while the rows are kept."""
    root = moment.root
    return list(moment.covariance) if root is None else [Root(z) for z in root]


def _ridge(r: SecondMoment, ryx: Tensor, energy: float, rows: int, support: Tensor) -> float:
    """For the fit to so many rows, of outputs of that energy."""
    if rows >= FEW * len(support):
        return RIDGE
    if len(support) > WIDEST:
        return max(RIDGE, len(support) / rows)
    return validated_ridge(restricted(r, support), ryx[:, support], energy, rows, RIDGES)


def lost(moment: Moment, matrices: Tensor) -> float:
    """E‖y − ŷ‖² / E‖y − E y‖² of a map ``[groups, y, x]`` with the best intercept."""
    part, total = (float(side.sum()) for side in losses(moment, matrices))
    return part / max(total, 1e-300)


def losses(moment: Moment, matrices: Tensor) -> tuple[Tensor, Tensor]:
    """By output, E(y − ŷ)² with the best intercept, and E(y − E y)²; ``[out]`` each."""
    assert moment.cross is not None  # paired
    assert moment.scatter_y is not None
    total = moment.scatter_y / moment.count
    explained = 2 * (matrices * moment.cross).sum(-1) / moment.count
    power = (moment.times(matrices) * matrices).sum(-1)
    return (total - explained + power).clamp(min=0).flatten(), total.flatten()
