"""Trying splits of layers: candidates that a goal allows, fitted, and the best of each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxsvd.calibrate import Positions
from fxsvd.data.readers import Reader
from fxsvd.factoring.candidates import (
    Candidate,
    by_channel,
    by_kernel,
    data_metrics,
    refitted,
    weight_metrics,
)
from fxsvd.factoring.chained import chained
from fxsvd.factoring.goals import Goal
from fxsvd.factoring.maps import Metric, factored, steep
from fxsvd.factoring.outputs import Outputs, watch, watch_gradients
from fxsvd.factoring.slopes import Slopes
from fxsvd.factoring.splitting import Rank, Shape
from fxsvd.factoring.watching import output_watch, refit_watch
from fxsvd.progress import Say, quiet

COMPARED = ("channel", "spatial", "tucker")
ROUNDING = 8
"""In units of a number type's spacing: relative errors below this are none."""


@dataclass(frozen=True, eq=False)
class Trials:
    """The options of ``fxsvd.passes.Factorize``, at work on a network.

    Attributes:
        graph: the captured graph.
        goals: by layer.
        on_data: fit to data.
        known: decompositions by layer and metric.
        left: by layer, why it stays.
        method: see there, as the rest.
    """

    graph: fx.GraphModule
    goals: Mapping[str, Goal]
    on_data: bool
    method: str = "svd"
    kernel: str = "auto"
    balanced: bool = False
    top_down: bool = False
    loss: Any = None
    labelled: Iterable[Any] | None = None
    positions: Positions = "auto"
    seed: int = 0
    known: dict[Any, Any] = field(default_factory=dict)
    say: Say = quiet
    left: dict[str, str] = field(default_factory=dict)

    def run(self, wanted: Mapping[str, Reader], data: Iterable[Any] | None) -> list[Candidate]:
        """The best candidate of every layer that it pays to split; ``left`` says why the rest stay.

        Args:
            wanted: layers by path.
            data: batches of inputs, or None.

        Raises:
            PlanError: a rank is above what a layer has.
        """
        trying = {n: r for n, r in wanted.items() if self._kinds(r)}
        if data is not None:
            self._watch_outputs(trying, data)
        if self.method == "gradient":
            self._watch_gradients(trying)
        found: list[Candidate] = []
        for name, reader in trying.items():
            self.say(f"factorizing {name}")
            found += self._candidates(reader)
        if self.on_data and data is not None:
            found = self._refitted(found, data)
        best: dict[str, Candidate] = {}
        for candidate in found:
            layer = candidate.reader.layer
            if layer not in best or candidate.error < best[layer].error:
                best[layer] = candidate
        return list(self._chained(best, data).values())

    def _kinds(self, reader: Reader) -> list[str]:
        """How a layer may be split; where by nothing, ``left`` says why."""
        goal, shape = self.goals[reader.layer], Shape.of(reader.module)
        kinds = [self.kernel] if self.kernel in shape.kinds else ["channel"]
        any_kind = self.method == "svd" and not self.top_down
        if self.kernel == "auto" and goal.by == "cr" and any_kind:
            kinds = [k for k in COMPARED if k in shape.kinds]
        return [k for k in kinds if self._allowed(reader, k, goal.first(shape, k))]

    def _allowed(self, reader: Reader, kind: str, rank: Rank) -> bool:
        why = self.goals[reader.layer].refusal(reader, kind, rank)
        if why is None:
            self.left.pop(reader.layer, None)
        else:
            self.left.setdefault(reader.layer, why)
        return why is None

    # -------------------------------------------------------------------------------- candidates

    def _candidates(self, reader: Reader) -> list[Candidate]:
        kinds, goal, out = self._kinds(reader), self.goals[reader.layer], []
        for kind in kinds:
            metrics = self._metrics(reader) if kind == "channel" else []
            spacing = torch.finfo(reader.weight.value.dtype).eps if self.on_data else 0.0
            rank = goal.rank(reader, kind, metrics, ROUNDING * spacing)
            if not self._allowed(reader, kind, rank):
                continue
            if kind != "channel":
                out.append(by_kernel(reader, kind, rank, self.seed))
                continue
            out.append(self._by_channel(reader, rank[0], metrics, len(kinds) > 1))
        if out:
            self.left.pop(reader.layer, None)
        return out

    def _by_channel(
        self,
        reader: Reader,
        rank: int,
        metrics: list[Metric],
        compared: bool,
    ) -> Candidate:
        slopes = self._slopes(reader, metrics) if self.method == "gradient" else None
        maps = [
            factored(
                w,
                metric,
                rank,
                method=self.method,
                slopes=None if slopes is None else slopes[g],
                seed=self.seed + g,
                on_data=self.on_data,
            )
            for g, (w, metric) in enumerate(zip(reader.matrices(), metrics, strict=True))
        ]
        maps = [m.balanced() for m in maps] if self.balanced else maps
        seen: Outputs | None = self.known.get((reader.layer, "outputs"))
        if self.on_data:
            assert seen is not None  # watched
            return by_channel(reader, maps, metrics, seen.mean)
        found = by_channel(reader, maps, metrics if compared else None, None)
        if seen is None:
            return found
        return replace(found, predicted=by_channel(reader, maps, data_metrics(seen), None).error)

    def _metrics(self, reader: Reader) -> list[Metric]:
        key = (reader.layer, "data" if self.on_data else "weight")
        if key not in self.known:
            seen: Any = self.known.get((reader.layer, "outputs"))
            self.known[key] = data_metrics(seen) if self.on_data else weight_metrics(reader)
        found: list[Metric] = self.known[key]
        return found

    def _slopes(self, reader: Reader, metrics: list[Metric]) -> list[tuple[Slopes, Metric]]:
        key = (reader.layer, "slopes", self.loss)
        if isinstance(self.known[key], Tensor):
            pairs = zip(metrics, self.known[key], strict=True)
            self.known[key] = [steep(metric, Slopes.of(g)) for metric, g in pairs]
        found: list[tuple[Slopes, Metric]] = self.known[key]
        return found

    # ---------------------------------------------------------------------------- passes over data

    def _watch_outputs(self, trying: Mapping[str, Reader], data: Iterable[Any]) -> None:
        watches = {
            n: {"outputs": output_watch(r, self.positions, self.seed)}
            for n, r in trying.items()
            if (n, "outputs") not in self.known
        }
        if watches:
            self.known.update(watch(self.graph, data, watches, self.say))

    def _refitted(self, found: list[Candidate], data: Iterable[Any]) -> list[Candidate]:
        watches: dict[str, Any] = {}
        for c in found:
            if c.kind != "channel":
                named = watches.setdefault(c.reader.layer, {})
                named[c.kind] = refit_watch(c, self.positions, self.seed)
        if not watches:
            return found
        seen = watch(self.graph, data, watches, self.say)
        return [
            c if c.kind == "channel" else refitted(c, seen[c.reader.layer, c.kind]) for c in found
        ]

    def _chained(self, best: dict[str, Candidate], data: Any) -> dict[str, Candidate]:
        """One after the other, where that is wanted; of the ranks that they have."""
        if not self.top_down:
            return best
        options: dict[str, Any] = {"positions": self.positions, "seed": self.seed}
        return chained(self.graph, best, data, balanced=self.balanced, say=self.say, **options)

    def _watch_gradients(self, trying: Mapping[str, Reader]) -> None:
        assert self.labelled is not None  # the pass requires it
        missing = {n: r for n, r in trying.items() if (n, "slopes", self.loss) not in self.known}
        if missing:
            self.say("watching gradients")
            rows = {n: _all_rows(r) for n, r in missing.items()}
            found = watch_gradients(self.graph, self.labelled, rows, self.loss)
            self.known.update({(n, "slopes", self.loss): g for n, g in found.items()})


def _all_rows(reader: Reader) -> Callable[[Tensor], Tensor]:
    def rows(g: Tensor) -> Tensor:
        features = g if isinstance(reader.module, torch.nn.Linear) else g.movedim(1, -1)
        return features.reshape(-1, reader.groups, features.shape[-1] // reader.groups)

    return rows
