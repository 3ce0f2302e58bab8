"""Readers: the linear layers and convolutions of a graph, as maps whose inputs are channels.

A reader computes y = W x + b of each *row* x of its input: a feature vector of a linear layer, a
patch of a convolution (input channel slowest, as ``torch.nn.functional.unfold`` orders it). With
groups there are as many such maps, side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxsvd.analysis import Parameter
from fxsvd.data.lookups import lookup, output_size, read
from fxsvd.dependency import Dependencies
from fxsvd.layers import BATCH_NORMS, CONVOLUTIONS
from fxsvd.relations import Atoms

_FORWARDS = {k.forward for k in (nn.Linear, *CONVOLUTIONS)}


@dataclass(frozen=True, eq=False)
class Reader:
    """A linear layer or convolution.

    Attributes:
        layer: its path.
        module: the layer.
        calls: its calls, in order.
        weight: its weight.
        channels: the channel of each input feature; -1 where nobody may narrow it.
        norm: the path of the batch norm that alone sees its output, if any.
    """

    layer: str
    module: nn.Module
    calls: tuple[fx.Node, ...]
    weight: Parameter
    channels: Atoms
    norm: str | None

    @property
    def groups(self) -> int:
        """How many maps lie side by side."""
        return int(getattr(self.module, "groups", 1))

    @property
    def patch(self) -> int:
        """How many entries of a row an input channel has (kernel positions)."""
        return int(np.prod(getattr(self.module, "kernel_size", ()), dtype=np.int64))

    @property
    def depthwise(self) -> bool:
        """Whether every channel is read by outputs of its own alone."""
        return self.groups > 1 and self.groups == len(self.channels)

    def matrices(self, weight: Tensor | None = None) -> Tensor:
        """The weight as float64 ``[groups, out / groups, row]``."""
        value = (self.weight.value if weight is None else weight).detach().double()
        return value.reshape(self.groups, len(value) // self.groups, -1)

    def entries(self) -> Atoms:
        """The channel of each entry of a row, ``[groups, row]``."""
        return np.repeat(self.channels, self.patch).reshape(self.groups, -1)


def readers(deps: Dependencies) -> dict[str, Reader]:
    """All layers of a graph whose weights can be refitted to data, by path, in order of execution.

    Layers that compute their weight on the way (weight norm, standardised convolutions) or pad by a
    rule of their own are none, nor are those that share their weight with another layer.

    >>> from fxsvd.capture import capture
    >>> from fxsvd.dependency import analyze
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    >>> found = readers(analyze(capture(net, torch.zeros(2, 3, 8, 8))))
    >>> [(r.layer, len(r.channels), r.patch) for r in found.values()]
    [('0', 3, 9), ('2', 8, 1)]
    """
    graph = deps.analysis.graph
    by_name = {name: p for p in deps.analysis.parameters.values() for name in p.names}
    found: dict[str, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module" and _is_plain(graph.get_submodule(str(node.target))):
            found.setdefault(str(node.target), []).append(node)
    out = {}
    for layer, calls in found.items():
        weight = by_name.get(f"{layer}.weight")
        if weight is not None and len(weight.names) == 1:
            module = graph.get_submodule(layer)
            channels = _channels(deps, weight, module)
            out[layer] = Reader(
                layer, module, tuple(calls), weight, channels, _norm_behind(graph, calls)
            )
    return out


def _is_plain(module: nn.Module) -> bool:
    changed = module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module)
    return type(module).forward in _FORWARDS and not changed


def _channels(deps: Dependencies, weight: Parameter, module: nn.Module) -> Atoms:
    groups = int(getattr(module, "groups", 1))
    width = weight.value.shape[1] * groups
    out = np.full(width, -1, dtype=np.int64)
    if groups > 1 and groups == width:
        atoms = weight.type.vector(0)
        per_channel = None if atoms is None else atoms[:: len(atoms) // groups]
    else:
        blocks = [b for b in weight.type.blocks if b.dims[-1] == 1]
        atoms = blocks[0].atoms if blocks else None
        per_channel = None if atoms is None else _by_group(atoms, groups)
    if per_channel is not None:
        out[:] = deps.channels.of[per_channel]
    return out


def _by_group(atoms: Atoms, groups: int) -> Atoms:
    """From ``[out, in / groups]``, the same in all rows of a group; or the same in all groups."""
    return np.tile(atoms, groups) if atoms.ndim == 1 else atoms[:: len(atoms) // groups].ravel()


def _norm_behind(graph: fx.GraphModule, calls: list[fx.Node]) -> str | None:
    """The batch norm in eval statistics that is the only user of the only call."""
    users = list(calls[0].users)
    if len(calls) > 1 or len(users) != 1 or users[0].op != "call_module":
        return None
    target = str(users[0].target)
    norm = graph.get_submodule(target)
    called = [n for n in graph.graph.nodes if n.op == "call_module" and n.target == target]
    plain = isinstance(norm, BATCH_NORMS) and norm.track_running_stats
    return target if plain and len(called) == 1 else None


# ---------------------------------------------------------------- rows of inputs and outputs


def positions(module: nn.Module, x: Tensor) -> int:
    """How many rows one sample of an input has."""
    if isinstance(module, nn.Linear):
        return int(np.prod(x.shape[1:-1], dtype=np.int64))
    return int(np.prod(output_size(module, x), dtype=np.int64))


def input_rows(module: nn.Module, x: Tensor, where: Tensor) -> Tensor:
    """Rows of a reader's input.

    Args:
        module: a linear layer or convolution.
        x: its input, with a batch dimension.
        where: numbers of rows: ``sample * positions + position``.

    Returns:
        ``[rows, groups, row]``; of a convolution's patches only these are ever made.
    """
    return read(module, x, lookup(module, x, where))


def output_rows(module: nn.Module, y: Tensor, where: Tensor) -> Tensor:
    """The same rows of a reader's output, ``[rows, out]``."""
    if isinstance(module, nn.Linear):
        return y.reshape(-1, y.shape[-1])[where]
    return _at(y, torch.unravel_index(where, (y.shape[0], *y.shape[2:])))


def _at(values: Tensor, index: tuple[Tensor, ...]) -> Tensor:
    """Rows of ``[batch, channels, *positions, …]`` at samples and positions."""
    sample, *position = index
    return values.movedim(1, len(index))[(sample, *position)]
