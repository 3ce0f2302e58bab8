"""Refitting a layer to what it used to compute, and where its new numbers go in the network.

The fit is least squares on second moments, per group of the layer:
M = W_S + (R_yx,S − W_S R_SS)(R_SS + εI)⁻¹ on the covariance, b̂ = E y − M E x. The ridge pulls
towards the weights W that the layer has, not to zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from fxsvd.edits import Assign, Estimate
from fxsvd.linalg.reconstruction import least_squares
from fxsvd.moments import Moment
from fxsvd.readers import Reader

Mask = npt.NDArray[np.bool_]
RIDGE = 1e-4
"""Relative to the mean variance of the kept inputs."""


@dataclass(frozen=True, eq=False)
class Fit:
    """A reader's new map, in its full shape (zeros where an input is gone).

    Attributes:
        reader: the layer.
        matrices: ``[groups, out / groups, row]``.
        intercept: what is added to the outputs, ``[out]``.
        error: the variance of the outputs that is lost, relative.
    """

    reader: Reader
    matrices: Tensor
    intercept: Tensor
    error: float

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

    def estimate(self, edit: str) -> Estimate:
        """What the fit costs."""
        return Estimate(self.reader.layer, edit, self.error)


def own_output(reader: Reader, moment: Moment) -> Moment:
    """A moment of inputs, paired with the outputs that the layer computes of them."""
    w, c = reader.matrices(), moment.covariance
    cross = w @ c
    mean = (w @ moment.mean.unsqueeze(-1)).squeeze(-1)  # type: ignore[union-attr]
    if reader.module.bias is not None:
        mean = mean + reader.module.get_parameter("bias").detach().double().reshape(mean.shape)
    n = moment.count
    energy = (cross * w).sum(-1).clamp(min=0)
    return Moment(n, moment.mean, moment.scatter, mean, cross * n, energy * n, moment.batches)


def fit(reader: Reader, moment: Moment, alive: Mask, *, ridge: float = RIDGE) -> Fit:
    """The least-squares map on the inputs that are alive.

    Args:
        reader: the layer.
        moment: of its inputs, paired with the outputs it should have.
        alive: ``[groups, row]``.
        ridge: relative to the mean variance of the inputs that are alive.
    """
    w, covariance = reader.matrices(), moment.covariance
    assert moment.cross is not None  # paired
    assert moment.mean is not None
    assert moment.mean_y is not None
    assert moment.scatter_y is not None
    matrices = torch.zeros_like(w)
    for g in range(reader.groups):
        support = torch.from_numpy(np.flatnonzero(alive[g]))
        rest = moment.cross[g] / moment.count - w[g][:, support] @ covariance[g][support]
        change = least_squares(covariance[g], rest, support, ridge=ridge)
        matrices[g][:, support] = w[g][:, support] + change
    mean_hat = (matrices @ moment.mean.unsqueeze(-1)).squeeze(-1)
    intercept = (moment.mean_y - mean_hat).flatten()
    return Fit(reader, matrices, intercept, lost(moment, matrices))


def lost(moment: Moment, matrices: Tensor) -> float:
    """E‖y − ŷ‖² / E‖y − E y‖² of a map ``[groups, y, x]`` with the best intercept."""
    assert moment.cross is not None  # paired
    assert moment.scatter_y is not None
    total = float(moment.scatter_y.sum())
    explained = 2 * (matrices * moment.cross).sum()
    power = ((matrices @ moment.covariance) * matrices).sum() * moment.count
    return max(float(total - explained + power), 0.0) / max(total, 1e-300)
