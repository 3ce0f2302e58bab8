"""What a rule says of an op, held against the op itself.

*Drop equals silence*: a small network around the op goes through the whole pipeline, and the result
is compared with the original in which the dropped channels are silent. *Nudge*: where one index
of the op's input is changed, only outputs of the same channel may move.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

import fxsvd
from fxsvd.axes import TensorType
from fxsvd.capture import BATCH_HINT
from fxsvd.dependency import Dependencies
from fxsvd.passes import Prune
from fxsvd.rules import RULES
from fxsvd.running import doubled
from tests.helpers.nets.base import Net, leaves, randomized

WIDTH = 8
Op = Callable[..., Any]
Use = Callable[[Op, Tensor, Tensor, Net], Any]


@dataclass(frozen=True)
class Case:
    """How an op is used between two producers and a consumer.

    Attributes:
        use: given the op, the outputs ``x`` and ``y`` of the two producers, and the network with
            its members.
        narrowed: whether ``x``'s producer must become narrower; else it must have a reason.
        why: part of that reason.
        nudge: whether an output moves with its own input channel only (no contraction, no
            statistics).
        image: whether ``x`` and ``y`` are ``[B, 8, 4, 4]`` instead of ``[B, 8]``.
        members: further layers and parameters for ``use``.
        masked: whether the original class, silenced, computes the same (no statistics).
    """

    use: Use
    narrowed: bool = True
    why: str = ""
    nudge: bool = True
    image: bool = False
    members: dict[str, Callable[[], Any]] = field(default_factory=dict)
    masked: bool = True


def network(case: Case, op: Op) -> nn.Module:
    """Two producers, the op, and a linear consumer of everything that comes out."""

    def values(m: Net, inputs: Tensor) -> list[Tensor]:
        out = case.use(op, m.a(inputs), m.b(inputs), m)
        return [t.to(inputs.dtype).flatten(1) for t in leaves(out)]

    def run(m: Net, inputs: Tensor) -> Tensor:
        return sum(layer(t) for layer, t in zip(m.out, values(m, inputs), strict=True))

    def producer() -> nn.Module:
        return nn.Conv2d(3, WIDTH, 1) if case.image else nn.Linear(5, WIDTH)

    members = {name: make() for name, make in case.members.items()}
    net = randomized(Net(run, a=producer(), b=producer(), **members))
    torch.manual_seed(0)
    with torch.no_grad():
        sizes = [t.shape[1] for t in values(net, example(case))]
    net.out = nn.ModuleList(nn.Linear(size, 3) for size in sizes)
    return randomized(net).eval()


def example(case: Case) -> Tensor:
    return torch.randn(BATCH_HINT, 3, 4, 4) if case.image else torch.randn(BATCH_HINT, 5)


def check(case: Case, op: Op, target: Any) -> None:
    """Both oracles.

    Args:
        case: how the op is used.
        op: how the network calls it.
        target: what the graph then calls (a function, a method's name, or a layer's type).
    """
    net, inputs = network(case, op), example(case)
    small = fxsvd.compile(net, inputs, passes=[Prune(0.5, criterion="random", seed=1)])
    rows = [r for r in small.report.spaces if "a" in r.producers]
    reasons = [r.why for r in rows]
    assert any(r.after < r.before for r in rows) == case.narrowed, reasons
    assert case.narrowed or any(case.why in why for why in reasons), reasons
    deps = fxsvd.analyze(fxsvd.capture(net, inputs))
    nodes = [n for n in deps.analysis.types if called(n, target, deps.analysis.graph)]
    assert nodes, "the graph calls nothing of this rule"
    node = next((n for n in nodes if n.target == target), nodes[0])
    if case.nudge:
        nudge(deps, node, inputs)
    elsewhere(net, small, case)


def elsewhere(net: nn.Module, small: fx.GraphModule, case: Case) -> None:
    """On other inputs, in float64, against the silenced original where that says it all."""
    if not case.masked:
        return
    inputs = example(case).double()[:4]
    masked = fxsvd.mask(net, small.report.plan).double()
    with torch.no_grad():
        torch.manual_seed(0)
        expected = masked(inputs)
        torch.manual_seed(0)
        actual = doubled(small)(inputs)
    assert float((actual - expected).abs().max()) <= 1e-9 * max(1.0, float(expected.abs().max()))


def called(node: fx.Node, target: Any, graph: fx.GraphModule) -> bool:
    if isinstance(target, type):
        return node.op == "call_module" and isinstance(
            graph.get_submodule(str(node.target)), target
        )
    return node.op in ("call_function", "call_method") and RULES.get(node.target) is RULES[target]


def nudge(deps: Dependencies, node: fx.Node, inputs: Tensor) -> None:
    """Change one index of an input at a time; see which outputs move."""
    values = Recorder(deps.analysis.graph).record(inputs)
    for source in node.all_input_nodes:
        t = deps.analysis.types[source]
        if not isinstance(t, TensorType) or not values[source].is_floating_point():
            continue
        before = evaluate(deps, node, values)
        for block in t.blocks:
            for place in np.ndindex(block.atoms.shape):
                channel = int(deps.channels.of[block.atoms[place]])
                where: list[Any] = [slice(None)] * len(t.shape)
                for dim, index in zip(block.dims, place, strict=True):
                    where[dim] = index
                nudged = values[source].clone()
                nudged[tuple(where)] += 0.3
                after = evaluate(deps, node, {**values, source: nudged})
                check_moved(deps, node, channel, before, after)


def check_moved(
    deps: Dependencies, node: fx.Node, channel: int, before: list[Tensor], after: list[Tensor]
) -> None:
    """Every output index that moved is of the channel, or the channel cannot go."""
    if channel in deps.channels.reasons:
        return
    for out, old, new in zip(types(deps.analysis.types[node]), before, after, strict=True):
        moved = ~((old == new) | (old.isnan() & new.isnan())).numpy()
        same = np.zeros(moved.shape, dtype=bool)
        for block in out.blocks:
            order = np.argsort(block.dims)
            hit = (deps.channels.of[block.atoms] == channel).transpose(order)
            shape = [n if d in block.dims else 1 for d, n in enumerate(out.shape)]
            same |= hit.reshape(shape)
        assert not (moved & ~same).any(), f"{node.name} moves other channels too"


def types(value: Any) -> list[TensorType]:
    if isinstance(value, TensorType):
        return [value]
    return [t for v in value for t in types(v)] if isinstance(value, (tuple, list)) else []


def evaluate(deps: Dependencies, node: fx.Node, values: dict[fx.Node, Any]) -> list[Tensor]:
    """The node's result on real tensors, copied first: it may write in place."""

    def held(n: fx.Node) -> Any:
        value = values[n]
        return value.clone() if isinstance(value, Tensor) else value

    torch.manual_seed(0)
    with torch.no_grad():
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), held)
        if node.op == "call_module":
            result = deps.analysis.graph.get_submodule(str(node.target))(*args, **kwargs)
        elif node.op == "call_method":
            result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            result = node.target(*args, **kwargs)  # type: ignore[operator]
    return [t.clone() for t in leaves(result)]


class Recorder(fx.Interpreter):
    """Keeps a copy of what every node computed."""

    def record(self, inputs: Tensor) -> dict[fx.Node, Any]:
        self.seen: dict[fx.Node, Any] = {}
        with torch.no_grad():
            self.run(inputs)
        return self.seen

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.seen[n] = value.clone() if isinstance(value, Tensor) else value
        return value
