"""Writes an fx.Graph while a model runs: one node per torch call, leaf modules kept whole."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.overrides import TorchFunctionMode

from fxsvd.capture_attention import attend, can_write_out
from fxsvd.capture_fake import Fakes
from fxsvd.errors import CaptureError

LEAF_TYPES: set[type[nn.Module]] = set()
"""Users' layer types that stay whole in the graph (subclasses too), besides torch's own layers."""

# Traced inside; a channel shuffle too: its one function may have to become another.
_CONTAINERS = (
    nn.ChannelShuffle,
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.ParameterList,
    nn.ParameterDict,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
)
# Kept whole also where a subclass has its own forward: it does more than a graph can hold.
_KEPT_WHOLE = (
    nn.modules.batchnorm._NormBase,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)
_STOCHASTIC_DEPTH = ("DropPath", "StochasticDepth")
_REDEFINITIONS = frozenset({"forward", "_conv_forward", "__call__", "weight", "bias"})


def is_leaf(module: nn.Module) -> bool:
    """Whether a module stays one call_module node, instead of being traced inside.

    Layers of torch.nn do, and subclasses that inherit their forward; not those whose weight is
    computed on the fly (parametrizations) nor those with hooks: what these compute must be seen.
    """
    kind = type(module)
    if _is_registered(kind):
        return True
    if _is_hooked(module) or isinstance(module, _CONTAINERS):
        return False
    if isinstance(module, _KEPT_WHOLE):
        return True
    if kind.__name__.endswith(_STOCHASTIC_DEPTH):
        return not any(True for _ in module.parameters()) and not module._modules
    return _inherits_torch_layer(kind)


def is_written_out(module: nn.Module) -> bool:
    """Whether a layer of torch.nn is recorded as the operations it consists of."""
    plain = isinstance(module, nn.MultiheadAttention) and not _is_hooked(module)
    return plain and not _is_registered(type(module)) and can_write_out(module)


def _is_registered(kind: type[nn.Module]) -> bool:
    return any(base in LEAF_TYPES for base in kind.__mro__)


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or "parametrizations" in module._modules
    )


def _inherits_torch_layer(kind: type[nn.Module]) -> bool:
    for base in kind.__mro__:
        if base.__module__.startswith("torch.nn.modules"):
            return base is not nn.Module
        if not _REDEFINITIONS.isdisjoint(vars(base)):
            return False
    return False


class _Rule(NamedTuple):
    """How a torch function appears in the graph; with two plain arguments, as its `infix`."""

    op: str = "call_function"
    target: Any = None
    swapped: bool = False
    mutates: bool = False
    reads: bool = False
    infix: Any = None


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_READS = _words(
    "size stride dim numel nelement ndimension element_size storage_offset is_contiguous data_ptr "
    "get_device is_floating_point is_complex is_signed is_set_to is_pinned is_shared is_same_size "
    "__len__ __hash__ __repr__ __format__ untyped_storage storage has_names is_inference is_conj "
    "is_neg requires_grad_ register_hook retain_grad"
)
_VALUES = _words("item tolist numpy __bool__ __int__ __float__ __index__ __complex__")
_TENSOR_PROPERTIES = _words("T H mT mH real imag data")
_OPERATORS = _words(
    "add sub mul truediv floordiv mod pow matmul and_ or_ xor lshift rshift lt le gt ge eq ne neg "
    "pos invert abs getitem setitem iadd isub imul itruediv ifloordiv imod ipow iand ior ixor "
    "imatmul ilshift irshift"
)
# What torch says it is asked for when it is asked for `x + y`.
_INFIX: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "remainder": operator.mod,
    "matmul": operator.matmul,
    "bitwise_and": operator.and_,
    "bitwise_or": operator.or_,
    "bitwise_xor": operator.xor,
    **{name: getattr(operator, name) for name in ("lt", "le", "gt", "ge", "ne", "eq")},
}


def _dunders() -> dict[str, _Rule]:
    """Maps `__add__` and its like to the functions of the operator module."""
    rules = {}
    for name in _OPERATORS:
        function, stem = getattr(operator, name), name.rstrip("_")
        in_place = name.startswith("i") and name != "invert"
        rules[f"__{stem}__"] = _Rule(target=function, mutates=in_place or name == "setitem")
        rules[f"__r{stem}__"] = _Rule(target=function, swapped=True)
    rules["__div__"], rules["__rdiv__"] = rules["__truediv__"], rules["__rtruediv__"]
    return rules


def _method_rules() -> dict[Any, _Rule]:
    """One rule per attribute of torch.Tensor, keyed by the function object that torch hands over.

    Names of function objects cannot be trusted (`torch.Tensor.__pow__.__name__` is "pow"),
    identity can.
    """
    rules: dict[Any, _Rule] = {}
    dunders = _dunders()
    for name in dir(Tensor):
        attribute: Any = getattr(Tensor, name, None)
        if hasattr(attribute, "__get__") and hasattr(attribute, "__set__"):
            reads = name not in _TENSOR_PROPERTIES
            rules[attribute.__get__] = _Rule(target=(getattr, name), reads=reads)
            rules[attribute.__set__] = _Rule(target=(setattr, name), mutates=True)
        elif callable(attribute) and attribute.__hash__ is not None:
            rules.setdefault(attribute, dunders.get(name) or _method(name))
    return rules


def _method(name: str) -> _Rule:
    reads = name in _READS
    return _Rule("call_method", name, mutates=_mutates(name), reads=reads, infix=_INFIX.get(name))


def _mutates(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


_RULES = _method_rules()
_VALUE_READS = {getattr(Tensor, name) for name in _VALUES if hasattr(Tensor, name)}


def _rule(func: Callable[..., Any]) -> _Rule:
    rule = _RULES.get(func)
    if rule is None:
        name = getattr(func, "__name__", "").partition(".")[0]  # of an overload, `add_.Tensor`
        rule = _RULES[func] = _Rule(target=func, mutates=_mutates(name))
    return rule


_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "Add": operator.add,
    "Mul": operator.mul,
    "Pow": operator.pow,
    "PowByNatural": operator.pow,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "IntTrueDiv": operator.truediv,
    "FloatTrueDiv": operator.truediv,
    "Max": torch.sym_max,
    "Min": torch.sym_min,
    "ToFloat": torch.sym_float,
    "TruncToInt": torch.sym_int,
}
"""What the symbolic expressions of sizes become in the graph, by sympy class name."""

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_LITERALS = (
    *(int, float, complex, bool, str, type(None), type(...)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


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
    """

    def __init__(self, model: nn.Module, fakes: Fakes) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self.reads_training = False
        self.failed_in: nn.Module | None = None
        self._fakes = fakes
        self._root = model
        # The first name of an object with several names, as named_parameters() would give.
        tensors = [
            *model.named_buffers(remove_duplicate=False),
            *model.named_parameters(remove_duplicate=False),
        ]
        self._names = {id(tensor): name for name, tensor in reversed(tensors)}
        modules = list(model.named_modules(remove_duplicate=False))
        self._paths = {id(module): path for path, module in reversed(modules)}
        self._scopes = [""]
        self._leaf_depth = 0
        self._origins: dict[int, tuple[fx.Node, tuple[Any, ...]]] = {}
        self._alive: list[Tensor] = []
        self._expressions: dict[Any, Any] = {}
        self._without_grad: set[int] = set()
        self._autocast = self._is_autocast()
        self._batch_origin: tuple[fx.Node, tuple[Any, ...]] | None = None

    @property
    def inside_leaf(self) -> bool:
        """Whether a leaf module is running, whose calls are not recorded."""
        return self._leaf_depth > 0

    def path_of(self, module: nn.Module) -> str:
        """Returns the dotted path of a module, "" for the root."""
        path: str = self._paths.get(id(module), self._scopes[-1])
        return path

    def placeholder(self, name: str, default: tuple[Any, ...], value: Any) -> None:
        """Adds an input node; tensors inside a structure become getitem nodes when used."""
        node = self.graph.create_node("placeholder", name, default)
        self._describe(node, value)
        self._bind(value, node)
        self._find_batch(value)

    def output(self, value: Any) -> None:
        """Ends the graph, and erases the reads that nothing uses."""
        node = self.graph.output(self._output(value))
        self._describe(node, value)
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
        rule = _rule(func)
        args, kwargs = self._fake(args), self._fake(kwargs)
        if rule.reads:
            return func(*args, **kwargs)
        result = self._fakes.call(func, args, kwargs, mutates=rule.mutates)
        if not self.inside_leaf:
            self._record(rule, args, kwargs, result)
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

    def _enter(self, original: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self._scopes.append(self.path_of(module))
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
            self._scopes.pop()

    def _is_autocast(self) -> bool:
        return bool(torch.is_autocast_enabled(self._fakes.device.type))

    def _is_outside(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether a call works on constants only, that are no part of the model's data flow."""
        if func in _VALUE_READS:
            real = args[0]
            return not isinstance(real, FakeTensor) and id(real) not in self._names
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

    def _record(self, rule: _Rule, args: Any, kwargs: Any, result: Any) -> None:
        if not _holds_tensor(result) and not rule.mutates:
            return
        op, target = rule.op, rule.target
        if rule.infix and len(args) == 2 and not kwargs:
            op, target = "call_function", rule.infix
        if isinstance(target, tuple):
            target, attribute = target
            args = (args[0], attribute, *args[1:2]) if target is setattr else (args[0], attribute)
        if rule.swapped:
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
        inputs, named_inputs = self._argument(tuple(args)), self._argument(dict(kwargs))
        name = target if isinstance(target, str) else getattr(target, "__name__", "call")
        if op != "call_module":
            name = self._scoped(name)
        label = name.replace(".", "_")
        node: fx.Node = self.graph.create_node(op, target, inputs, named_inputs, label)
        self._describe(node, result, scope)
        self._bind(result, node)
        return node

    def _scoped(self, name: str) -> str:
        """Names a node after the module it is in."""
        return "_".join([*filter(None, self._scopes[-1].split(".")), name.strip("_")])

    def _describe(self, node: fx.Node, value: Any, scope: str | None = None) -> None:
        node.meta["val"] = value
        node.meta["scope"] = self._scopes[-1] if scope is None else scope

    def _bind(self, value: Any, node: fx.Node, path: tuple[Any, ...] = ()) -> None:
        """Remembers that the tensors in a value come from a node, at a path inside its result."""
        if isinstance(value, Tensor):
            self._origins[id(value)] = (node, path)
            self._alive.append(value)
            if node.op.startswith("call") and not torch.is_grad_enabled():
                self._without_grad.add(id(value))
        elif isinstance(value, dict):
            for key, item in value.items():
                self._bind(item, node, (*path, key))
        elif isinstance(value, (tuple, list)):
            for position, item in enumerate(value):
                self._bind(item, node, (*path, position))

    def _find_batch(self, value: Any) -> None:
        if isinstance(value, Tensor):
            if value.dim() and isinstance(value.shape[0], torch.SymInt) and not self._batch_origin:
                self._batch_origin = self._origins[id(value)]
        elif isinstance(value, (tuple, list, dict)):
            for item in value.values() if isinstance(value, dict) else value:
                self._find_batch(item)

    def _node_of(self, fake: Tensor) -> fx.Node:
        if id(fake) not in self._origins:
            self._bind(fake, self._attribute(fake))
        node, path = self._origins[id(fake)]
        for position, key in enumerate(path):
            parent, node = node, self.graph.call_function(operator.getitem, (node, key))
            self._describe(node, parent.meta["val"][key])
            if position == len(path) - 1:
                self._origins[id(fake)] = (node, ())
        if id(fake) in self._without_grad and torch.is_grad_enabled():
            self._without_grad.discard(id(fake))
            if fake.is_floating_point():
                node = self._detached(node, fake)
        return node

    def _detached(self, node: fx.Node, fake: Tensor) -> fx.Node:
        """Where a tensor leaves a no_grad() region, the graph says so with a detach()."""
        detached = self.graph.call_method("detach", (node,))
        self._describe(detached, fake)
        self._origins[id(fake)] = (detached, ())
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
        node: fx.Node = self.graph.get_attr(name)
        self._describe(node, fake)
        return node

    def _argument(self, value: Any) -> Any:
        """Turns a runtime value into what a node may hold: nodes and literals."""
        if isinstance(value, Tensor):
            return self._node_of(value)
        if isinstance(value, _SYMBOLIC):
            return self._expression(value.node.expr)
        if isinstance(value, (tuple, list)):
            items = [self._argument(item) for item in value]
            if hasattr(value, "_fields"):
                return type(value)(*items)
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, dict):
            return {key: self._argument(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(*self._argument((value.start, value.stop, value.step)))
        return _literal(value)

    def _expression(self, expr: Any) -> Any:
        """Rebuilds a size from the batch size, as readable arithmetic."""
        if expr.is_Integer or expr.is_Boolean:
            return bool(expr) if expr.is_Boolean else int(expr)
        if expr.is_number:
            return float(expr)
        if expr not in self._expressions:
            if expr.is_Symbol:
                self._expressions[expr] = self._batch_node(expr)
            else:
                self._expressions[expr] = self._arithmetic(expr)
        return self._expressions[expr]

    def _batch_node(self, symbol: Any) -> fx.Node:
        if symbol != self._fakes.symbol or self._batch_origin is None:
            raise CaptureError(f"a size depends on data, not only on the batch size: {symbol}")
        # Right after the input: a later torch call may reshape the input in place.
        node, path = self._batch_origin
        for key in path:
            node = self._after(node, "call_function", operator.getitem, key, node.meta["val"][key])
        return self._after(node, "call_method", "size", 0, self._fakes.batch)

    def _after(self, node: fx.Node, op: str, target: Any, key: Any, value: Any) -> fx.Node:
        with self.graph.inserting_after(node):
            read: fx.Node = self.graph.create_node(op, target, (node, key))
        self._describe(read, value, "")
        return read

    def _arithmetic(self, expr: Any) -> fx.Node:
        kind = type(expr).__name__
        if kind not in _ARITHMETIC:
            raise CaptureError(f"size arithmetic with {kind} is not supported: {expr}")
        function = _ARITHMETIC[kind]
        # Sympy sorts numbers first; `batch * 196` reads better than `196 * batch`.
        parts = list(expr.args)
        if kind in ("Add", "Mul"):
            parts.sort(key=lambda part: bool(part.is_number))
        first, *others = [self._expression(part) for part in parts]
        if not others:
            return self._sized(function, (first,))
        node = self._sized(function, (first, others[0]))
        for other in others[1:]:
            node = self._sized(function, (node, other))
        return node

    def _sized(self, function: Any, args: tuple[Any, ...]) -> fx.Node:
        name = self._scoped(function.__name__)
        node: fx.Node = self.graph.create_node("call_function", function, args, {}, name)
        values = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args]
        self._describe(node, function(*values))
        return node

    def _output(self, value: Any) -> Any:
        """Like `_argument`, but structures of the model's own types are built again by a node."""
        if hasattr(value, "__dataclass_fields__"):
            fields = {
                name: self._output(getattr(value, name)) for name in value.__dataclass_fields__
            }
            node = self.graph.call_function(type(value), (), fields)
        elif isinstance(value, dict):
            items = {key: self._output(item) for key, item in value.items()}
            if type(value) is dict:
                return items
            node = self.graph.call_function(type(value), (items,))
        elif isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
            parts = [self._output(item) for item in value]
            return parts if isinstance(value, list) else tuple(parts)
        else:
            return self._argument(value)
        self._describe(node, value)
        return node


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, Tensor):
        return True
    if isinstance(value, dict):
        return any(_holds_tensor(item) for item in value.values())
    return isinstance(value, (tuple, list)) and any(_holds_tensor(item) for item in value)


def _literal(value: Any) -> Any:
    if isinstance(value, _LITERALS):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, range):
        return list(value)
    raise CaptureError(
        f"a {type(value).__module__}.{type(value).__qualname__} cannot be part of a graph. Return "
        "and pass tensors, numbers and plain structures (Hugging Face models: use_cache=False)."
    )


class _TrainingSpy:
    """Stands for `training` on nn.Module during a trace, and tells the recorder who looks at it."""

    def __init__(self, recorder: Recorder, thread: int) -> None:
        self._recorder = recorder
        self._thread = thread

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> Any:
        if module is None:
            return self
        if not self._recorder.inside_leaf and threading.get_ident() == self._thread:
            self._recorder.reads_training = True
        try:
            return module.__dict__["training"]
        except KeyError:
            raise AttributeError("training") from None

    def __set__(self, module: nn.Module, value: bool) -> None:
        module.__dict__["training"] = value


@contextmanager
def intercepted(recorder: Recorder) -> Iterator[None]:
    """Routes module calls and reads of training flags in this thread through a recorder."""
    original, original_from_numpy = nn.Module.__call__, torch.from_numpy
    thread = threading.get_ident()

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return original(module, *args, **kwargs)
        return recorder.call_module(original, module, args, kwargs)

    def from_numpy(ndarray: Any) -> Tensor:
        with unset_fake_temporarily():
            return original_from_numpy(ndarray)

    try:
        # No torch function mode sees it, and it cannot run in a fake tensor mode.
        torch.from_numpy = from_numpy
        nn.Module.__call__ = call  # type: ignore[method-assign]
        nn.Module.training = _TrainingSpy(recorder, thread)  # type: ignore[assignment]
        yield
    finally:
        torch.from_numpy = original_from_numpy
        nn.Module.__call__ = original  # type: ignore[method-assign]
        del nn.Module.training
