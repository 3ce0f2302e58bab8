"""What a selection has to solve: every layer that reads channels, as least squares on moments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxsvd.coupling import Group
from fxsvd.data.moments import Moment
from fxsvd.data.readers import Reader
from fxsvd.dependency import Dependencies
from fxsvd.importance import Scores
from fxsvd.linalg.reconstruction import Reconstruction
from fxsvd.linalg.second_moments import Root, SecondMoment, block_diagonal, restricted
from fxsvd.relations import Atoms, runs
from fxsvd.selecting.fit import Fit, Mask, covariances, lost, own_output


@dataclass(frozen=True, eq=False)
class Posed:
    """The problem of one layer (of one group of it), and how its solution becomes a weight.

    Attributes:
        layer: the layer.
        group: which of its groups.
        support: the entries of a row that are there to choose from or stay anyway.
        scale: what weight each output has in the problem.
        basis: of the outputs, where the problem is posed in fewer; else None.
        problem: in the scaled outputs (or the basis of these).
    """

    layer: str
    group: int
    support: Tensor
    scale: Tensor
    basis: Tensor | None
    problem: Reconstruction

    def weight(self, m: Tensor, old: Tensor) -> Tensor:
        """A solution as the layer's weight ``[out, row]``; outputs of no weight keep their rows."""
        new = torch.zeros_like(old)
        scale = torch.where(self.scale > 0, self.scale, 1.0).unsqueeze(1)
        new[:, self.support] = (m if self.basis is None else self.basis @ m) / scale
        return torch.where((self.scale > 0).unsqueeze(1), new, old)


class Selection:
    """The state of a selection: what stays so far, and the problems that it leaves.

    Args:
        deps: the analysis.
        reading: the layers that read channels to choose from.
        moments: of their inputs.
        outputs_that_stay: reconstruct only outputs that are still kept (chosen bottom-up).

    Attributes:
        kept: a bool per channel, and one more for what nobody may narrow.
        solved: the weights of a lasso by layer, where one was solved to choose.
    """

    def __init__(
        self,
        deps: Dependencies,
        reading: Mapping[str, Reader],
        moments: Mapping[str, Moment],
        outputs_that_stay: bool,
    ) -> None:
        self.deps, self.reading, self.moments = deps, reading, moments
        self.outputs_that_stay = outputs_that_stay
        self.kept = np.ones(deps.channels.count + 1, dtype=bool)
        self.solved: dict[str, Tensor] = {}

    def problems(self, channels: Atoms) -> list[Reconstruction]:
        """A reconstruction problem for every layer (and group of it) that reads the channels.

        Outputs weigh as much as the batch norm behind them lets through.
        """
        return [posed.problem for posed in self.posed(channels)]

    def posed(self, channels: Atoms) -> list[Posed]:
        """The same, with what makes a weight of a solution."""
        read = [n for n, r in self.reading.items() if np.isin(r.channels, channels).any()]
        return [posed for name in read for posed in self._posed(name, channels)]

    def _posed(self, name: str, channels: Atoms) -> Iterator[Posed]:
        """One problem for every group of a layer that reads some of the channels."""
        reader, moment = self.reading[name], self.moments[name]
        scale = self._scale(reader)
        crosses, energies = self._targets(reader, moment, scale.unsqueeze(2))
        for g, (entries, covariance) in enumerate(
            zip(reader.entries(), covariances(moment), strict=True)
        ):
            stays = np.flatnonzero(self.kept[entries])
            groups = entry_groups(entries[stays], channels)
            if (groups < 0).all():
                continue
            support = torch.from_numpy(stays)
            within = covariance if len(stays) == len(entries) else restricted(covariance, support)
            cross, basis = _fewer(crosses[g], covariance)
            problem = Reconstruction(within, cross[:, support], float(energies[g]), groups)
            yield Posed(name, g, support, scale[g], basis, problem)

    def _targets(self, reader: Reader, moment: Moment, scale: Tensor) -> tuple[Tensor, Tensor]:
        """E[y xᵀ] and E‖y‖² by group, of the scaled targets: the moment's, or the outputs."""
        if moment.cross is not None and moment.scatter_y is not None:
            power = moment.scatter_y.unsqueeze(2) / moment.count * scale.square()
            return moment.cross / moment.count * scale, power.sum((1, 2))
        w = reader.matrices() * scale
        cross = moment.times(w)
        return cross, (cross * w).sum((1, 2)).clamp(min=0)

    def _scale(self, reader: Reader) -> Tensor:
        """How much each output counts, ``[groups, out / groups]``."""
        shape = reader.matrices().shape[:2]
        scale = torch.ones(shape[0] * shape[1], dtype=torch.float64)
        if reader.norm is not None:
            norm: Any = self.deps.analysis.graph.get_submodule(reader.norm)
            scale = (norm.running_var + norm.eps).double().rsqrt()
            scale = scale if norm.weight is None else scale * norm.weight.detach().double().abs()
        if self.outputs_that_stay:
            scale = scale * torch.from_numpy(self._outputs_kept(reader))
        return scale.reshape(shape)

    def remember(self, posed: list[Posed], m: Tensor) -> None:
        """Keep a solution of problems ``stacked`` as weights."""
        rows = columns = 0
        for part in posed:
            (height, width) = part.problem.ryx.shape
            block = m[rows : rows + height, columns : columns + width]
            rows, columns = rows + height, columns + width
            weights = self.solved.setdefault(
                part.layer, self.reading[part.layer].matrices().clone()
            )
            weights[part.group] = part.weight(block, weights[part.group])

    def shrunken(self, alive: Mapping[str, Mask]) -> list[Fit]:
        """The lasso's own weights, by layer with the entries that are left of its rows."""
        return [self._shrunken(name, mask) for name, mask in alive.items() if name in self.solved]

    def _shrunken(self, name: str, mask: Mask) -> Fit:
        reader = self.reading[name]
        moment = own_output(reader, self.moments[name])
        assert moment.mean is not None
        assert moment.mean_y is not None
        m = self.solved[name] * torch.from_numpy(mask).unsqueeze(1)
        intercept = (moment.mean_y - (m @ moment.mean.unsqueeze(-1)).squeeze(-1)).flatten()
        return Fit(reader, m, intercept, lost(moment, m))

    def _outputs_kept(self, reader: Reader) -> Scores:
        block = reader.weight.type.touches((0,))
        out = np.ones(len(reader.weight.value))
        for b in block:
            if b.dims == (0,):
                out = self.kept[self.deps.channels.of[b.atoms]].astype(np.float64)
        return out


def _fewer(cross: Tensor, r: SecondMoment) -> tuple[Tensor, Tensor | None]:
    """E[y xᵀ] in a basis of the outputs, where inputs or rows tell fewer apart than there are."""
    if isinstance(r, Root) and len(r.z) < len(cross):
        basis, _ = torch.linalg.qr(cross @ r.z.T)  # the columns of AZ are those of AZZᵀ
        return basis.T @ cross, basis
    if len(cross) > cross.shape[1]:
        basis, cross = torch.linalg.qr(cross)
        return cross, basis
    return cross, None


def entry_groups(entries: Atoms, channels: Atoms) -> Tensor:
    """Where each channel occurs among the entries: ``[channels, most]``, padded with -1."""
    order, first, times = runs(entries, channels)
    column = np.arange(max(int(times.max(initial=0)), 1))
    place = (first[:, None] + column).clip(max=len(order))
    return torch.from_numpy(np.where(column < times[:, None], np.append(order, -1)[place], -1))


def stacked(problems: list[Reconstruction]) -> Reconstruction:
    """Several problems as one: each relative to its energy, their coefficients side by side."""
    if len(problems) == 1:
        return problems[0]
    start, groups = 0, []
    for p in problems:
        groups.append(torch.where(p.groups >= 0, p.groups + start, -1))
        start += len(p.second)
    scale = [1 / max(p.energy, 1e-300) for p in problems]
    second = block_diagonal([p.second for p in problems], scale)
    ryx = torch.block_diag(*(p.ryx * s for p, s in zip(problems, scale, strict=True)))
    return Reconstruction(second, ryx, float(len(problems)), torch.cat(groups, dim=1))


def readable(
    deps: Dependencies, live: list[tuple[Group, float]], found: dict[str, Reader]
) -> tuple[list[tuple[Group, float]], dict[int, str]]:
    """Groups all of whose spaces some reader contracts; why the others stay."""
    read = np.zeros(deps.channels.count + 1, dtype=bool)
    for reader in found.values():
        read[reader.channels] = True
    read[-1] = False
    good = [(g, ratio) for g, ratio in live if read[g.channels].all()]
    bad = {
        int(i)
        for g, _ in live
        if not read[g.channels].all()
        for i in np.unique(deps.space_of[g.channels])
    }
    return good, dict.fromkeys(bad, "no layer that could be refitted reads it")
