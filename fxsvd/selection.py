"""Which channels of a group reconstruct best: scores from the moments of all that read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxsvd.coupling import Group
from fxsvd.dependency import Dependencies
from fxsvd.importance import Scores
from fxsvd.linalg.elimination import backward_elimination, forward_selection
from fxsvd.linalg.lasso import support_of_width
from fxsvd.linalg.reconstruction import Reconstruction
from fxsvd.moments import Moment
from fxsvd.readers import Reader
from fxsvd.relations import Atoms


class Selection:
    """The state of a selection: what stays so far, and the problems that it leaves.

    Args:
        deps: the analysis.
        reading: the layers that read channels to choose from.
        moments: of their inputs.
        outputs_that_stay: reconstruct only outputs that are still kept (chosen bottom-up).

    Attributes:
        kept: a bool per channel, and one more for what nobody may narrow.
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

    def problems(self, channels: Atoms) -> list[Reconstruction]:
        """A reconstruction problem for every layer (and group of it) that reads the channels.

        Outputs weigh as much as the batch norm behind them lets through.
        """
        out = []
        for name, reader in self.reading.items():
            if np.isin(reader.channels, channels).any():
                weighted = self._weighted(reader)
                for g, entries in enumerate(reader.entries()):
                    problem = self._problem(
                        weighted[g], self.moments[name].covariance[g], entries, channels
                    )
                    out += [] if problem is None else [problem]
        return out

    def _problem(
        self, w: Tensor, covariance: Tensor, entries: Atoms, channels: Atoms
    ) -> Reconstruction | None:
        stays = np.flatnonzero(self.kept[entries])
        groups = entry_groups(entries[stays], channels)
        if (groups < 0).all():
            return None
        support = torch.from_numpy(stays)
        w = torch.linalg.qr(w, mode="r").R if len(w) > w.shape[1] else w
        cross = w @ covariance
        energy = max(0.0, float((cross * w).sum()))
        return Reconstruction(covariance[support][:, support], cross[:, support], energy, groups)

    def _weighted(self, reader: Reader) -> Tensor:
        """The weight as ``[groups, out / groups, row]``, each output scaled by its importance."""
        w = reader.matrices()
        scale = torch.ones(w.shape[0] * w.shape[1], dtype=w.dtype)
        if reader.norm is not None:
            norm: Any = self.deps.analysis.graph.get_submodule(reader.norm)
            scale = (norm.running_var + norm.eps).double().rsqrt()
            scale = scale if norm.weight is None else scale * norm.weight.detach().double().abs()
        if self.outputs_that_stay:
            scale = scale * torch.from_numpy(self._outputs_kept(reader))
        return w * scale.reshape(w.shape[0], w.shape[1], 1)

    def _outputs_kept(self, reader: Reader) -> Scores:
        block = reader.weight.type.touches((0,))
        out = np.ones(len(reader.weight.value))
        for b in block:
            if b.dims == (0,):
                out = self.kept[self.deps.channels.of[b.atoms]].astype(np.float64)
        return out


def entry_groups(entries: Atoms, channels: Atoms) -> Tensor:
    """Where each channel occurs among the entries: ``[channels, most]``, padded with -1."""
    order = np.argsort(channels)
    place = np.searchsorted(channels, entries, sorter=order).clip(max=len(channels) - 1)
    owner = order[place]
    found = np.flatnonzero(channels[owner] == entries)
    owner = owner[found]
    ranks = np.argsort(owner, kind="stable")
    counts = np.bincount(owner, minlength=len(channels))
    column = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    out = np.full((len(channels), max(int(counts.max(initial=0)), 1)), -1, dtype=np.int64)
    out[owner[ranks], column] = found[ranks]
    return torch.from_numpy(out)


def by_elimination(selection: Selection, group: Group, share: float) -> Scores:
    """Channels that go later score higher."""
    return _ranked(selection, group, lambda problems, width: backward_elimination(problems).order)


def by_addition(selection: Selection, group: Group, share: float) -> Scores:
    """Channels that come earlier score higher."""
    return _ranked(
        selection, group, lambda problems, width: forward_selection(problems, width).flip(0)
    )


def _ranked(
    selection: Selection, group: Group, order: Callable[[list[Reconstruction], int], Tensor]
) -> Scores:
    scores: Scores = np.zeros(selection.deps.channels.count)
    for channels in _by_space(selection.deps, group):
        problems = selection.problems(channels)
        ranks = order(problems, len(channels)).cpu().numpy()
        scores[channels[ranks]] = np.arange(len(ranks))
    return scores


def by_lasso(selection: Selection, group: Group, share: float) -> Scores:
    """Channels of the support at the wanted width, by the norms of their coefficients."""
    scores: Scores = np.zeros(selection.deps.channels.count)
    for channels in _by_space(selection.deps, group):
        problem = stacked(selection.problems(channels))
        width = max(1, round(share * len(channels)))
        support = support_of_width(problem, width).cpu().numpy()
        scores[channels] = support
    return scores


def stacked(problems: list[Reconstruction]) -> Reconstruction:
    """Several problems as one: each relative to its energy, their coefficients side by side."""
    if len(problems) == 1:
        return problems[0]
    start, groups = 0, []
    for p in problems:
        groups.append(torch.where(p.groups >= 0, p.groups + start, -1))
        start += len(p.r)
    scale = [1 / max(p.energy, 1e-300) for p in problems]
    r = torch.block_diag(*(p.r * s for p, s in zip(problems, scale, strict=True)))
    ryx = torch.block_diag(*(p.ryx * s for p, s in zip(problems, scale, strict=True)))
    return Reconstruction(r, ryx, float(len(problems)), torch.cat(groups, dim=1))


def _by_space(deps: Dependencies, group: Group) -> list[Atoms]:
    channels = group.channels
    space = deps.space_of[channels]
    return [channels[space == s] for s in np.unique(space)]


METHODS: dict[str, Callable[[Selection, Group, float], Scores]] = {
    "backward": by_elimination,
    "forward": by_addition,
    "lasso": by_lasso,
}
