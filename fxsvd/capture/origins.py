"""Which node each tensor of a run comes from."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxsvd.capture.fakes import Fakes
from fxsvd.capture.writer import Writer
from fxsvd.errors import CaptureError


class Origins:
    """Finds the nodes of tensors: results of nodes, parts of results, parameters, constants.

    Args:
        model: The root; names of parameters and buffers are relative to it.
        fakes: Knows which tensor outside the trace a fake stands for.
        writer: Gets the nodes that read attributes and parts of results.

    Attributes:
        constants: Tensors that are neither parameters nor buffers, by the name their nodes use.
        batch: The input whose first size is the batch, as a node and a path inside its value.
    """

    def __init__(self, model: nn.Module, fakes: Fakes, writer: Writer) -> None:
        self.constants: dict[str, Tensor] = {}
        self.batch: tuple[fx.Node, tuple[Any, ...]] | None = None
        self._fakes = fakes
        self._writer = writer
        # The first name of an object with several names, as named_parameters() would give.
        tensors = [
            *model.named_buffers(remove_duplicate=False),
            *model.named_parameters(remove_duplicate=False),
        ]
        self._names = {id(tensor): name for name, tensor in reversed(tensors)}
        self._of: dict[int, tuple[fx.Node, tuple[Any, ...]]] = {}
        self._alive: list[Tensor] = []
        self._without_grad: set[int] = set()

    def is_named(self, real: Any) -> bool:
        """Whether a tensor outside the trace is a parameter, a buffer or a known constant."""
        return id(real) in self._names

    def bind(self, value: Any, node: fx.Node, path: tuple[Any, ...] = ()) -> None:
        """Remembers that the tensors in a value come from a node, at a path inside its result."""
        if isinstance(value, Tensor):
            self._of[id(value)] = (node, path)
            self._alive.append(value)
            if node.op.startswith("call") and not torch.is_grad_enabled():
                self._without_grad.add(id(value))
        elif isinstance(value, dict):
            for key, item in value.items():
                self.bind(item, node, (*path, key))
        elif isinstance(value, (tuple, list)):
            for position, item in enumerate(value):
                self.bind(item, node, (*path, position))

    def find_batch(self, value: Any) -> None:
        """Remembers the first input whose first size is symbolic."""
        if isinstance(value, Tensor):
            if value.dim() and isinstance(value.shape[0], torch.SymInt) and not self.batch:
                self.batch = self._of[id(value)]
        elif isinstance(value, (tuple, list, dict)):
            for item in value.values() if isinstance(value, dict) else value:
                self.find_batch(item)

    def node_of(self, fake: Tensor) -> fx.Node:
        """Returns the node of a tensor, new for an attribute or a part of a result."""
        if id(fake) not in self._of:
            self.bind(fake, self._attribute(fake))
        node, path = self._of[id(fake)]
        for position, key in enumerate(path):
            parent, node = node, self._writer.graph.call_function(operator.getitem, (node, key))
            self._writer.describe(node, parent.meta["val"][key])
            if position == len(path) - 1:
                self._of[id(fake)] = (node, ())
        if id(fake) in self._without_grad and torch.is_grad_enabled():
            self._without_grad.discard(id(fake))
            if fake.is_floating_point():
                node = self._detached(node, fake)
        return node

    def _detached(self, node: fx.Node, fake: Tensor) -> fx.Node:
        """Where a tensor leaves a no_grad() region, the graph says so with a detach()."""
        detached = self._writer.graph.call_method("detach", (node,))
        self._writer.describe(detached, fake)
        self._of[id(fake)] = (detached, ())
        return detached

    def _attribute(self, fake: Tensor) -> fx.Node:
        real = self._fakes.real(fake)
        if real is None:
            raise CaptureError(
                f"a tensor of shape {tuple(fake.shape)} was computed where torch calls cannot be "
                "seen (a TorchScript function, or C++ code). Replace it by plain PyTorch code, or "
                "keep the module that computes it whole with fxsvd.register_layer."
            )
        name = self._names.get(id(real))
        if name is None:
            name = f"_const{len(self.constants)}"
            self._names[id(real)] = name
            self.constants[name] = real
        node: fx.Node = self._writer.graph.get_attr(name)
        self._writer.describe(node, fake)
        return node
