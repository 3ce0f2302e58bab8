"""Factorize: a layer y = W x + b becomes y = A (B x) + b, of a rank that saves parameters.

With data the default is the best there is: B picks the principal outputs, A puts them back
(``fxsvd.factoring.maps``); what is lost is the tail of their spectrum, exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import fx

from fxsvd.calibrate import Positions
from fxsvd.data.batches import Data
from fxsvd.data.readers import Reader
from fxsvd.dependency import Dependencies
from fxsvd.edits import Estimate, Left, Plan, Substitute
from fxsvd.errors import PlanError
from fxsvd.factoring.candidates import Candidate
from fxsvd.factoring.goals import Goal
from fxsvd.factoring.maps import METHODS
from fxsvd.factoring.splitting import KINDS, Shape
from fxsvd.factoring.trials import Trials
from fxsvd.folding.picking import chosen_layers, value_by_layer
from fxsvd.folding.plain import plain_layers
from fxsvd.importance import require_numbers
from fxsvd.naming import Names, listed
from fxsvd.progress import Say, quiet

Number = float | Mapping[str, float]
_GOALS: tuple[Literal["cr", "rank", "energy", "error"], ...] = ("cr", "rank", "energy", "error")


@dataclass(frozen=True)
class Factorize:
    """Replace linear layers and convolutions by two or more smaller ones.

    Give one of ``cr``, ``rank``, ``energy`` and ``error``: a number, or a mapping from name
    patterns to numbers (the first that matches a layer counts, other layers stay).

    Attributes:
        cr: the compression ratio of each layer's weight, 1 or more.
        rank: channels between the two parts.
        energy: the share of Σσ² that stays, above 0 and up to 1.
        error: the share of its outputs' variance that a layer may lose, from 0 to below 1, as in
            ``Select``; what the network's own number type does not resolve counts as none.
        method: ``"svd"``; ``"gradient"``, the SVD weighted by what the loss is sensitive to (needs
            ``loss`` and ``data``); or a CUR, which keeps some rows of the weight:
            ``"linear-time"``, ``"leverage-score"`` (both drawn), ``"deim"``, ``"leverage"``,
            ``"qr"``.
        kernel: how a convolution is split: ``"channel"`` (k×k, 1×1), ``"spatial"`` (k×1, 1×k),
            ``"tucker"`` (1×1, k×k, 1×1), ``"cp"`` (1×1, two depthwise, 1×1), or ``"auto"``: with
            ``cr`` whatever loses least of the first three, else ``"channel"``.
        split: ``"source"`` puts the singular values into the first part, ``"balanced"`` shares
            them out, which trains better.
        chaining: ``"parallel"``: every layer is fitted to the inputs that the original gives it;
            ``"top-down"``: to those that the factorised network gives it, layer by layer, at the
            same ranks (only ``"svd"`` by channel, on data; all batches are held).
        last: also the network's last layers.
        data_aware: fit to data. None: where data is given. False: by the weights alone.
        rounding: of the rank that ``cr`` gives: ``"down"`` keeps the promise, ``"up"`` is what the
            reported experiment on VGG-11 did.
        only: names, glob patterns or modules.
        ignore: likewise, layers that stay.
        loss: for ``"gradient"``: ``loss(output, target)``.
        data: for ``"gradient"``: batches ``(inputs, target)``.
        positions: rows per sample that are looked at: a number, ``"all"``, or ``"auto"``, all but
            where a layer has very many.
        seed: of all that is drawn.
        known: a dictionary that keeps decompositions: give the same one to try further ranks and
            methods on the same network, data and loss.

    Raises:
        PlanError: an option is out of range.

    >>> Factorize(cr=4).method
    'svd'
    """

    cr: Number | None = None
    rank: int | Mapping[str, int] | None = None
    energy: Number | None = None
    error: Number | None = None
    method: str = "svd"
    kernel: Literal["auto", "channel", "spatial", "tucker", "cp"] = "auto"
    split: Literal["source", "balanced"] = "source"
    chaining: Literal["parallel", "top-down"] = "parallel"
    last: bool = False
    data_aware: bool | None = None
    rounding: Literal["down", "up"] = "down"
    only: Names = ()
    ignore: Names = ()
    loss: Any = None
    data: Iterable[Any] | None = field(default=None, compare=False)
    positions: Positions = "auto"
    seed: int = 0
    known: dict[Any, Any] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        given = [name for name in _GOALS if getattr(self, name) is not None]
        if len(given) != 1:
            raise PlanError(f"give exactly one of {', '.join(_GOALS)}; got {given or 'none'}")
        numbers = self._number
        for value in numbers.values() if isinstance(numbers, Mapping) else (numbers,):
            _require(given[0], value)
        choices = {
            "method": METHODS,
            "kernel": ("auto", *KINDS),
            "split": ("source", "balanced"),
            "chaining": ("parallel", "top-down"),
            "rounding": ("down", "up"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise PlanError(f"there is no {name} {getattr(self, name)!r}; there are {known}")
        self._require_agreement()

    def _require_agreement(self) -> None:
        if self.method != "svd" and self.kernel not in ("auto", "channel"):
            raise PlanError(f"method={self.method!r} splits by channel: leave kernel at 'auto'")
        if self.kernel == "cp" and self._goal in ("energy", "error"):
            raise PlanError("CP has no spectrum to choose a rank by: give cr or rank")
        if self.method == "gradient" and (self.loss is None or self.data is None):
            raise PlanError(
                "method='gradient' needs loss=(output, target) -> scalar and "
                "data=batches of (inputs, target)"
            )
        if self.method == "gradient" and self.data_aware is False:
            raise PlanError("method='gradient' fits to data: leave data_aware out")
        if self.chaining == "top-down" and self.method != "svd":
            raise PlanError(f"method={self.method!r} fits layers by themselves: leave chaining out")
        if self.chaining == "top-down" and self.kernel not in ("auto", "channel"):
            raise PlanError("chaining='top-down' splits by channel: leave kernel at 'auto'")

    @property
    def _goal(self) -> Literal["cr", "rank", "energy", "error"]:
        return next(name for name in _GOALS if getattr(self, name) is not None)

    @property
    def _number(self) -> Any:
        return getattr(self, self._goal)

    def propose(self, deps: Dependencies, data: Data = None, say: Say = quiet) -> Plan:
        """The plan; nothing is touched.

        Args:
            deps: what ``fxsvd.analyze`` found.
            data: batches of inputs, read once for splits by channel, and twice for others and
                top-down.
            say: is told how far it is.

        Raises:
            PlanError: a name means nothing, a rank is above what a layer has, or data is missing.
        """
        require_numbers(deps)
        batches = data if data is not None else self.data
        if self.chaining == "top-down" and (batches is None or self.data_aware is False):
            raise PlanError(
                "chaining='top-down' fits to activations: give compile(…, data=batches), and leave "
                "data_aware out"
            )
        if self.data_aware and batches is None:
            raise PlanError("data_aware=True fits to activations: give compile(…, data=batches)")
        graph = deps.analysis.graph
        found, left = plain_layers(deps, last=self.last)
        every = [*found, *left]
        left |= chosen_layers(graph, every, self.only, self.ignore)
        numbers = value_by_layer(graph, every, self._number)
        left = {n: "no pattern matches it" for n in found if n not in numbers} | left
        wanted = {n: r for n, r in found.items() if n not in left}
        goals = self._goals(wanted, {n: numbers[n] for n in wanted})
        trials = self._trials(graph, goals, batches is not None, say)
        chosen = trials.run(wanted, batches)
        left |= trials.left
        return Plan(
            substitutes=tuple(map(_substitute, chosen)),
            estimates=tuple(
                Estimate(c.reader.layer, "factorize", c.predicted)
                for c in chosen
                if c.predicted is not None
            ),
            left=tuple(Left(n, left[n]) for n in dict.fromkeys([*every, *left]) if n in left),
        )

    def _goals(self, wanted: Mapping[str, Reader], numbers: Mapping[str, float]) -> dict[str, Goal]:
        """A rank is asked of layers by name, or of some layer at least."""
        strict = isinstance(self._number, Mapping) or bool(listed(self.only))
        if self._goal == "rank" and not strict:
            most = [
                max(map(Shape.of(r.module).most, Shape.of(r.module).kinds)) for r in wanted.values()
            ]
            strict = bool(most) and max(most) < self._number
        return {n: Goal(self._goal, v, strict, self.rounding) for n, v in numbers.items()}

    def _trials(
        self, graph: fx.GraphModule, goals: Mapping[str, Goal], data: bool, say: Say
    ) -> Trials:
        return Trials(
            graph=graph,
            goals=goals,
            on_data=data and self.data_aware is not False,
            method=self.method,
            kernel=self.kernel,
            balanced=self.split == "balanced",
            top_down=self.chaining == "top-down",
            loss=self.loss,
            labelled=self.data,
            positions=self.positions,
            seed=self.seed,
            known={} if self.known is None else self.known,
            say=say,
        )


def _substitute(chosen: Candidate) -> Substitute:
    rank = "×".join(map(str, chosen.rank))
    how = "" if chosen.kind == "channel" else f" ({chosen.kind})"
    return Substitute(chosen.reader.layer, chosen.parts(), f"factorized to rank {rank}{how}")


def _require(goal: str, value: Any) -> None:
    good = {
        "cr": lambda v: v >= 1,
        "rank": lambda v: v == int(v) and v >= 1,
        "energy": lambda v: 0 < v <= 1,
        "error": lambda v: 0 <= v < 1,
    }
    says = {
        "cr": "is how many times smaller a layer gets, 1 or more",
        "rank": "is a whole number of channels, 1 or more",
        "energy": "is the share that stays, above 0 and up to 1",
        "error": "is relative, from 0 to below 1",
    }
    if not good[goal](value):
        raise PlanError(f"{goal} {says[goal]}; got {value}")
