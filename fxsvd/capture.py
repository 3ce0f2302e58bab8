"""From any nn.Module to an fx.GraphModule, by running it once on tensors without data.

The model's own Python runs, so branches on shapes, dictionaries and Hugging Face outputs work.
Standard layers stay the original instances under their original names; the rest appears as torch
calls. Dimension 0 of the inputs is symbolic: the graph works for any batch size.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.node import _get_qualified_name

from fxsvd.capture_fake import BATCH_HINT, Fakes, concrete
from fxsvd.capture_idioms import name_shuffles
from fxsvd.capture_record import LEAF_TYPES, Recorder, intercepted, is_leaf
from fxsvd.errors import CaptureError, FxsvdError

__all__ = [
    "BATCH_HINT",
    "LEAF_TYPES",
    "CapturedModule",
    "Switch",
    "capture",
    "concrete",
    "is_leaf",
    "normalize_inputs",
]

_TRAIN_GRAPH = "train_graph"


class Switch(nn.Module):
    """A constant that follows the module's mode, such as the rate of a functional dropout.

    Args:
        train_value: What a call returns in train mode.
        eval_value: What a call returns in eval mode.

    Example:
        >>> rate = Switch(train_value=0.1, eval_value=0.0)
        >>> rate(), rate.eval()()
        (0.1, 0.0)
    """

    def __init__(self, train_value: Any, eval_value: Any) -> None:
        super().__init__()
        self.train_value = train_value
        self.eval_value = eval_value

    def forward(self) -> Any:
        """Returns the value of the current mode."""
        return self.train_value if self.training else self.eval_value

    def extra_repr(self) -> str:
        """Shows both values."""
        return f"train={self.train_value!r}, eval={self.eval_value!r}"


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
        reason = self.meta.get(_TRAIN_GRAPH)
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
        nodes = [_pack(node) for node in self.graph.nodes]
        return _unpickle, (self._state(), nodes, type(self).__name__)

    def _state(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_graph"}

    def _with_graph(self, graph: fx.Graph, class_name: str) -> CapturedModule:
        type(self).__name__ = class_name
        self.graph = graph
        return self


class _Ref(NamedTuple):
    """Stands for a node in a pickled graph."""

    name: str


class _Packed(NamedTuple):
    """A node as plain data; functions are named by where they can be imported from."""

    op: str
    target: str
    args: Any
    kwargs: Any
    name: str
    scope: str


def _pack(node: fx.Node) -> _Packed:
    target = node.target if isinstance(node.target, str) else _get_qualified_name(node.target)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda other: _Ref(other.name))
    return _Packed(node.op, target, args, kwargs, node.name, node.meta.get("scope", ""))


def _unpickle(state: dict[str, Any], nodes: list[_Packed], class_name: str) -> CapturedModule:
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    for packed in nodes:
        target = _import(packed.target) if packed.op == "call_function" else packed.target
        args, kwargs = _unpack((packed.args, packed.kwargs), made)
        node = graph.create_node(packed.op, target, args, kwargs, packed.name)
        node.meta["scope"] = packed.scope
        made[packed.name] = node
    module = CapturedModule.__new__(CapturedModule)
    module.__dict__.update(state)
    return module._with_graph(graph, class_name)


def _unpack(value: Any, made: dict[str, fx.Node]) -> Any:
    if isinstance(value, _Ref):
        return made[value.name]
    if isinstance(value, dict):
        return {key: _unpack(item, made) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*_unpack((value.start, value.stop, value.step), made))
    if isinstance(value, (tuple, list)):
        items = [_unpack(item, made) for item in value]
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return items if isinstance(value, list) else tuple(items)
    return value


def _import(qualified_name: str) -> Any:
    """Finds an object by its dotted name, of which some leading part is a module."""
    parts = qualified_name.split(".") if "." in qualified_name else ["builtins", qualified_name]
    for size in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:size]))
        except ModuleNotFoundError:
            continue
        for name in parts[size:]:
            found = getattr(found, name)
        return found
    raise FxsvdError(f"cannot import {qualified_name}, which a pickled graph calls")


def normalize_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Splits example inputs into the arguments and keyword arguments of a call.

    Args:
        example_inputs: A tensor, a tuple or list (arguments) or a mapping (keyword arguments).

    Example:
        >>> normalize_inputs({"x": 1})
        ((), {'x': 1})
    """
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def capture(model: nn.Module, example_inputs: Any, *, check: bool = True) -> fx.GraphModule:
    """Captures a model as a graph of its layers and torch calls.

    The model is run on fake tensors: no memory is used, and nothing of the model is changed.
    Layers and parameters are shared with the model, not copied. Each node has `meta["val"]`, the
    fake result (the batch size being a symbol, see `concrete`), and `meta["scope"]`, the dotted
    path of the module it was called in.

    Where train mode only changes constants (a functional dropout), `Switch` modules select them.
    Where it changes the structure, the graph holds eval mode, `meta["train_graph"]` of the result
    says why, and `train()` raises.

    Args:
        model: Any module; its parameters may be on the meta device.
        example_inputs: A tensor, a tuple or list (arguments) or a mapping (keyword arguments).
            Dimension 0 of the first tensor is the batch, and so is that of each tensor of the same
            size there; all else is fixed. Inputs that are not tensors are fixed at the value given.
        check: Whether to compare the graph with the model at another batch size.

    Returns:
        The graph module, in the mode of the model where it can be.

    Raises:
        CaptureError: If the model cannot be captured, or differs from its graph.

    Example:
        >>> graph = capture(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.ones(2, 3))
        >>> [node.name for node in graph.graph.nodes]
        ['input_1', '_0', '_1', 'output']
    """
    args, kwargs = normalize_inputs(example_inputs)
    device = _device(model, (args, kwargs))
    fakes = Fakes(device)
    evaluated = _trace(model, fakes, args, kwargs, training=False)
    fakes.ensure_dynamic()
    switches: dict[str, Switch] = {}
    reason = None
    if evaluated.reads_training:
        reason, switches = _merge_train_mode(model, fakes, args, kwargs, evaluated.graph)
    captured = _assemble(model, evaluated, switches, reason)
    if check:
        _check(model, captured, args, kwargs)
    return captured


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        items = {key: _map_tensors(function, item) for key, item in value.items()}
        return items if type(value) is dict else type(value)(**items)
    if isinstance(value, (tuple, list)):
        parts = [_map_tensors(function, item) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _device(model: nn.Module, inputs: Any) -> torch.device:
    """Returns the device everything is on, meta aside."""
    weights = [*model.parameters(), *model.buffers()]
    if any(isinstance(weight, nn.UninitializedParameter) for weight in weights):
        raise CaptureError("the model has lazy layers without parameters: run it once first")
    places = {weight.device for weight in weights if weight.device.type != "meta"}
    given = {tensor.device for tensor in _tensors(inputs) if tensor.device.type != "meta"}
    if len(places) == 1 and given and not given & places:
        (place,), other = places, next(iter(given))
        raise CaptureError(
            f"the example inputs are on {other} and the model is on {place}: move one of them"
        )
    return next(iter([*places, *given]), torch.device("cpu"))


def _batch_size(inputs: Any) -> int | None:
    sizes = [tensor.shape[0] for tensor in _tensors(inputs) if tensor.dim()]
    return sizes[0] if sizes else None


def _is_batched(tensor: Tensor, batch: int | None) -> bool:
    return tensor.dim() > 0 and tensor.shape[0] == batch


def _bind(model: nn.Module, args: Any, kwargs: Any) -> inspect.BoundArguments:
    try:
        return inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise CaptureError(
            f"the example inputs do not fit {type(model).__name__}.forward: {error}"
        ) from error


def _trace(model: nn.Module, fakes: Fakes, args: Any, kwargs: Any, *, training: bool) -> Recorder:
    """Runs the model once in one mode, and restores all that the run changed."""
    bound = _bind(model, args, kwargs)
    batch = _batch_size((args, kwargs))
    recorder = Recorder(model, fakes)
    defaults = _defaults(inspect.signature(model.forward), bound.arguments)
    for name, value in bound.arguments.items():
        _require_plain(name, value)
        fake = _map_tensors(lambda t: fakes.input(t, batched=_is_batched(t, batch)), value)
        bound.arguments[name] = fake
        recorder.placeholder(*defaults[name], fake)
    with _untouched(model, training=training):
        try:
            with intercepted(recorder), fakes.running(), recorder:
                result = model(*bound.args, **bound.kwargs)
                recorder.output(result)
        except Exception as error:
            raise _explain(error, model, recorder, str(fakes.symbol)) from error
    return recorder


def _defaults(
    signature: inspect.Signature, names: Iterable[str]
) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Returns what to call each input node, with stars, and in a tuple its default if any."""
    stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}
    found: dict[str, tuple[str, tuple[Any, ...]]] = {}
    for name in names:
        parameter = signature.parameters[name]
        default: tuple[Any, ...] = ()
        if parameter.default is not parameter.empty:
            is_literal = isinstance(parameter.default, _SWITCHABLE)
            default = (parameter.default if is_literal else None,)
        found[name] = stars.get(parameter.kind.name, "") + name, default
    return found


def _require_plain(name: str, value: Any) -> None:
    """Raises if an input hides tensors where they would be taken for constants."""
    if isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            _require_plain(name, item)
    elif not isinstance(value, (Tensor, *_SWITCHABLE, torch.dtype, torch.device)):
        raise CaptureError(
            f"the input {name} holds a {type(value).__qualname__}: give tensors, numbers, strings, "
            "and tuples, lists and dicts of them"
        )


_MUTABLE = (dict, list, set, OrderedDict)


@contextmanager
def _untouched(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Sets every module's mode; afterwards restores attributes, and what lists and dicts hold."""
    saved = []
    for module in model.modules():
        state = dict(vars(module))
        contents = {
            name: copy.copy(value) for name, value in state.items() if type(value) in _MUTABLE
        }
        saved.append((module, state, contents))
        vars(module)["training"] = training
    try:
        yield
    finally:
        for module, state, contents in saved:
            vars(module).clear()
            vars(module).update(state)
            for name, content in contents.items():
                container = state[name]
                container.clear()
                refill = container.extend if type(content) is list else container.update
                refill(content)


def _explain(error: Exception, model: nn.Module, recorder: Recorder, symbol: str) -> CaptureError:
    """Says what went wrong, in which module, at which line, and what to do."""
    module = recorder.failed_in or model
    path = recorder.path_of(module)
    where = f"{path or 'the root module'} ({type(module).__name__})"
    line = _user_line(error)
    at = f" at {line}" if line else ""
    if isinstance(error, CaptureError):
        return CaptureError(f"in {where}{at}: {error}")
    kind, message = type(error).__name__, str(error).replace(symbol, "batch")
    if kind in _DATA_DEPENDENT:
        return CaptureError(
            f"in {where}{at}: the code depends on the values of a tensor (a branch, .item(), or a "
            f"shape made from data), which a graph cannot hold. Compute it without branching "
            "(torch.where), move it out of forward, or keep this module whole: "
            f"fxsvd.register_layer({type(module).__name__}, ...)."
        )
    if kind in _UNSUPPORTED:
        return CaptureError(
            f"in {where}{at}: an operation cannot run without data: {message}. Keep this module "
            f"whole: fxsvd.register_layer({type(module).__name__}, ...)."
        )
    return CaptureError(
        f"in {where}{at}: the model raised {kind}: {message}. Do the example inputs fit the model?"
    )


_DATA_DEPENDENT = {
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "GuardOnDataDependentSymNode",
}
_UNSUPPORTED = {
    "UnsupportedOperatorException",
    "UnsupportedFakeTensorException",
    "UnsupportedMutationAliasingException",
}
_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


def _user_line(error: BaseException) -> str:
    """The innermost line of the stack that belongs neither to torch nor to this package."""
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        if not frame.filename.startswith(_LIBRARIES):
            return f"{frame.filename}:{frame.lineno}"
    return ""


class _Differs(Exception):  # noqa: N818 (a signal inside this file, not an error)
    """Where the structures of the eval and the train graph part."""


def _merge_train_mode(
    model: nn.Module, fakes: Fakes, args: Any, kwargs: Any, graph: fx.Graph
) -> tuple[str | None, dict[str, Switch]]:
    """Adds to an eval graph what train mode does differently.

    Returns:
        Why it is impossible, or None, and the switches that the graph now calls, by name.
    """
    try:
        trained = _trace(model, fakes, args, kwargs, training=True)
        fakes.ensure_dynamic()
        differences = _differences(graph, trained.graph)
    except (CaptureError, _Differs) as error:
        return str(error), {}
    switches: dict[str, Switch] = {}
    for node, path, eval_value, train_value in differences:
        switch = _switch_node(node, Switch(train_value, eval_value), switches)
        args_and_kwargs = _replace((node.args, node.kwargs), path, switch)
        node.args, node.kwargs = args_and_kwargs
    return None, switches


def _differences(
    graph: fx.Graph, other: fx.Graph
) -> list[tuple[fx.Node, tuple[Any, ...], Any, Any]]:
    """Lists the constants in which two graphs differ: node, path in its arguments, both values."""
    found: list[tuple[fx.Node, tuple[Any, ...], Any, Any]] = []
    nodes, others = list(graph.nodes), list(other.nodes)
    twins = dict(zip(others, nodes, strict=False))
    for node, twin in zip(nodes, others, strict=False):
        if (node.op, node.target) != (twin.op, twin.target):
            raise _Differs(f"{node.name} in eval mode is {twin.name} in train mode")
        pair = (node.args, node.kwargs), (twin.args, twin.kwargs)
        for path, ours, theirs in _leaves(*pair, twins, node):
            found.append((node, path, ours, theirs))
    if len(nodes) != len(others):
        raise _Differs(f"{len(nodes)} operations in eval mode, {len(others)} in train mode")
    return found


def _entries(value: Any) -> dict[Any, Any] | None:
    """The items of a container by key or position, or None."""
    if isinstance(value, (tuple, list)):
        return dict(enumerate(value))
    return value if isinstance(value, dict) else None


def _leaves(
    ours: Any, theirs: Any, twins: dict[fx.Node, fx.Node], node: fx.Node, path: Any = ()
) -> Iterator[tuple[tuple[Any, ...], Any, Any]]:
    items, others = _entries(ours), _entries(theirs)
    if isinstance(ours, fx.Node) or isinstance(theirs, fx.Node):
        if twins.get(theirs) is not ours:
            raise _Differs(f"{node.name} has other inputs in train mode")
    elif items is not None and others is not None and items.keys() == others.keys():
        for key, item in items.items():
            yield from _leaves(item, others[key], twins, node, (*path, key))
    elif type(ours) is not type(theirs) or ours != theirs:
        if not isinstance(ours, _SWITCHABLE) or not isinstance(theirs, _SWITCHABLE):
            raise _Differs(f"{node.name} has other arguments in train mode")
        yield path, ours, theirs


_SWITCHABLE = (bool, int, float, str, type(None))


def _switch_node(node: fx.Node, switch: Switch, switches: dict[str, Switch]) -> fx.Node:
    """Calls the switch before a node; equal switches are shared."""
    wanted = switch.extra_repr()
    call: fx.Node
    for call in node.graph.find_nodes(op="call_module", sort=False) if switches else ():
        known = switches.get(str(call.target))
        if known is not None and known.extra_repr() == wanted:
            return call
    name = f"_switch{len(switches)}"
    switches[name] = switch
    with node.graph.inserting_before(node):
        call = node.graph.call_module(name)
    call.meta.update(val=switch.eval_value, scope=node.meta["scope"])
    return call


def _replace(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Rebuilds nested tuples, lists and dicts with one item replaced."""
    if not path:
        return new
    items = dict(value) if isinstance(value, dict) else list(value)
    items[path[0]] = _replace(value[path[0]], path[1:], new)
    return tuple(items) if isinstance(value, tuple) else items


def _assemble(
    model: nn.Module, recorder: Recorder, switches: dict[str, Switch], reason: str | None
) -> CapturedModule:
    """Builds the result: the model's tree of modules, with the graph as its forward."""
    captured = CapturedModule(nn.Module(), fx.Graph(), type(model).__name__)
    frozen = reason is not None and any(module.training for module in model.modules())
    shells = _Shells(eval_mode=frozen)
    shells.fill(captured, model)
    for name, constant in recorder.constants.items():
        captured.register_buffer(name, constant.detach(), persistent=False)
    for name, switch in switches.items():
        switch.training = captured.training
        captured._modules[name] = switch
    if reason is not None:
        captured.meta[_TRAIN_GRAPH] = reason
    name_shuffles(recorder.graph)
    captured.graph = recorder.graph
    return captured


class _Shells:
    """Mirrors a tree of modules: leaves are the originals, all else plain modules with the same."""

    def __init__(self, *, eval_mode: bool) -> None:
        self._eval_mode = eval_mode
        self._made: dict[int, nn.Module] = {}

    def fill(self, shell: nn.Module, module: nn.Module) -> None:
        """Gives a shell the parameters, buffers, children and mode of a module."""
        shell._parameters.update(module._parameters)
        shell._buffers.update(module._buffers)
        shell._non_persistent_buffers_set |= module._non_persistent_buffers_set
        shell.training = module.training and not self._eval_mode
        for name, child in module._modules.items():
            shell._modules[name] = None if child is None else self._mirror(child)

    def _mirror(self, module: nn.Module) -> nn.Module:
        if id(module) not in self._made:
            if not is_leaf(module):
                shell = self._made[id(module)] = nn.Module()
                self.fill(shell, module)
            elif self._eval_mode:
                self._made[id(module)] = self._leaf_in_eval_mode(module)
            else:
                self._made[id(module)] = module
        return self._made[id(module)]

    def _leaf_in_eval_mode(self, module: nn.Module) -> nn.Module:
        # The model is in a mode its graph cannot follow, and must not be changed: the graph gets
        # leaves of its own, with the same parameters.
        leaf = copy.copy(module)
        for name in ("_parameters", "_buffers", "_modules"):
            vars(leaf)[name] = dict(vars(leaf)[name])
        leaf._modules = {
            name: child and self._mirror(child) for name, child in leaf._modules.items()
        }
        leaf.training = False
        return leaf


def _check(model: nn.Module, captured: CapturedModule, args: Any, kwargs: Any) -> None:
    """Compares the graph with the model at a batch size that capture has not seen.

    Raises:
        CaptureError: If their results differ.
    """
    held = [*model.parameters(), *model.buffers(), *_tensors((args, kwargs))]
    if any(tensor.device.type == "meta" for tensor in held):
        captured.meta["check"] = "skipped: no data on the meta device"
        return
    batch = _batch_size((args, kwargs))
    size = 2 if batch == 3 else 3
    inputs = _map_tensors(
        lambda t: _resize(t, size) if _is_batched(t, batch) else t, (args, kwargs)
    )
    with _untouched(model, training=False), _untouched(captured, training=False):
        expected = _run(model, inputs, seed=0)
        difference = _difference(_run(captured, inputs, seed=0), expected)
        if difference and _difference(_run(model, inputs, seed=1), expected):
            captured.meta["check"] = "skipped: the model is random in eval mode"
        elif difference:
            raise CaptureError(
                f"the graph differs from {type(model).__name__} at batch size {size}: "
                f"{difference}. Its forward does something that a graph cannot hold, such as "
                "fixing the batch size, or computing with NumPy."
            )


def _resize(tensor: Tensor, size: int) -> Tensor:
    repeats = -(-size // tensor.shape[0])
    return torch.cat([tensor] * repeats)[:size]


def _run(model: nn.Module, inputs: Any, seed: int) -> Any:
    """Runs a model without a trace: buffers, the random state and the inputs do not change."""
    args, kwargs = _map_tensors(torch.clone, inputs)
    buffers = [(buffer, buffer.clone(), buffer._version) for buffer in model.buffers()]
    cuda = {tensor.device.index for tensor in _tensors(inputs) if tensor.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=cuda), torch.no_grad():
            torch.manual_seed(seed)
            return model(*args, **kwargs)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} raised {type(error).__name__} at another batch size than that "
            f"of the example inputs: {error}"
        ) from error
    finally:
        with torch.no_grad():
            for buffer, content, version in buffers:
                if buffer._version != version:
                    buffer.copy_(content)


_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def _difference(actual: Any, expected: Any) -> str:
    """Says how two results differ, "" if they do not but for rounding."""
    ours, theirs = _tensors(actual), _tensors(expected)
    if len(ours) != len(theirs):
        return f"{len(ours)} tensors instead of {len(theirs)}"
    for left, right in zip(ours, theirs, strict=True):
        if left.shape != right.shape or left.dtype != right.dtype:
            return f"{left.dtype} {list(left.shape)} instead of {right.dtype} {list(right.shape)}"
        if not left.is_floating_point():
            if not torch.equal(left, right):
                return "integers differ"
            continue
        # The largest finite value; networks with random weights may well overflow.
        finite = right[right.isfinite()]
        scale = finite.abs().max().clamp_min(1e-12) if finite.numel() else 1.0
        tolerance = _TOLERANCE.get(right.dtype, 2e-2)
        if not torch.allclose(left / scale, right / scale, rtol=0, atol=tolerance, equal_nan=True):
            return f"up to {((left - right).abs().max() / scale).item():.2g} of the largest value"
    return ""
