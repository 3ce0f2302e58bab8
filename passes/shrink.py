"""Shrink: keep the rows that span a layer's weight, let the next layer absorb the rest; no data.

With A the weights that write a space, one row per channel, and K the kept rows, the next layer
takes W T with T = A A_K⁺, so that T A_K ≈ A. Kept rows are exact, and a selector commutes with
everything that acts per channel. That is the resize of SVD-evolutive networks with two corrections:
the source keeps the first r rows of the rank-r approximation, and has T = [I; U_r'r U_rrᵀ], where
U_rr⁻¹ belongs; here K comes from pivoted QR, which keeps A_K well conditioned.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxsvd.data.batches import Data
from fxsvd.data.readers import Reader, readers
from fxsvd.dependency import Dependencies
from fxsvd.edits import Assign, Plan
from fxsvd.importance import Scores, require_numbers
from fxsvd.linalg.interpolation import fit_rows, pivoted_qr
from fxsvd.naming import Names
from fxsvd.progress import Say, quiet
from fxsvd.rotating.bases import mixed
from fxsvd.rotating.edges import places, stand_evenly
from fxsvd.selecting.fit import Mask
from fxsvd.spaces import Space
from fxsvd.widths import (
    Ratio,
    as_plan,
    lose_share,
    require_multiple,
    require_ratio,
    wanted_ratios,
)

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Shrink:
    """Drop the rows of weights that are nearly combinations of others, and add these up behind.

    Attributes:
        ratio: the fraction of channels removed, in [0, 1); or a mapping from name patterns to
            fractions (the first that matches a producer counts, other spaces stay).
        round_to: widths become multiples of this.
        only: names, glob patterns or modules; a space is meant by any of its producers.
        ignore: likewise, spaces that stay.

    Raises:
        PlanError: an option is out of range.

    >>> Shrink(ratio=0.25).round_to
    1
    """

    ratio: Ratio = 0.5
    round_to: int = 1
    only: Names = ()
    ignore: Names = ()

    def __post_init__(self) -> None:
        require_ratio(self.ratio)
        require_multiple(self.round_to)

    def propose(self, deps: Dependencies, data: Data = None, say: Say = quiet) -> Plan:
        """The plan; nothing is touched.

        Args:
            deps: what ``fxsvd.analyze`` found.
            data: not needed.
            say: not needed.

        Raises:
            PlanError: a name means nothing, or a weight is not finite.
        """
        require_numbers(deps)
        ratios, why = wanted_ratios(deps, self.ratio, self.only, self.ignore)
        kept = np.ones(deps.channels.count, dtype=bool)
        values: Values = {}
        sides = {i: _Sides.of(deps, s) for i, s in enumerate(deps.spaces) if not s.frozen}
        why |= {i: side for i, side in sides.items() if isinstance(side, str) and i not in why}
        for group in deps.groups:
            numbers = sorted({int(i) for i in deps.space_of[group.channels]})
            both = [sides[i] for i in numbers if i not in why]
            found = [side for side in both if isinstance(side, _Sides)]
            if len(found) < len(numbers) or ratios[numbers].min() == 0:
                continue
            scores: Scores = np.zeros(deps.channels.count)
            for side in found:
                side.score(deps, values, scores)
            ratio = float(ratios[numbers].min())
            lose_share(deps, kept, group, scores, ratio, self.round_to)
            for side in found:
                side.absorb(deps, values, kept)
        plan = as_plan(deps, kept, why, "rounding or coupling leaves nothing to remove")
        spans = "takes over the channels that go, by the weights"
        return replace(plan, values=tuple(Assign(n, v, spans) for n, v in values.items()))


@dataclass(frozen=True, eq=False)
class _Sides:
    """The layers that write a space, and those that read it."""

    space: Space
    writers: tuple[Reader, ...]
    behind: tuple[Reader, ...]

    @classmethod
    def of(cls, deps: Dependencies, space: Space) -> _Sides | str:
        """Both sides, or why they are not known well enough."""
        plain = {r.weight.names[0]: r for r in readers(deps).values() if r.groups == 1}
        writers = tuple(plain[s.tensor] for s in space.producers if s.tensor in plain)
        behind = tuple(plain[s.tensor] for s in space.consumers if s.tensor in plain)
        if not behind or len(writers) + len(behind) < len(space.producers + space.consumers):
            return "it is not between plain linear layers or convolutions alone"
        for site in (*space.producers, *space.consumers):
            if not stand_evenly(deps.channels.of[site.atoms].ravel(), space.channels):
                return f"some of its channels stand more often in `{site.tensor}` than others"
        for site in space.followers:
            owner = site.tensor.rpartition(".")[0]
            if owner not in {r.layer for r in writers} | {r.norm for r in writers}:
                return f"`{site.tensor}` holds a number for each channel"
        return cls(space, writers, behind)

    def score(self, deps: Dependencies, values: Values, scores: Scores) -> None:
        """Rows that pivoted QR takes earlier score higher."""
        rows = self._rows(deps, values)
        order = pivoted_qr(rows.T, len(rows))[0].cpu().numpy()
        rest = np.setdiff1d(np.arange(len(rows)), order)  # rows that the others span
        order = np.concatenate([order, rest])
        scores[self.space.channels[order]] = np.arange(len(rows), 0, -1) / len(rows)

    def absorb(self, deps: Dependencies, values: Values, kept: Mask) -> None:
        """Give the layers behind W T, and a bias b' that minimises ‖T b' − b‖ to those before."""
        stays = torch.from_numpy(kept[self.space.channels])
        if bool(stays.all()):
            return
        rows = self._rows(deps, values).cpu()
        t = torch.zeros(len(rows), len(rows), dtype=torch.float64)
        t[:, stays] = fit_rows(rows, rows[stays])
        t[stays] = torch.eye(len(rows), dtype=torch.float64)[stays]
        for reader in self.behind:
            name = reader.weight.names[0]
            w = _value(deps, values, name)
            flat = w.reshape(len(w), -1)
            where = places(reader.entries()[0], self.space.channels).to(w.device)
            values[name] = mixed(flat, 1, where, t.T.to(w.device)).reshape(w.shape)
        self._shift(deps, values, t, stays)

    def _rows(self, deps: Dependencies, values: Values) -> Tensor:
        """The weights that write the space side by side, ``[channels, all that they read]``."""
        parts = []
        for writer in self.writers:
            w = _value(deps, values, writer.weight.names[0])
            where = self._places(deps, writer).to(w.device)
            part = w.reshape(len(w), -1)[where].flatten(1)
            parts.append(part * _scale(deps, writer, where))
        return torch.cat(parts, dim=1)

    def _places(self, deps: Dependencies, writer: Reader) -> Tensor:
        atoms = writer.weight.type.vector(0)
        assert atoms is not None  # a layer of one group
        return places(deps.channels.of[atoms], self.space.channels)

    def _shift(self, deps: Dependencies, values: Values, t: Tensor, stays: Tensor) -> None:
        """The first bias that there is takes the difference."""
        found = [(w, name) for w in self.writers if (name := _bias(deps, w))]
        if not found:
            return
        total = sum(
            (_offset(deps, values, w, name)[self._places(deps, w)[:, 0]] for w, name in found),
            start=torch.zeros(len(t), dtype=torch.float64),
        )
        best = torch.linalg.lstsq(t[:, stays], total.unsqueeze(1)).solution[:, 0]
        writer, name = found[0]
        value = _value(deps, values, name).clone()
        where = self._places(deps, writer)[stays].to(value.device)
        value[where] += (best - total[stays]).unsqueeze(1).to(value.device)
        values[name] = value


def _value(deps: Dependencies, values: Values, name: str) -> Tensor:
    known = values.get(name)
    return deps.analysis.by_name(name).value.detach().double() if known is None else known


def _scale(deps: Dependencies, writer: Reader, where: Tensor) -> Tensor | float:
    """What the batch norm behind a layer multiplies its rows by."""
    if writer.norm is None:
        return 1.0
    norm: Any = deps.analysis.graph.get_submodule(writer.norm)
    scale = (norm.running_var + norm.eps).double().rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.detach().double()
    return torch.as_tensor(scale[where[:, :1]])


def _bias(deps: Dependencies, writer: Reader) -> str:
    """The name of what adds to a layer's output last: its norm's bias, or its own."""
    name = f"{writer.layer if writer.norm is None else writer.norm}.bias"
    names = {p.names[0] for p in deps.analysis.parameters.values()}
    return name if name in names else ""


def _offset(deps: Dependencies, values: Values, writer: Reader, name: str) -> Tensor:
    """What a layer and its norm add, all in all."""
    value = _value(deps, values, name).cpu()
    if writer.norm is None:
        return value
    norm: Any = deps.analysis.graph.get_submodule(writer.norm)
    mean = norm.running_mean.double()
    if writer.module.bias is not None:
        mean = mean - _value(deps, values, f"{writer.layer}.bias")
    every = torch.arange(len(mean))[:, None]
    scale = _scale(deps, writer, every)
    shift: Tensor = (mean * torch.as_tensor(scale).flatten()).cpu()
    return value - shift
