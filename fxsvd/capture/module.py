"""The result of a capture: a graph module that survives copies and pickling whole."""

from __future__ import annotations

import copy
from typing import Any

from torch import fx

from fxsvd.capture.packing import Packed, pack, unpack
from fxsvd.errors import FxsvdError

TRAIN_GRAPH = "train_graph"
"""The key in a captured module's meta that says why its graph holds eval mode only."""


class CapturedModule(fx.GraphModule):
    """A graph module that keeps its whole module tree and its graph through copies and pickling.

    The base class drops modules that the graph does not mention when it is copied, and traces its
    code again when it is unpickled, which loses in-place operations and tensors made inside
    forward. Shapes (`node.meta["val"]`) live in this process only: they survive copies, not
    pickling.
    """

    def train(self, mode: bool = True) -> CapturedModule:
        """Sets the mode, as `nn.Module.train`.

        Raises:
            FxsvdError: If train mode computes something that the graph does not hold.
        """
        reason = self.meta.get(TRAIN_GRAPH)
        if mode and reason is not None:
            raise FxsvdError(f"this graph holds eval mode only, train() is not possible: {reason}")
        super().train(mode)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedModule:
        """Copies modules, parameters and graph."""
        clone = CapturedModule.__new__(type(self))
        memo[id(self)] = clone
        clone.__dict__.update(copy.deepcopy(self._state(), memo))
        return clone._with_graph(copy.deepcopy(self.graph), type(self).__name__)

    def __copy__(self) -> CapturedModule:
        """Copies the graph; modules and parameters are shared."""
        clone = CapturedModule.__new__(type(self))
        clone.__dict__.update(self._state())
        for name in ("_modules", "_parameters", "_buffers", "meta"):
            clone.__dict__[name] = copy.copy(clone.__dict__[name])
        return clone._with_graph(copy.deepcopy(self.graph), type(self).__name__)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the graph as data, not as code."""
        return _unpickle, (self._state(), pack(self.graph), type(self).__name__)

    def _state(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_graph"}

    def _with_graph(self, graph: fx.Graph, class_name: str) -> CapturedModule:
        type(self).__name__ = class_name
        self.graph = graph
        return self


def _unpickle(state: dict[str, Any], nodes: list[Packed], class_name: str) -> CapturedModule:
    module = CapturedModule.__new__(CapturedModule)
    module.__dict__.update(state)
    return module._with_graph(unpack(nodes), class_name)
