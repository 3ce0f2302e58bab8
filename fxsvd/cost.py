"""What a network costs: parameters, multiply-accumulates, bytes, activation memory, seconds.

All but the seconds is read off a captured graph, whose ``node.meta["val"]`` are fake tensors with a
symbolic batch: nothing is computed. Figures are for one sample unless another batch is asked for,
and exact for any batch, because the batch is substituted into every symbolic size.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxsvd.capture import normalize_inputs
from fxsvd.macs import at_batch, macs, macs_by_node
from fxsvd.running import run_with

__all__ = [
    "Cost",
    "bytes_of",
    "evaluating",
    "latencies",
    "latency",
    "macs",
    "macs_by_node",
    "measure",
    "metric",
    "parameters",
    "peak_activation_bytes",
]


@dataclass(frozen=True)
class Cost:
    """The size of a network; MACs and activation memory are for one sample.

    Attributes:
        parameters: Scalars in the parameters; a shared parameter counts once.
        macs: Multiply-accumulates of one forward pass.
        bytes: Bytes of parameters and buffers.
        activation_bytes: Peak bytes of the activations that are alive at the same time.

    >>> print(Cost(25_557_032, 4_089_184_256, 102_441_480, 9_633_792))
    25.6 M parameters · 4.09 G MACs · 102 MB weights · 9.63 MB activations
    """

    parameters: int
    macs: int
    bytes: int
    activation_bytes: int

    def __str__(self) -> str:
        return (
            f"{metric(self.parameters)} parameters · {metric(self.macs)} MACs · "
            f"{metric(self.bytes)}B weights · {metric(self.activation_bytes)}B activations"
        )


def metric(number: float) -> str:
    """A number to three significant digits and its metric prefix, ready for a unit.

    >>> metric(4_089_184_256), metric(999_900), metric(512)
    ('4.09 G', '1.00 M', '512 ')
    """
    for exponent, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 0.9995 * 10**exponent:
            return f"{number / 10**exponent:#.3g}".rstrip(".") + f" {prefix}"
    return f"{number:.3g} "


def measure(graph: fx.GraphModule) -> Cost:
    """The cost of a captured graph, for one sample.

    >>> from fxsvd.capture import capture
    >>> measure(capture(nn.Linear(3, 2), torch.zeros(5, 3)))
    Cost(parameters=8, macs=6, bytes=32, activation_bytes=20)
    """
    return Cost(parameters(graph), macs(graph), bytes_of(graph), peak_activation_bytes(graph))


def parameters(module: nn.Module) -> int:
    """The number of scalars in a module's parameters; a shared parameter counts once.

    >>> tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    >>> tied[1].weight = tied[0].weight
    >>> parameters(tied)
    16
    """
    return sum(parameter.numel() for parameter in module.parameters())


def bytes_of(module: nn.Module) -> int:
    """The bytes of a module's parameters and buffers; a shared tensor counts once.

    >>> bytes_of(nn.BatchNorm1d(4))  # four float32 vectors and an int64 counter
    72
    """
    tensors = chain(module.parameters(), module.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def peak_activation_bytes(graph: fx.GraphModule, batch: int = 1) -> int:
    """The most bytes of activations that are alive at once in a forward pass without gradients.

    A storage lives from the node that makes it to the last user of any of its views; inputs live
    throughout, as the caller holds them. Which values share a storage (views, in-place results) is
    found by running the graph on fake tensors, so it is exact. Not counted: weights, scratch memory
    inside an operator or a leaf layer, and what an allocator adds for alignment.

    >>> from fxsvd.capture import capture
    >>> net = nn.Sequential(nn.Linear(4, 100), nn.ReLU(inplace=True), nn.Linear(100, 4))
    >>> peak_activation_bytes(capture(net, torch.zeros(2, 4)))  # input, hidden, output
    432
    """
    change = [0] * (len(graph.graph.nodes) + 1)
    for size, first, last in _lives(graph, batch):
        change[first] += size
        change[last + 1] -= size
    return max(accumulate(change))


def _lives(graph: fx.GraphModule, batch: int) -> Iterator[tuple[int, int, int]]:
    """Bytes, first and last position of every storage that holds activations."""
    position = {node: index for index, node in enumerate(graph.graph.nodes)}
    sizes: dict[int, int] = {}
    moments: defaultdict[int, list[int]] = defaultdict(list)
    for node, value in _values_on_fakes(graph, batch).items():
        uses = [position[user] for user in node.users]
        uses += [len(position) - 1] if node.op == "placeholder" else [position[node]]
        for storage in _storages(value):
            identity = storage._cdata  # a storage's Python object is not always the same
            sizes[identity] = 0 if node.op == "get_attr" else sizes.get(identity, storage.nbytes())
            moments[identity] += [position[node], *uses]
    for identity, alive in moments.items():
        yield sizes[identity], min(alive), max(alive)


def _values_on_fakes(graph: fx.GraphModule, batch: int) -> dict[fx.Node, Any]:
    """The value of every node, all kept alive so that two storages never share an identity."""
    placeholders = graph.graph.find_nodes(op="placeholder")
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), evaluating(graph):
        inputs = [at_batch(node.meta["val"], batch) for node in placeholders]
        device = next((item.device for item in inputs if isinstance(item, Tensor)), None)
        fake = partial(torch.empty_like, device=device)
        values = run_with(_NodeByNode(graph), fake, tuple(inputs))
    return cast("dict[fx.Node, Any]", values)


class _NodeByNode(nn.Module):
    """Runs a graph and returns the value of every node, instead of the graph's output."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, *inputs: Any) -> dict[fx.Node, Any]:
        interpreter = _OneValueEach(self.graph, garbage_collect_values=False)
        interpreter.run(*inputs, enable_io_processing=False)
        return interpreter.env


class _OneValueEach(fx.Interpreter):
    """Takes one value per placeholder, also where that stands for ``*args`` or ``**kwargs``."""

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return next(self.args_iter)


def _storages(value: Any) -> Iterator[torch.UntypedStorage]:
    if isinstance(value, Tensor):
        yield value.untyped_storage()
    elif isinstance(value, Mapping):
        yield from _storages(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _storages(item)


def latency(module: nn.Module, inputs: Any, *, runs: int = 20, warmup: int = 3) -> float:
    """The median seconds of a forward pass, in eval mode and without gradients.

    Args:
        module: Left as it was, its mode included.
        inputs: A tensor, a tuple (args) or a dict (kwargs), on the module's device.
        runs: Measured passes.
        warmup: Passes before the first measured one.

    >>> 0 < latency(nn.Linear(3, 2), torch.zeros(1, 3)) < 1
    True
    """
    return latencies([module], inputs, runs=runs, warmup=warmup)[0]


def latencies(
    modules: Sequence[nn.Module], inputs: Any, *, runs: int = 20, warmup: int = 3
) -> list[float]:
    """The `latency` of each module, measured in turns so that a busy machine slows all alike.

    >>> before, after = latencies([nn.Linear(512, 512), nn.Linear(512, 8)], torch.zeros(64, 512))
    >>> before > after
    True
    """
    args, kwargs = normalize_inputs(inputs)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for module in modules:
            stack.enter_context(evaluating(module))
        rounds = [
            [_seconds(module, args, kwargs) for module in modules] for _ in range(warmup + runs)
        ]
    return [statistics.median(measured) for measured in zip(*rounds[warmup:], strict=True)]


def _seconds(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    _synchronize()
    start = time.perf_counter()
    module(*args, **kwargs)
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every submodule has its own mode again.

    >>> net = nn.Sequential(nn.Dropout().eval(), nn.Dropout())
    >>> with evaluating(net):
    ...     net[1].training
    False
    >>> net[0].training, net[1].training
    (False, True)
    """
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training
