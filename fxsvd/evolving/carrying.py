"""An optimizer goes on with the parameters of a resized network.

What an optimizer remembers of a parameter (momentum, Adam's moments) has its shape and is resized
with it. Where channels are only kept, that is exact: a kept column multiplies the activation that
it did, so its gradient is what it was. A copy inherits second moments, lest its first step be a
leap, and starts without momentum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from fxsvd.analysis import Parameter
from fxsvd.dependency import Dependencies
from fxsvd.edits import Plan
from fxsvd.errors import FxsvdError
from fxsvd.widening import Resizing, Widening, resizing

POWERS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf", "acc_delta")
"""What optimizers of torch call running means, sums and maxima of squares or magnitudes."""


def require_owner(optimizer: Optimizer, graph: nn.Module) -> None:
    """Raise unless the optimizer trains parameters of the network, and those alone.

    Raises:
        FxsvdError: it has parameters that are not the network's, or none of them.
    """
    own = {id(p) for p in graph.parameters()}
    given = [p for group in optimizer.param_groups for p in group["params"]]
    strangers = sum(id(p) not in own for p in given)
    if strangers or not given:
        raise FxsvdError(
            f"{strangers or 'all'} of the optimizer's {len(given)} parameters are not this "
            "network's: make the optimizer from the parameters of the model that is given here"
        )


def carry(
    optimizer: Optimizer, deps: Dependencies, plan: Plan, old: fx.GraphModule, new: fx.GraphModule
) -> None:
    """Let an optimizer train the parameters of a rewritten network in place of the old ones.

    Options of parameter groups, and so schedulers, stay. Factors that take the place of a weight
    join its group and start without a state.

    Args:
        optimizer: of the old network; changed in place.
        deps: the analysis of the old network.
        plan: what was done, one stage.
        old: the network before.
        new: the network after.
    """
    how = resizing(deps, plan)
    known = {name: p for p in deps.analysis.parameters.values() for name in p.names}
    successors, after = _names(old), dict(new.named_parameters(remove_duplicate=False))
    taken = {id(after[name]) for name in successors.values() if name in after}
    for group in optimizer.param_groups:
        params: list[Any] = []
        for parameter in group["params"]:
            name = successors[id(parameter)]
            state = optimizer.state.pop(parameter, None)
            if name in after:
                params.append(after[name])
                if state:
                    optimizer.state[after[name]] = _carried(state, parameter, known.get(name), how)
            else:
                params += _factors(name, after, taken)
        group["params"] = params


def _names(graph: fx.GraphModule) -> dict[int, str]:
    """By identity, the first name of each parameter."""
    return {id(p): name for name, p in graph.named_parameters()}


def _factors(gone: str, after: Mapping[str, nn.Parameter], taken: set[int]) -> list[nn.Parameter]:
    """What stands in the place of a layer's parameter that is gone, if nothing else took it."""
    layer = gone.rpartition(".")[0]
    found = [p for n, p in after.items() if n.startswith(f"{layer}.") and id(p) not in taken]
    taken.update(map(id, found))
    return found


def _carried(
    state: Mapping[str, Any], parameter: Tensor, known: Parameter | None, how: Resizing
) -> dict[str, Any]:
    """The state of a parameter, resized as it was."""
    if known is None or not how.touches(known.type):
        return dict(state)
    return {
        key: _resized(key, value, known, how)
        if isinstance(value, Tensor) and value.shape == parameter.shape
        else value
        for key, value in state.items()
    }


@torch.no_grad()
def _resized(key: str, value: Tensor, known: Parameter, how: Resizing) -> Tensor:
    if not isinstance(how, Widening):
        return how.narrow(value, known.type)
    wide = how.spread(value, known.type)
    for block in () if key in POWERS else known.type.blocks:
        layout = how.layout(known.type, block)
        copies = how.marked(known.type, layout, layout.rank > 0).to(wide.device)
        wide = wide.masked_fill(copies, 0)
    return wide
