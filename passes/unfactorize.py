"""Unfactorize: layers that were factorised, or stand in a row like that, become one again.

Two factors of rank k cost k(m + n) numbers and the layer they make m·n: after training, pruning or
a choice of too high a rank the one layer may be the smaller, or the faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

from fxsvd.data.batches import Data
from fxsvd.dependency import Dependencies
from fxsvd.edits import Left, Plan, Substitute
from fxsvd.folding.composing import composed, obstacle, partition, runs
from fxsvd.folding.picking import chosen_layers
from fxsvd.folding.plain import plain_layers
from fxsvd.importance import require_numbers
from fxsvd.naming import Names
from fxsvd.progress import Say, quiet


@dataclass(frozen=True)
class Unfactorize:
    """Merge linear maps that have nothing between them, exactly.

    Attributes:
        only: names, glob patterns or modules; ``"fc1"`` means all that ``Factorize`` made of it.
        ignore: likewise, what stays.
        always: also where one layer holds more numbers than its factors.

    >>> Unfactorize().always
    False
    """

    only: Names = ()
    ignore: Names = ()
    always: bool = False

    def propose(self, deps: Dependencies, data: Data = None, say: Say = quiet) -> Plan:
        """The plan; nothing is touched.

        Args:
            deps: what ``fxsvd.analyze`` found.
            data: not needed.
            say: not needed.

        Raises:
            PlanError: a name means nothing.
        """
        require_numbers(deps)
        graph = deps.analysis.graph
        plain, odd = plain_layers(deps, last=True)
        stays = chosen_layers(graph, [*plain, *odd], self.only, self.ignore)
        substitutes: list[Substitute] = []
        left = []
        for run in runs(graph, {n: r for n, r in plain.items() if n not in stays}):
            modules = [plain[n].module for n in run.layers]
            for part in partition(modules, always=self.always):
                layers = run.layers[part.start : part.stop]
                if len(layers) == 1:
                    left.append(Left(layers[0], obstacle(modules) or "merged it would be larger"))
                    continue
                *first, last = layers
                between = chain.from_iterable(run.between[part.start : part.stop - 1])
                substitutes += [Substitute(n, (), f"merged into {last}") for n in first]
                substitutes += [Substitute(n, (), "does nothing") for n in between]
                made = composed([plain[n].module for n in layers])
                substitutes.append(Substitute(last, (made,), f"merged with {', '.join(first)}"))
        left += [Left(n, why) for n, why in stays.items()]
        return Plan(substitutes=tuple(substitutes), exact=True, left=tuple(left))
