"""Joins: where a layer's output is added to another value, and running that value first."""

from __future__ import annotations

import operator
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxsvd.analysis import in_place
from fxsvd.layers import BATCH_NORMS
from fxsvd.running import is_random

ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
SMALLEST_SCALE = 1e-3
"""Norm scales below this share of the largest are not divided by."""


@dataclass(frozen=True, eq=False)
class Join:
    """What a layer's output is added to, and the batch norm on the way there."""

    other: fx.Node
    norm: Any

    def behind(self, change: Tensor) -> Tensor:
        """The change of the layer's output that the norm turns into a given one."""
        if self.norm is None:
            return change
        scale = (self.norm.running_var + self.norm.eps).rsqrt()
        scale = scale if self.norm.weight is None else scale * self.norm.weight
        small = scale.abs() <= SMALLEST_SCALE * scale.abs().max()  # all, if all are zero
        factor = torch.where(small, 0.0, 1 / scale)
        return change * factor.reshape(-1, *(1 for _ in change.shape[2:]))


def join_behind(node: fx.Node) -> Join | None:
    """The addition behind a layer, through nothing but a batch norm and what eval passes by."""
    norm, current = None, node
    while len(current.users) == 1:
        (user,) = current.users
        if user.op != "call_module":
            other = _other_operand(user, current)
            return None if other is None else Join(other, norm)
        module = user.graph.owning_module.get_submodule(str(user.target))  # type: ignore[union-attr]
        if isinstance(module, BATCH_NORMS) and module.track_running_stats and norm is None:
            norm = module
        elif not (isinstance(module, nn.Identity) or is_random(type(module).__name__)):
            return None
        current = user
    return None


def _other_operand(add: fx.Node, mine: fx.Node) -> fx.Node | None:
    if add.target not in ADDITIONS or len(add.args) != 2 or add.kwargs:
        return None
    others = [a for a in add.args if isinstance(a, fx.Node) and a is not mine]
    same = others and _shape(others[0]) == _shape(mine)
    return others[0] if same else None


def _shape(node: fx.Node) -> list[str]:
    return [str(size) for size in getattr(node.meta.get("val"), "shape", ())]


def schedule(graph: fx.GraphModule, layers: Container[str]) -> list[fx.Node]:
    """The nodes in an order in which what a layer's output is added to comes before the layer.

    Nodes move only where nothing is done in place among those they pass.
    """
    order = list(graph.graph.nodes)
    calls = [n for n in order if n.op == "call_module" and str(n.target) in layers]
    for call in calls:
        join = join_behind(call)
        place = {n: i for i, n in enumerate(order)}
        if join is not None and place[join.other] > place[call]:
            span = order[place[call] : place[join.other] + 1]
            needed = _needed(join.other, set(span))
            if call not in needed and not any(in_place(n) for n in span):
                rest = [n for n in span if n not in needed]
                first = [n for n in span if n in needed]
                order[place[call] : place[join.other] + 1] = [*first, *rest]
    return order


def _needed(node: fx.Node, among: set[fx.Node]) -> set[fx.Node]:
    """The node and all it depends on, among some."""
    found, open_nodes = set(), [node]
    while open_nodes:
        one = open_nodes.pop()
        if one in among and one not in found:
            found.add(one)
            open_nodes += one.all_input_nodes
    return found
