"""Affine steps that a neighbouring layer takes over: norms in eval mode, pools that only copy.

A batch norm in eval mode is y = s x + t per channel. The layer in front of it becomes s W and
s b + t; the layer behind it W s and b + W t, unless it pads with zeros: those came behind the norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxsvd.data.readers import Reader
from fxsvd.folding.composing import behind, calls, idle
from fxsvd.folding.plain import alone
from fxsvd.layers import BATCH_NORMS, CONVOLUTIONS

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = {nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward}


@dataclass(eq=False)
class Numbers:
    """The weight and bias that a layer is going to have, in float64.

    Attributes:
        weight: in the shape of the layer's, but for inputs that were merged.
        bias: one number per output, or None.
        touched: they differ from those that it has.
    """

    weight: Tensor
    bias: Tensor | None
    touched: bool = False

    @classmethod
    def of(cls, module: nn.Module) -> Numbers:
        """Of a layer as it is."""
        bias = module.bias
        held = bias.detach().double() if isinstance(bias, Tensor) else None
        return cls(module.get_parameter("weight").detach().double(), held)

    def scale_outputs(self, module: nn.Module, scale: Tensor, shift: Tensor) -> None:
        """Take over y ← s y + t behind the layer.

        >>> numbers = Numbers(torch.ones(2, 1).double(), None)
        >>> two = torch.full((2,), 2.0).double()
        >>> numbers.scale_outputs(nn.Linear(1, 2, bias=False), two, two)
        >>> numbers.weight.flatten().tolist(), numbers.bias.tolist()
        ([2.0, 2.0], [2.0, 2.0])
        """
        rest = [1] * (self.weight.dim() - 2)
        if isinstance(module, TRANSPOSED):
            groups = module.groups
            w = self.weight.reshape(groups, -1, *self.weight.shape[1:])
            self.weight = (w * scale.reshape(groups, 1, -1, *rest)).reshape(self.weight.shape)
        else:
            self.weight = self.weight * scale.reshape(-1, 1, *rest)
        self.bias = shift if self.bias is None else self.bias * scale + shift
        self.touched = True

    def scale_inputs(self, groups: int, scale: Tensor, shift: Tensor) -> None:
        """Take over x ← s x + t in front of the layer.

        >>> numbers = Numbers(torch.ones(1, 2).double(), None)
        >>> numbers.scale_inputs(1, torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0]))
        >>> numbers.weight.tolist(), numbers.bias.tolist()
        ([[1.0, 2.0]], [1.0])
        """
        rest = [1] * (self.weight.dim() - 2)
        shape = self.weight.shape
        w = self.weight.reshape(groups, -1, *shape[1:])
        moved = (w * shift.double().reshape(groups, 1, -1, *rest)).flatten(2).sum(2).flatten()
        self.bias = moved if self.bias is None else self.bias + moved
        self.weight = (w * scale.double().reshape(groups, 1, -1, *rest)).reshape(shape)
        self.touched = True

    def merge_copies(self, copies: int) -> None:
        """Read every input once where it came so many times, one copy behind the other.

        >>> numbers = Numbers(torch.arange(4.0)[None], None)
        >>> numbers.merge_copies(2)
        >>> numbers.weight.tolist()
        [[1.0, 5.0]]
        """
        out = len(self.weight)
        self.weight = self.weight.reshape(out, -1, copies).sum(2)
        self.touched = True


def affine(norm: Any) -> tuple[Tensor, Tensor]:
    """The s and t of a batch norm in eval mode.

    >>> norm = nn.BatchNorm1d(1, eps=0.0)
    >>> [v.item() for v in affine(norm)]
    [1.0, 0.0]
    """
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()


def plain_norm(graph: fx.GraphModule, node: fx.Node) -> str | None:
    """The path of the batch norm that a node calls, if it is called once and nothing is odd.

    >>> from fxsvd.capture import capture
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    >>> graph = capture(net, torch.zeros(2, 3, 5, 5))
    >>> [plain_norm(graph, node) for node in graph.graph.nodes]
    [None, None, '1', None, None]
    """
    if node.op != "call_module":
        return None
    path = str(node.target)
    norm: Any = graph.get_submodule(path)
    usual = isinstance(norm, BATCH_NORMS) and type(norm).forward in _NORMS
    if not usual or norm._forward_pre_hooks or norm._forward_hooks or "forward" in vars(norm):
        return None
    known = norm.running_mean is not None and norm.track_running_stats
    return path if known and len(calls(graph, path)) == 1 and alone(graph, path) else None


def norm_after(graph: fx.GraphModule, layer: str) -> str | None:
    """The batch norm that alone sees what a layer puts out.

    >>> from fxsvd.capture import capture
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    >>> graph = capture(net, torch.zeros(2, 3, 5, 5))
    >>> norm_after(graph, "0"), norm_after(graph, "2")
    ('1', None)
    """
    (node, *more) = calls(graph, layer)
    if more or not _per_feature(graph.get_submodule(layer), node):
        return None
    user, _ = behind(graph, node, lambda path: idle(graph.get_submodule(path)))
    return None if user is None else plain_norm(graph, user)


def norm_before(graph: fx.GraphModule, reader: Reader) -> str | None:
    """The batch norm right in front of a layer that alone sees it, where no zeros are padded.

    >>> from fxsvd.dependency import analyze
    >>> from fxsvd.data.readers import readers
    >>> from fxsvd.capture import capture
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    >>> graph = capture(net, torch.zeros(2, 3, 5, 5))
    >>> norm_before(graph, readers(analyze(graph))["2"])
    '1'
    """
    node = reader.calls[0]
    module: Any = reader.module
    source = node.all_input_nodes[0]
    if len(reader.calls) > 1 or len(source.users) > 1 or not _per_feature(module, source):
        return None
    padded = isinstance(module, CONVOLUTIONS) and module.padding_mode == "zeros"
    if padded and module.padding != "valid" and any(p != 0 for p in module.padding):
        return None
    return plain_norm(graph, source)


def _per_feature(module: nn.Module, node: fx.Node) -> bool:
    """Whether dimension 1 holds the features, as a batch norm takes it."""
    dims = node.meta["val"].dim()
    kernel = module.get_parameter("weight").dim() - 2
    return bool(dims == 2 + kernel)


def copying_pool(graph: fx.GraphModule, reader: Reader) -> tuple[str, int] | None:
    """An adaptive pool that only copies single pixels, flattened into a linear layer.

    Returns:
        The pool, and how many copies it makes.

    >>> from fxsvd.capture import capture
    >>> from fxsvd.dependency import analyze
    >>> from fxsvd.data.readers import readers
    >>> net = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 2))
    >>> graph = capture(net, torch.zeros(2, 3, 1, 1))
    >>> copying_pool(graph, readers(analyze(graph))["2"])
    ('0', 4)
    """
    if not isinstance(reader.module, nn.Linear) or len(reader.calls) > 1:
        return None

    def nothing(path: str) -> bool:
        return idle(graph.get_submodule(path))

    for pool in graph.graph.nodes:
        copies = _copies(graph, pool)
        if copies < 2:
            continue
        flat, _ = behind(graph, pool, nothing)
        if flat is None or not _flattens(graph, flat):
            continue
        user, _ = behind(graph, flat, nothing)
        if user is reader.calls[0]:
            return str(pool.target), copies
    return None


def _copies(graph: fx.GraphModule, node: fx.Node) -> int:
    """How many copies of a single pixel a node makes; 0 where it does something else."""
    kinds = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
    if node.op != "call_module" or len(calls(graph, str(node.target))) > 1:
        return 0
    pool = graph.get_submodule(str(node.target))
    if type(pool) not in kinds or pool._forward_hooks or pool._forward_pre_hooks:
        return 0
    before = tuple(node.all_input_nodes[0].meta["val"].shape[2:])
    after = tuple(node.meta["val"].shape[2:])
    static = all(isinstance(n, int) for n in (*before, *after))
    return int(math.prod(after)) if static and set(before) == {1} else 0


def _flattens(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether all but the batch becomes one dimension."""
    if node.op == "call_module":
        module: Any = graph.get_submodule(str(node.target))
        return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)
    if node.target not in (torch.flatten, "flatten"):
        return False
    given = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | node.kwargs
    return (given.get("start_dim", 0), given.get("end_dim", -1)) == (1, -1)
