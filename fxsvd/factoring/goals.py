"""How far a layer is to be factorised, and the rank that this comes to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fxsvd.data.readers import Reader
from fxsvd.errors import PlanError
from fxsvd.factoring.maps import Metric
from fxsvd.factoring.splitting import Rank, Shape, for_share
from fxsvd.linalg.svd import rank_for_energy, rank_for_error


@dataclass(frozen=True)
class Goal:
    """How far one layer goes.

    Attributes:
        by: what the number is, see ``fxsvd.passes.Factorize``.
        number: a ratio, a rank, a share or an error.
        strict: a rank above what the layer has is a mistake, not a reason to leave it.
        rounding: of the rank that a ratio gives.

    >>> Goal("cr", 150).first(Shape(4096, 25088), "channel")
    (23,)
    """

    by: Literal["cr", "rank", "energy", "error"]
    number: float
    strict: bool = False
    rounding: Literal["down", "up"] = "down"

    def first(self, shape: Shape, kind: str) -> Rank:
        """The rank where no spectrum is needed for it; else the least that the spectrum may ask."""
        if self.by == "cr":
            return shape.for_ratio(kind, self.number, self.rounding)
        return shape.rank(kind, int(self.number) if self.by == "rank" else 1)

    def rank(self, reader: Reader, kind: str, metrics: Sequence[Metric], spacing: float) -> Rank:
        """The rank for a layer.

        Args:
            reader: the layer.
            kind: of the split.
            metrics: one per group, for splits by channel.
            spacing: relative errors below this are none: the network's own rounding.
        """
        if self.by in ("cr", "rank"):
            return self.first(Shape.of(reader.module), kind)
        if kind == "channel":
            return (max(self._of(m.spectrum, spacing) for m in metrics),)
        weight = reader.weight.value.detach()
        groups = weight.reshape(reader.groups, -1, *weight.shape[1:])
        of: Literal["energy", "error"] = "energy" if self.by == "energy" else "error"
        ranks = [for_share(kind, w, self._share, of=of) for w in groups]
        return tuple(max(side) for side in zip(*ranks, strict=True))

    @property
    def _share(self) -> float:
        """An error as a ratio of norms, as the spectra's functions take it."""
        return math.sqrt(self.number) if self.by == "error" else self.number

    def _of(self, spectrum: Tensor, spacing: float) -> int:
        if self.by == "error":
            return rank_for_error(spectrum, max(self._share, spacing))
        return rank_for_energy(spectrum, min(self.number, 1 - spacing**2))

    def refusal(self, reader: Reader, kind: str, rank: Rank) -> str | None:
        """Why a layer is not split like that, if so.

        Raises:
            PlanError: the goal is strict, and the rank above what there is.
        """
        shape = Shape.of(reader.module)
        most = shape.most(kind)
        if self.by == "rank" and rank[0] > most:
            if self.strict:
                raise PlanError(
                    f"rank {rank[0]} is above the {most} that {reader.layer} can have: ask for "
                    "less, or give ranks by layer, rank={'NAME': …}"
                )
            return f"rank {rank[0]} is above the {most} that it can have"
        if shape.size(kind, rank) < shape.numbers:
            return None
        shown = "×".join(map(str, rank))
        return f"at rank {shown} its parts would hold as many numbers as the layer"
