"""Which layers may be replaced by others, and why the rest may not."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, fx, nn

from fxsvd.capture import capture
from fxsvd.data.readers import Reader, readers
from fxsvd.dependency import Dependencies, analyze

MATRICES = (
    nn.Linear,
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_NOT_PLAIN = (
    "it computes or pads by a rule of its own, has hooks, is transposed, or shares its weight"
)


def plain_layers(deps: Dependencies, *, last: bool) -> tuple[dict[str, Reader], dict[str, str]]:
    """Linear layers and convolutions that others can stand in for; why the rest are none.

    Args:
        deps: what ``fxsvd.analyze`` found.
        last: also layers behind which there is no other.

    Returns:
        Readers by path, and reasons by path, in order of execution.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> plain, left = plain_layers(analyze(capture(net, torch.zeros(2, 3))), last=False)
    >>> list(plain), left
    (['0'], {'2': "it is the network's last layer (last=True takes it too)"})
    """
    graph = deps.analysis.graph
    found, left = readers(deps), {}
    for layer in dict.fromkeys(calls_of(graph, MATRICES)):
        if layer not in found:
            left[layer] = _NOT_PLAIN
        elif not alone(graph, layer):
            left[layer] = "its parameters are used elsewhere too"
        elif not last and _is_last(graph, found[layer].calls):
            left[layer] = "it is the network's last layer (last=True takes it too)"
    return {n: r for n, r in found.items() if n not in left}, left


def reader_of(layer: nn.Module, x: Tensor) -> Reader:
    """A layer by itself as a reader, to try things out on.

    Args:
        layer: a linear layer or convolution.
        x: an example input.

    >>> import torch
    >>> reader_of(nn.Linear(3, 4), torch.zeros(2, 3)).layer
    '0'
    """
    return readers(analyze(capture(nn.Sequential(layer), x, check=False)))["0"]


def calls_of(graph: fx.GraphModule, kinds: tuple[type[nn.Module], ...]) -> list[str]:
    """Paths of the called layers of some kinds, call by call.

    >>> calls_of(fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU())), (nn.ReLU,))
    ['1']
    """
    called = [str(n.target) for n in graph.graph.nodes if n.op == "call_module"]
    return [path for path in called if isinstance(graph.get_submodule(path), kinds)]


def alone(graph: fx.GraphModule, layer: str) -> bool:
    """Whether nothing but the calls of a layer uses its parameters or what is in it.

    >>> alone(fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2))), "0")
    True
    """
    for node in graph.graph.nodes:
        target = str(node.target)
        if node.op == "get_attr" and target.startswith(f"{layer}."):
            return False
        if node.op == "call_module" and layer.startswith(f"{target}."):
            return False
    own = set(map(id, graph.get_submodule(layer).parameters()))
    named = graph.named_parameters(remove_duplicate=False)
    return not any(id(p) in own and not n.startswith(f"{layer}.") for n, p in named)


def _is_last(graph: fx.GraphModule, calls: Iterable[fx.Node]) -> bool:
    """Whether no other layer sees what a layer puts out."""
    seen, todo = set(), [user for call in calls for user in call.users]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), MATRICES):
            return False
        todo += node.users
    return True
