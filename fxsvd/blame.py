"""Where two networks first differ, node by node, for a message."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxsvd.axes import TensorType
from fxsvd.dependency import Dependencies
from fxsvd.running import difference, placed
from fxsvd.widening import Resizing, Widening


class _Recorder(fx.Interpreter):
    """Keeps a copy of every node's value (a later in-place op must not change it)."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.values[n.name] = value.clone() if isinstance(value, Tensor) else None
        return value


def first_difference(
    deps: Dependencies,
    how: Resizing,
    silent: fx.GraphModule,
    candidate: fx.GraphModule,
    inputs: Any,
    tolerance: float,
) -> str:
    """The first node whose narrowed value is not what the silenced original computes."""
    recorders = [_Recorder(silent), _Recorder(candidate)]
    for recorder in recorders:
        with torch.no_grad():
            recorder.run(*placed(recorder.module, inputs))
    full, narrow = (r.values for r in recorders)
    for node, t in deps.analysis.types.items():
        a, b = full.get(node.name), narrow.get(node.name)
        if a is None or b is None or not isinstance(t, TensorType):
            continue
        if isinstance(how, Widening) and how.touches(t):  # copies may compute what they like
            continue
        try:
            expected = a if isinstance(how, Widening) else how.narrow(a, t)
        except (IndexError, RuntimeError):  # the batch is folded into a channel axis
            continue
        if not difference(b, expected) <= tolerance:
            return f"`{node.name}`"
    return "the output"
