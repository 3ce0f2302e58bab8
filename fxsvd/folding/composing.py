"""Linear maps with nothing between them: which of them one layer can stand in for.

Convolutions compose to one where every spatial dimension is worked on (a kernel longer than 1, a
stride, padding) by one of them at most, and no bias meets the zeros that a later one pads with.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from fxsvd.data.readers import Reader
from fxsvd.edits import Part
from fxsvd.layers import CONVOLUTIONS
from fxsvd.substitution import common_groups, convolution_part, linear_part, merged


@dataclass(frozen=True, eq=False)
class Run:
    """Layers that see nothing but each other's outputs.

    Attributes:
        layers: their paths, in order.
        between: behind each but the last, the layers that do nothing and go with it.
    """

    layers: tuple[str, ...]
    between: tuple[tuple[str, ...], ...] = ()


def idle(module: nn.Module) -> bool:
    """Whether a layer hands on what it gets, in train mode too.

    >>> idle(nn.Identity()), idle(nn.Dropout(0.0)), idle(nn.Dropout(0.1))
    (True, True, False)
    """
    hooked = module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module)
    off = isinstance(module, nn.modules.dropout._DropoutNd) and module.p == 0
    return not hooked and (off or type(module) is nn.Identity)


def behind(
    graph: fx.GraphModule, node: fx.Node, nothing: Callable[[str], bool]
) -> tuple[fx.Node | None, tuple[str, ...]]:
    """The only user of a value, past layers that do nothing; and those.

    Args:
        graph: the captured graph.
        node: whose value it is.
        nothing: whether a layer of that path does nothing.

    >>> graph = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.Identity(), nn.ReLU()))
    >>> user, passed = behind(graph, calls(graph, "0")[0], lambda path: path == "1")
    >>> user.target, passed
    ('2', ('1',))
    """
    passed: list[str] = []
    while len(node.users) == 1:
        (user,) = node.users
        path = str(user.target)
        if user.op != "call_module" or not nothing(path) or len(calls(graph, path)) > 1:
            return user, tuple(passed)
        passed.append(path)
        node = user
    return None, tuple(passed)


def calls(graph: fx.GraphModule, path: str) -> list[fx.Node]:
    """The calls of a layer.

    >>> [n.name for n in calls(fx.symbolic_trace(nn.Sequential(nn.ReLU())), "0")]
    ['_0']
    """
    return [n for n in graph.graph.nodes if n.op == "call_module" and n.target == path]


def runs(
    graph: fx.GraphModule, plain: Mapping[str, Reader], gone: frozenset[str] = frozenset()
) -> list[Run]:
    """The longest runs of linear layers or of convolutions, each called once.

    Args:
        graph: the captured graph.
        plain: layers that may be replaced.
        gone: layers that will do nothing, such as norms that are folded.

    >>> from fxsvd.capture import capture
    >>> from fxsvd.dependency import analyze
    >>> from fxsvd.folding.plain import plain_layers
    >>> import torch
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.Identity(), nn.Linear(3, 2), nn.ReLU())
    >>> deps = analyze(capture(net, torch.zeros(2, 2)))
    >>> runs(deps.analysis.graph, plain_layers(deps, last=True)[0])
    [Run(layers=('0', '2'), between=(('1',),))]
    """
    once = {r.calls[0]: r for r in plain.values() if len(r.calls) == 1}

    def nothing(path: str) -> bool:
        return path in gone or idle(graph.get_submodule(path))

    after: dict[str, tuple[str, tuple[str, ...]]] = {}
    for node, reader in once.items():
        user, between = behind(graph, node, nothing)
        follower = once.get(user) if user is not None else None
        if follower is not None and _alike(reader.module, follower.module):
            after[reader.layer] = follower.layer, between
    out = []
    for first in after.keys() - {layer for layer, _ in after.values()}:
        layers, between_all = [first], []
        while layers[-1] in after:
            layer, between = after[layers[-1]]
            layers.append(layer)
            between_all.append(between)
        out.append(Run(tuple(layers), tuple(between_all)))
    order = {n: i for i, n in enumerate(plain)}
    return sorted(out, key=lambda run: order[run.layers[0]])


def _alike(a: nn.Module, b: nn.Module) -> bool:
    if isinstance(a, nn.Linear) or isinstance(b, nn.Linear):
        return isinstance(a, nn.Linear) and isinstance(b, nn.Linear)
    return a.get_parameter("weight").dim() == b.get_parameter("weight").dim()


def obstacle(layers: Sequence[Any]) -> str | None:
    """Why no single layer computes what a chain does, if so.

    >>> obstacle([nn.Conv2d(2, 2, 1, bias=False), nn.Conv2d(2, 2, 3, padding=1)])
    >>> obstacle([nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 3, padding=1)])
    'a bias meets the zeros that a later one pads with'
    """
    if not isinstance(layers[0], CONVOLUTIONS):
        return None
    for dim in range(len(layers[0].kernel_size)):
        if sum(_works(layer, dim) for layer in layers) > 1:
            return "two of them work on one spatial dimension"
        if any(_padding(layer, dim) % 1 for layer in layers):
            return "one pads more behind than before"
    for i, layer in enumerate(layers):
        padded = any(_padding(layer, dim) for dim in range(len(layer.kernel_size)))
        before = (one.bias for one in layers[:i])
        biased = any(b is not None and bool((b != 0).any()) for b in before)
        if padded and layer.padding_mode == "zeros" and biased:
            return "a bias meets the zeros that a later one pads with"
    return "they pad in different ways" if len(_modes(layers)) > 1 else None


def _modes(layers: Sequence[Any]) -> set[str]:
    dims = range(len(layers[0].kernel_size))
    return {c.padding_mode for c in layers if any(_padding(c, d) for d in dims)}


def _works(layer: Any, dim: int) -> bool:
    return layer.kernel_size[dim] > 1 or layer.stride[dim] > 1 or _padding(layer, dim) > 0


def _padding(layer: Any, dim: int) -> float:
    """Zeros in front; with "same" the mean of those in front and behind."""
    if layer.padding == "valid":
        return 0
    if layer.padding == "same":
        return float(layer.dilation[dim] * (layer.kernel_size[dim] - 1) / 2)
    return float(layer.padding[dim])


def size(layers: Sequence[nn.Module]) -> int:
    """Numbers in the weight and bias of the one layer for a chain that composes.

    >>> size([nn.Linear(4, 1), nn.Linear(1, 5)]), size([nn.Linear(4, 1, bias=False)])
    (25, 4)
    """
    if len(layers) == 1:
        return sum(p.numel() for p in layers[0].parameters())
    first, last = layers[0].get_parameter("weight"), layers[-1].get_parameter("weight")
    groups = common_groups(layers)
    into = first.shape[1] * int(getattr(layers[0], "groups", 1)) // groups
    kernels = [tuple(layer.get_parameter("weight").shape[2:]) for layer in layers]
    area = math.prod(max(sizes) for sizes in zip(*kernels, strict=True))
    biased = any(layer.bias is not None for layer in layers)
    return int(len(last) * (into * area + biased))


def composed(layers: Sequence[nn.Module]) -> Part:
    """The one layer, as data in float64, that computes what a chain without obstacle does.

    >>> part = composed([nn.Conv1d(2, 1, 3, padding=1, bias=False), nn.Conv1d(1, 4, 1)])
    >>> part.tensors["weight"].shape, part.options["padding"]
    (torch.Size([4, 2, 3]), (1,))
    """
    weight, bias = merged(layers)
    if not isinstance(layers[0], CONVOLUTIONS):
        return linear_part(weight, bias)
    return convolution_part(weight, bias, **_options(layers))


def _options(layers: Sequence[Any]) -> dict[str, Any]:
    """Of every dimension the settings of the layer that works on it."""
    dims = range(len(layers[0].kernel_size))
    worker = [next((c for c in layers if _works(c, d)), layers[0]) for d in dims]
    modes = _modes(layers)
    return {
        "stride": tuple(c.stride[d] for d, c in enumerate(worker)),
        "padding": tuple(int(_padding(c, d)) for d, c in enumerate(worker)),
        "dilation": tuple(c.dilation[d] for d, c in enumerate(worker)),
        "groups": common_groups(layers),
        "padding_mode": modes.pop() if modes else "zeros",
    }


def double_copy(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A layer in float64 with other numbers.

    >>> double_copy(nn.ReLU(), 2 * nn.Linear(2, 2).weight, None).weight.dtype
    torch.float64
    """
    twin = copy.copy(layer)
    twin._parameters = {
        "weight": nn.Parameter(weight.double(), requires_grad=False),
        "bias": None if bias is None else nn.Parameter(bias.double(), requires_grad=False),
    }
    return twin


def partition(layers: Sequence[nn.Module], *, always: bool = False) -> list[range]:
    """Which stretches of a run to make one layer of: those that leave the fewest numbers.

    Args:
        layers: the run.
        always: the fewest layers instead, whatever they hold.

    >>> partition([nn.Linear(4, 9), nn.Linear(9, 4), nn.Linear(4, 1), nn.Linear(1, 4)])
    [range(0, 3), range(3, 4)]
    """
    best: list[tuple[tuple[float, float], list[range]]] = [((0, 0), [])]
    for end in range(1, len(layers) + 1):
        options = []
        for start in range(end):
            chunk = layers[start:end]
            if len(chunk) == 1 or obstacle(chunk) is None:
                (a, b), ranges = best[start]
                numbers = size(chunk)
                cost = (a + 1, b + numbers) if always else (a + numbers, b + 1)
                options.append((cost, [*ranges, range(start, end)]))
        best.append(min(options, key=lambda option: option[0]))
    return best[-1][1]
