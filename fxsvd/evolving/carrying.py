"""An optimizer goes on with the parameters of a resized network.

What an optimizer remembers of a parameter (momentum, Adam's moments) has its shape and is resized
with it. Where channels are only kept, that is exact: a kept column multiplies the activation that
it did, so its gradient is what it was. Copies start without a past. Adam and its kin correct their
means for the start by a parameter's number of steps, in which old and new numbers share: there, a
few steps are counted, and old means are weighed as if they came of those. New numbers then make
first steps as long as the rate, as they would in a new optimizer; with means of others they would
be held back, and with many steps counted they would leap. In another basis (a rotation) second
moments have no counterpart: there, everything is forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from fxsvd.analysis import Parameter
from fxsvd.dependency import Dependencies
from fxsvd.edits import Plan
from fxsvd.errors import FxsvdError
from fxsvd.widening import Resizing, Widening, resizing

MEANS = {"exp_avg": 0, "exp_avg_sq": 1, "max_exp_avg_sq": 1}
"""What Adam and its kin correct for the start, and by which of their ``betas``."""

POWERS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf", "acc_delta", "step_size")
"""What optimizers divide by: copies inherit it where no steps are counted, lest they leap."""

PLACES = ("x0", "p0", "z", "lookahead_slow_buff")
"""Names under which optimizers keep where parameters were, to go back there."""

REFUSED = {
    "LBFGS": "its history is of all parameters in one vector",
    "Adafactor": "it remembers rows and columns, not numbers",
    "ASGD": "it averages parameters; let an AveragedModel do that (see Evolver.follow)",
    "Adahessian": "it keeps what it sums up on the parameters themselves",
    "Lookahead": "another optimizer inside it does the remembering",
}
"""Why not, by the names of classes: some are of torch, some of other libraries."""


def require_owner(optimizer: Optimizer, graph: nn.Module) -> None:
    """Raise unless the optimizer trains parameters of the network, and those alone.

    Raises:
        FxsvdError: it has parameters that are not the network's, or none of them; or what it
            remembers cannot be resized.

    >>> net = nn.Linear(2, 3)
    >>> require_owner(torch.optim.SGD(net.parameters()), net)
    >>> require_owner(torch.optim.LBFGS(net.parameters()), net)
    Traceback (most recent call last):
    fxsvd.errors.FxsvdError: LBFGS cannot be resized: its history is of all parameters in one vector
    """
    for kind in type(optimizer).__mro__:
        if kind.__name__ in REFUSED:
            raise FxsvdError(f"{kind.__name__} cannot be resized: {REFUSED[kind.__name__]}")
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

    Options of parameter groups, and so schedulers, stay. Factors that take the place of a weight,
    and a bias that a layer gets, join its group and start without a state.

    Args:
        optimizer: of the old network; changed in place.
        deps: the analysis of the old network.
        plan: what was done, one stage.
        old: the network before.
        new: the network after.

    Raises:
        FxsvdError: the optimizer remembers something that cannot be resized, or cannot train what
            is new; it was not changed.
    """
    names = {id(p): name for name, p in old.named_parameters()}
    after = dict(new.named_parameters(remove_duplicate=False))
    joining = _joining(optimizer, names, after)
    _require_possible(optimizer, names, joining)
    how = resizing(deps, plan)
    known = {name: p for p in deps.analysis.parameters.values() for name in p.names}
    turned = {value.parameter for value in plan.values if value.turned}
    for group in optimizer.param_groups:
        params: list[Any] = []
        for parameter in group["params"]:
            name = names[id(parameter)]
            state = optimizer.state.pop(parameter, None)
            if name in after:
                params.append(after[name])
                if state and name not in turned:
                    carried = _carried(state, parameter, known.get(name), how, group.get("betas"))
                    optimizer.state[after[name]] = carried
            params += joining.get(name, [])
        group["params"] = params
        _begin(optimizer, group)


Joining = dict[str, list[nn.Parameter]]


def _joining(
    optimizer: Optimizer, names: Mapping[int, str], after: Mapping[str, nn.Parameter]
) -> Joining:
    """Parameters that are new, by the name of the old one whose group they join.

    That is the one of their own kind in the layer that they stand for, or its weight.
    """
    owned = {names[id(p)] for group in optimizer.param_groups for p in group["params"]}
    stay = {id(after[name]) for name in names.values() if name in after}
    out: Joining = {}
    for name, parameter in after.items():
        if id(parameter) in stay:
            continue
        stay.add(id(parameter))
        layer, _, kind = name.rpartition(".")
        homes = [f"{p}.{k}" for p in (layer, layer.rpartition(".")[0]) for k in (kind, "weight")]
        home = next((h for h in homes if h in owned), None)
        if home is not None:
            out.setdefault(home, []).append(parameter)
    return out


def _require_possible(optimizer: Optimizer, names: Mapping[int, str], joining: Joining) -> None:
    kind = type(optimizer).__name__
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            why = _why_not(key, value, parameter)
            if why:
                raise FxsvdError(
                    f"{kind} remembers `{key}` for `{names[id(parameter)]}`, {why}; use an "
                    "optimizer that remembers gradients number by number, as SGD and Adam do"
                )
    if isinstance(optimizer, torch.optim.Muon):
        for home, parameters in joining.items():
            if any(p.dim() != 2 for p in parameters):
                raise FxsvdError(f"Muon trains matrices only: it cannot have what replaces {home}")


def _why_not(key: str, value: Any, parameter: Tensor) -> str | None:
    """Why what is remembered of a parameter cannot be resized."""
    if key in PLACES:
        return "where it was, and a resize moves it"
    for part in tree_leaves(value):
        whole = isinstance(part, Tensor) and part.numel() > 1
        if whole and (part is not value or part.shape != parameter.shape):
            shapes = f"{list(part.shape)} for one of {list(parameter.shape)}"
            return f"{shapes}: nothing says how that is resized"
    return None


def _begin(optimizer: Optimizer, group: dict[str, Any]) -> None:
    """What one optimizer wants to remember of parameters before it sees a gradient."""
    fresh = [p for p in group["params"] if p not in optimizer.state]
    if isinstance(optimizer, torch.optim.Adagrad) and fresh:
        start = {name: group[name] for name in ("initial_accumulator_value", "fused")}
        optimizer.state.update(torch.optim.Adagrad(fresh, **start).state)


def _carried(
    state: Mapping[str, Any],
    parameter: Tensor,
    known: Parameter | None,
    how: Resizing,
    betas: tuple[float, float] | None,
) -> dict[str, Any]:
    """The state of a parameter, resized as it was."""
    if known is None or not how.touches(known.type):
        return dict(state)
    counted = betas if "step" in state else None
    out = {
        key: _resized(value, known, how, inherited=key in POWERS and not counted)
        if isinstance(value, Tensor) and value.shape == parameter.shape
        else value
        for key, value in state.items()
    }
    return _begun(out, counted) if counted and isinstance(how, Widening) else out


@torch.no_grad()
def _resized(value: Tensor, known: Parameter, how: Resizing, inherited: bool) -> Tensor:
    if not isinstance(how, Widening):
        return how.narrow(value, known.type)
    wide = how.spread(value, known.type)
    return wide if inherited else wide.masked_fill(copies(how, known).to(wide.device), 0)


def _begun(state: dict[str, Any], betas: tuple[float, float]) -> dict[str, Any]:
    """Adam's state as if of a few steps, as many as momentum remembers, with the same means.

    >>> state = _begun({"step": torch.tensor(500.0), "exp_avg": torch.ones(1)}, (0.9, 0.999))
    >>> state["step"], state["exp_avg"]  # 1 - 0.9 ** 10
    (tensor(10.), tensor([0.6513]))
    """
    step = state["step"]
    steps, few = float(step), round(1 / (1 - float(betas[0])))
    if steps <= few:
        return state
    out = {**state, "step": torch.full_like(step, few) if isinstance(step, Tensor) else few}
    for key, which in MEANS.items():
        if key in state and not (key == "exp_avg" and "mu_product" in state):  # NAdam's own
            beta = float(betas[which])
            out[key] = state[key] * (1 - beta**few) / (1 - beta**steps)
    return out


def copies(how: Widening, known: Parameter) -> Tensor:
    """Which numbers of a parameter are new, in its shape afterwards.

    >>> from fxsvd.capture import capture
    >>> from fxsvd.dependency import analyze
    >>> from fxsvd.edits import Remap
    >>> net = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 3))
    >>> deps = analyze(capture(net, torch.zeros(2, 1)))
    >>> how = Widening.by(deps, Plan((Remap("0", 2, (0, 1, 1)),)))
    >>> copies(how, deps.analysis.by_name("0.bias"))
    tensor([False, False,  True])
    """
    out = torch.zeros(how.shape(known.type), dtype=torch.bool)
    for block in known.type.blocks:
        layout = how.layout(known.type, block)
        out |= how.marked(known.type, layout, layout.rank > 0)
    return out
