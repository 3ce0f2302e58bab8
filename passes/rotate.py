"""Rotate: fewer channels by a change of basis, where only linear maps write and read them.

The edit of each space is (E, D): producers get E W, consumers W D, with E spanning the directions
that matter most to what the consumers compute. It needs a linear edge (``fxsvd.rotating.edges``),
since no nonlinearity commutes with a change of basis. ``Fold`` before it makes more edges linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fxsvd.calibrate import Positions
from fxsvd.coupling import Group
from fxsvd.data.batches import Data, batches
from fxsvd.data.moments import Moment
from fxsvd.data.readers import Reader
from fxsvd.dependency import Dependencies
from fxsvd.edits import Assign, Plan
from fxsvd.errors import PlanError
from fxsvd.importance import Scores, require_numbers
from fxsvd.naming import Names
from fxsvd.progress import Say, quiet
from fxsvd.rewrite import rewrite
from fxsvd.rotating.bases import Basis, best_basis, input_moments, new_values, refitted
from fxsvd.rotating.edges import Edge, is_layer, linear_edges
from fxsvd.selecting.fit import Fit, Mask
from fxsvd.verify import verify_rewrite
from fxsvd.widths import (
    Ratio,
    anything,
    as_plan,
    lose_share,
    require_multiple,
    require_ratio,
    wanted_ratios,
)

Bases = list[tuple[Edge, Basis]]
WHY = "in the new basis"


@dataclass(frozen=True)
class Rotate:
    """Project every space between linear maps onto the directions that its readers need.

    Attributes:
        ratio: the fraction of channels removed, in [0, 1); or a mapping from name patterns to
            fractions (the first that matches a producer counts, other spaces stay). With 0 a space
            is rotated and keeps its width: nothing is lost, and its channels come in the order of
            their importance.
        metric: what an error is: ``"outputs"``, of the consumers, each relative to its variance;
            ``"values"``, of the space's own values (principal components).
        round_to: widths become multiples of this.
        only: names, glob patterns or modules; a space is meant by any of its producers.
        ignore: likewise, spaces that stay.
        positions: rows per sample for the statistics, see ``fxsvd.calibrate``.
        seed: of the choice of rows.

    Raises:
        PlanError: an option is out of range.

    >>> Rotate(ratio=0.25).metric
    'outputs'
    """

    ratio: Ratio = 0.5
    metric: Literal["outputs", "values"] = "outputs"
    round_to: int = 1
    only: Names = ()
    ignore: Names = ()
    positions: Positions = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        require_ratio(self.ratio)
        require_multiple(self.round_to)
        if self.metric not in ("outputs", "values"):
            raise PlanError(f"metric is 'outputs' or 'values', not {self.metric!r}")

    def propose(self, deps: Dependencies, data: Data = None, say: Say = quiet) -> Plan:
        """The plan; nothing is touched.

        Args:
            deps: what ``fxsvd.analyze`` found.
            data: batches of inputs, read once.
            say: is told how far it is.

        Raises:
            PlanError: there is no data, or a name means nothing.
            VerificationError: a change of basis changes the network's output: an edge is not
                linear after all.
        """
        if data is None:
            raise PlanError("Rotate looks at activations: give compile(…, data=batches)")
        require_numbers(deps)
        edges, kept, why = self._choose(deps)
        plan = as_plan(deps, kept, why, "rotated, with all its channels")
        if not edges:
            return plan
        found: dict[str, Reader] = {r.layer: r for e in edges for r in e.consumers}
        moments = input_moments(
            deps, found.values(), data, positions=self.positions, seed=self.seed, say=say
        )
        bases = [
            (edge, self._basis(edge, block, int(kept[block].sum()), moments))
            for edge in edges
            for block in edge.blocks
        ]
        _require_linear(deps, bases, moments, data)
        fits = _fits(found, bases, moments)
        values = new_values(deps, bases, fits)
        written = {r.layer for e in edges for r in e.producers}
        return replace(
            plan,
            values=tuple(Assign(name, value, WHY, turned=True) for name, value in values.items()),
            estimates=tuple(
                f.estimate("rotate")
                for f in fits
                if plan.edits and is_layer(f.reader) and f.reader.layer not in written
            ),
            exact=not plan.edits,
        )

    def _basis(
        self, edge: Edge, block: np.ndarray, rank: int, moments: Mapping[str, Moment]
    ) -> Basis:
        return best_basis(edge, block, rank, moments, by_outputs=self.metric == "outputs")

    def _choose(self, deps: Dependencies) -> tuple[list[Edge], Mask, dict[int, str]]:
        """The edges to be rotated, which of their (new) channels stay, and why others do not."""
        edges, reasons = linear_edges(deps)
        _, unwanted = wanted_ratios(deps, anything(self.ratio), self.only, self.ignore)
        ratios, _ = wanted_ratios(deps, self.ratio, self.only, self.ignore)
        numbers = {space.name: i for i, space in enumerate(deps.spaces)}
        why = {numbers[name]: reason for name, reason in reasons.items()} | unwanted
        kept = np.ones(deps.channels.count, dtype=bool)
        group_of = {int(c): g for g in deps.groups for c in g.channels}
        chosen = []
        for edge in edges:
            i = numbers[edge.space.name]
            group = group_of[int(edge.space.channels[0])]
            if i in why:
                continue
            if ratios[i] > 0 and (tied := _tied(deps, edge, group)):
                why[i] = tied
                continue
            chosen.append(edge)
            if ratios[i] > 0:
                self._drop(deps, edge, group, float(ratios[i]), kept)
        return chosen, kept, why

    def _drop(self, deps: Dependencies, edge: Edge, group: Group, ratio: float, kept: Mask) -> None:
        """Of every block the last channels go: equally many, so that all stay equally wide."""
        scores: Scores = np.zeros(deps.channels.count)
        for block in edge.blocks:
            scores[block] = np.arange(len(block), 0, -1) / len(block)
        lose_share(deps, kept, group, scores, ratio, self.round_to)


def _tied(deps: Dependencies, edge: Edge, group: Group) -> str:
    """Why an edge cannot be narrowed by itself."""
    others = np.unique(deps.space_of[group.channels])
    if len(others) > 1:
        names = [deps.spaces[i].name for i in others if deps.spaces[i] is not edge.space]
        return f"its width is tied to that of {', '.join(names)}: {group.why}"
    inside = [{len(np.intersect1d(c.channels, b)) for b in edge.blocks} for c in group.cells]
    whole = all(sizes <= {0, len(edge.blocks[0])} for sizes in inside)
    return "" if whole else f"its parts are not those that can be mixed: {group.why}"


def _fits(found: Mapping[str, Reader], bases: Bases, moments: Mapping[str, Moment]) -> list[Fit]:
    """Every consumer, fitted to the new coordinates of all edges that it reads."""
    return [
        refitted(reader, [b for e, b in bases if reader in e.consumers], moments[name])
        for name, reader in found.items()
    ]


def _require_linear(
    deps: Dependencies, bases: Bases, moments: Mapping[str, Moment], data: Data
) -> None:
    """Check the edges themselves: in full width a change of basis changes no output."""
    assert data is not None  # checked
    full = [
        (edge, replace(basis, decode=basis.encode.T, rank=len(basis.channels)))
        for edge, basis in bases
    ]
    found = {r.layer: r for e, _ in full for r in e.consumers}
    values = new_values(deps, full, _fits(found, full, moments))
    plan = Plan(values=tuple(Assign(n, v, WHY) for n, v in values.items()), exact=True)
    args, kwargs = next(iter(batches(data, deps.analysis.graph)))
    verify_rewrite(deps, plan, rewrite(deps, plan), kwargs or args)
