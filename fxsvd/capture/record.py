"""Writes an fx.Graph while a model runs: one node per torch call, leaf modules kept whole."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.overrides import TorchFunctionMode

from fxsvd.capture.arguments import Arguments
from fxsvd.capture.attention import attend
from fxsvd.capture.calls import VALUE_READS, Call, call_of
from fxsvd.capture.fakes import Fakes
from fxsvd.capture.function import CustomFunction
from fxsvd.capture.leaves import is_leaf, is_written_out
from fxsvd.capture.origins import Origins
from fxsvd.capture.sizes import Sizes
from fxsvd.capture.writer import Writer
from fxsvd.errors import CaptureError


class Recorder(TorchFunctionMode):
    """While active, runs torch calls on fakes and writes each as a node.

    Args:
        model: The root; paths and parameter names are relative to it.
        fakes: Makes the fakes and runs the operations.

    Attributes:
        graph: The graph so far.
        constants: Tensors that are neither parameters nor buffers, by the name their nodes use.
        reads_training: Whether a module that is no leaf has looked at its `training` flag.
        failed_in: The innermost module that an exception has passed through.
        functions: The autograd functions met, by the name their nodes use.
    """

    def __init__(self, model: nn.Module, fakes: Fakes) -> None:
        super().__init__()
        self._writer = Writer()
        self._origins = Origins(model, fakes, self._writer)
        sizes = Sizes(fakes, self._origins, self._writer)
        self._arguments = Arguments(self._origins, sizes, self._writer)
        self.graph = self._writer.graph
        self.constants = self._origins.constants
        self.reads_training = False
        self.failed_in: nn.Module | None = None
        self.functions: dict[str, CustomFunction] = {}
        self._fakes = fakes
        self._root = model
        modules = list(model.named_modules(remove_duplicate=False))
        self._paths = {id(module): path for path, module in reversed(modules)}
        self._leaf_depth = 0
        self._autocast = self._is_autocast()

    @property
    def inside_leaf(self) -> bool:
        """Whether a leaf module is running, whose calls are not recorded."""
        return self._leaf_depth > 0

    def path_of(self, module: nn.Module) -> str:
        """Returns the dotted path of a module, "" for the root."""
        path: str = self._paths.get(id(module), self._writer.scopes[-1])
        return path

    def placeholder(self, name: str, default: tuple[Any, ...], value: Any) -> None:
        """Adds an input node; tensors inside a structure become getitem nodes when used."""
        node = self.graph.create_node("placeholder", name, default)
        self._writer.describe(node, value)
        self._origins.bind(value, node)
        self._origins.find_batch(value)

    def output(self, value: Any) -> None:
        """Ends the graph, and erases the reads that nothing uses."""
        node = self.graph.output(self._arguments.output(value))
        self._writer.describe(node, value)
        for node in reversed(list(self.graph.nodes)):
            if not node.users and (node.op == "get_attr" or node.target is operator.getitem):
                self.graph.erase_node(node)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs one torch call on fakes and records it."""
        kwargs = kwargs or {}
        if func is Tensor.__iter__:
            return iter(self.__torch_function__(torch.unbind, types, (args[0], 0)))
        if self._is_outside(func, args, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if self._is_autocast() != self._autocast:
            raise CaptureError(
                "autocast is switched inside forward, which a graph cannot hold: use it around the "
                "call of the model"
            )
        call = call_of(func)
        args, kwargs = self._fake(args), self._fake(kwargs)
        if call.reads:
            return func(*args, **kwargs)
        result = self._fakes.call(func, args, kwargs, mutates=call.mutates)
        if not self.inside_leaf:
            self._record(call, args, kwargs, result)
        return result

    def call_module(
        self, original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any
    ) -> Any:
        """Runs a module: a leaf as one node, any other with its inside recorded.

        Args:
            original: `torch.nn.Module.__call__`.
            module: The module that is called.
            args: The arguments of the call.
            kwargs: The keyword arguments of the call.
        """
        path = self._paths.get(id(module))
        if path is not None and not self.inside_leaf and is_written_out(module):
            return self._enter(attend, module, args, kwargs)
        is_whole = path is not None and module is not self._root and is_leaf(module)
        if not is_whole or self.inside_leaf:
            return self._enter(original, module, args, kwargs)
        self._leaf_depth += 1
        try:
            result = self._enter(original, module, args, kwargs)
        finally:
            self._leaf_depth -= 1
        scope = path.rpartition(".")[0] if path else ""
        self._add("call_module", path, self._fake(args), self._fake(kwargs), result, scope=scope)
        return result

    def call_function(self, original: Any, function: Any, args: Any, kwargs: Any) -> Any:
        """Runs an autograd function as one node: its inside has no derivative of its own.

        Args:
            original: `function.apply`, as it was.
            function: The function's class.
            args: The arguments of the call.
            kwargs: The keyword arguments of the call.
        """
        self._leaf_depth += 1
        try:
            result = original(*self._fake(args), **self._fake(kwargs))
        finally:
            self._leaf_depth -= 1
        name = f"_function{len(self.functions)}"
        self.functions[name] = CustomFunction(function)
        self._add("call_module", name, self._fake(args), self._fake(kwargs), result)
        return result

    def _enter(self, original: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self._writer.scopes.append(self.path_of(module))
        try:
            result = original(module, *args, **kwargs)
        except Exception:
            if self.failed_in is None:
                self.failed_in = module
            raise
        else:
            self.failed_in = None
            return result
        finally:
            self._writer.scopes.pop()

    def _is_autocast(self) -> bool:
        return bool(torch.is_autocast_enabled(self._fakes.device.type))

    def _is_outside(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether a call works on constants only, that are no part of the model's data flow."""
        if func in VALUE_READS:
            real = args[0]
            return not isinstance(real, FakeTensor) and not self._origins.is_named(real)
        return any(isinstance(item, np.ndarray) for item in (*args, *kwargs.values()))

    def _fake(self, value: Any) -> Any:
        """Replaces tensors from outside the trace by their fakes."""
        if isinstance(value, Tensor):
            return value if isinstance(value, FakeTensor) else self._fakes.of(value)
        if isinstance(value, (tuple, list)):
            items = [self._fake(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if type(value) is dict:
            return {name: self._fake(item) for name, item in value.items()}
        if type(value) is slice:
            return slice(*self._fake((value.start, value.stop, value.step)))
        return value

    def _record(self, call: Call, args: Any, kwargs: Any, result: Any) -> None:
        if not _holds_tensor(result) and not call.mutates:
            return
        op, target = call.op, call.target
        if call.infix and len(args) == 2 and not kwargs:
            op, target = "call_function", call.infix
        if isinstance(target, tuple):
            target, attribute = target
            args = (args[0], attribute, *args[1:2]) if target is setattr else (args[0], attribute)
        if call.swapped:
            args = args[::-1]
        self._add(op, target, args, kwargs, result)

    def _add(
        self,
        op: str,
        target: Any,
        args: Any,
        kwargs: Any,
        result: Any,
        scope: str | None = None,
    ) -> fx.Node:
        inputs = self._arguments.argument(tuple(args))
        named_inputs = self._arguments.argument(dict(kwargs))
        name = target if isinstance(target, str) else getattr(target, "__name__", "call")
        if op != "call_module":
            name = self._writer.scoped(name)
        label = name.replace(".", "_")
        node: fx.Node = self.graph.create_node(op, target, inputs, named_inputs, label)
        self._writer.describe(node, result, scope)
        self._origins.bind(result, node)
        return node


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, Tensor):
        return True
    if isinstance(value, dict):
        return any(_holds_tensor(item) for item in value.values())
    return isinstance(value, (tuple, list)) and any(_holds_tensor(item) for item in value)
