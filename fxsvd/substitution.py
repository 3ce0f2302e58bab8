"""Replacing a layer by others: layers as data, built again, put into a graph, merged back.

What a chain of linear maps computes is found by asking it: unit impulses go in, the columns of the
merged weight come out. That holds for any factorisation, so it can judge all of them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxsvd.edits import Part, Substitute
from fxsvd.errors import PlanError
from fxsvd.layers import CONVOLUTIONS
from fxsvd.running import run_with

KINDS: dict[str, type[nn.Module]] = {k.__name__: k for k in (nn.Linear, *CONVOLUTIONS)}
_OPTIONS = ("stride", "padding", "dilation", "groups", "padding_mode")


def linear_part(weight: Tensor, bias: Tensor | None = None) -> Part:
    """A linear layer as data; ``weight`` is ``[out, in]``.

    >>> linear_part(torch.zeros(3, 2)).options
    {'in_features': 2, 'out_features': 3, 'bias': False}
    """
    out, features = weight.shape
    options = {"in_features": features, "out_features": out, "bias": bias is not None}
    return Part("Linear", options, _tensors(weight, bias))


def convolution_part(weight: Tensor, bias: Tensor | None = None, **options: Any) -> Part:
    """A convolution as data; ``weight`` is ``[out, in / groups, *kernel]``.

    Args:
        weight: the kernel.
        bias: one number per output, or none.
        **options: stride, padding, dilation, groups, padding_mode, as in ``torch.nn.Conv2d``.

    >>> convolution_part(torch.zeros(4, 3, 3, 1), padding=(1, 0)).kind
    'Conv2d'
    """
    sizes = {
        "in_channels": weight.shape[1] * options.get("groups", 1),
        "out_channels": weight.shape[0],
        "kernel_size": tuple(weight.shape[2:]),
        "bias": bias is not None,
    }
    return Part(f"Conv{weight.dim() - 2}d", sizes | options, _tensors(weight, bias))


def options_of(layer: nn.Module) -> dict[str, Any]:
    """The options of a convolution that are not sizes."""
    return {name: getattr(layer, name) for name in _OPTIONS}


def _tensors(weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}


def build(part: Part, like: Tensor) -> nn.Module:
    """The layer that a part describes, with the type, device and gradient flag of ``like``.

    Raises:
        PlanError: the part is no layer that plans may hold.
    """
    if part.kind not in KINDS:
        raise PlanError(f"a plan may hold layers of {sorted(KINDS)}, not {part.kind!r}")
    module = KINDS[part.kind](**part.options, device="meta")
    for name, value in part.tensors.items():
        expected = getattr(module, name, None)
        if not isinstance(expected, nn.Parameter) or expected.shape != value.shape:
            raise PlanError(f"a {part.kind} of the plan holds a {name} of {list(value.shape)}")
        numbers = value.to(like.device, like.dtype, copy=True)
        setattr(module, name, nn.Parameter(numbers, requires_grad=like.requires_grad))
    return module


def in_full(graph: fx.GraphModule, edits: Iterable[Substitute]) -> None:
    """Give the substitutes in a float64 copy of a graph the numbers of the plan, not rounded."""
    for edit in edits:
        parts = graph.get_submodule(edit.layer).children() if edit.parts else ()
        for part, module in zip(edit.parts, parts, strict=True):
            for name, value in part.tensors.items():
                held = module.get_parameter(name)
                held.data = value.to(held.device, held.dtype)


def substitute(graph: fx.GraphModule, edit: Substitute) -> None:
    """Replace a layer of a graph, in place (the rewriter does this, to its own copy).

    Raises:
        PlanError: the graph calls no such layer.
    """
    calls = [n for n in graph.graph.nodes if n.op == "call_module" and n.target == edit.layer]
    if not calls:
        raise PlanError(f"the network calls no layer {edit.layer!r}: the plan is for another one")
    if not edit.parts:
        for node in calls:
            (value, *_), users = node.all_input_nodes, list(node.users)
            node.replace_all_uses_with(value)
            graph.graph.erase_node(node)
            _refresh(graph, users)
        graph.delete_submodule(edit.layer)
        return
    old = graph.get_submodule(edit.layer)
    like = next(old.parameters())
    chain = nn.Sequential(*(build(part, like) for part in edit.parts)).train(old.training)
    graph.set_submodule(edit.layer, chain)
    for node in calls:
        _chain_calls(graph, node, edit.layer, chain)


def _chain_calls(graph: fx.GraphModule, node: fx.Node, layer: str, chain: nn.Sequential) -> None:
    """The call itself becomes the last of the new calls, so that its name and users stay."""
    *first, _ = range(len(chain))
    value = node.args[0]
    assert isinstance(value, fx.Node)  # layers of one input
    for i in first:
        with graph.graph.inserting_before(node):
            made = graph.graph.call_module(f"{layer}.{i}", (value,))
        made.meta = dict(node.meta) | {"val": _shape_behind(chain[i], value.meta["val"])}
        value = made
    node.args = (value, *node.args[1:])
    node.target = f"{layer}.{len(chain) - 1}"


def _refresh(graph: fx.GraphModule, nodes: list[fx.Node]) -> None:
    """Shapes behind a layer that is gone, as far as nothing but movement is reached."""
    for node in nodes:
        before = node.meta.get("val")
        if not isinstance(before, Tensor) or not _moves(graph, node):
            continue
        given: Any = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        args, kwargs = given
        value = args[0]
        with value.fake_mode, torch.no_grad():
            if node.op == "call_module":
                after = graph.get_submodule(str(node.target))(*args, **kwargs)
            elif node.op == "call_method":
                after = getattr(value, str(node.target))(*args[1:], **kwargs)
            else:
                after = node.target(*args, **kwargs)  # type: ignore[operator]
        if tuple(after.shape) != tuple(before.shape):
            node.meta["val"] = after
            _refresh(graph, list(node.users))


def _moves(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        return isinstance(module, nn.Flatten | nn.Identity | nn.modules.dropout._DropoutNd)
    return node.target in (torch.flatten, "flatten")


def _shape_behind(module: nn.Module, value: Any) -> Tensor:
    """What a layer makes of a fake tensor (in its own world of symbolic sizes)."""

    def fake(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=value.device)

    with value.fake_mode, torch.no_grad():
        out: Tensor = run_with(module, fake, (value,))
    return out


def merged(chain: Iterable[nn.Module]) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of the one layer that computes what a chain of linear maps does.

    Args:
        chain: linear layers, or convolutions whose paddings, strides and dilations are those of
            one convolution, shared out among them.

    Returns:
        The weight in float64, ``[out, in]`` or ``[out, in / groups, *kernel]``, and the bias, if
        any. Groups are those that all the layers respect: the greatest common divisor of theirs.

    >>> pair = nn.Conv2d(4, 2, 3, groups=2, bias=False), nn.Conv2d(2, 4, 1, groups=2, bias=False)
    >>> merged(pair)[0].shape
    torch.Size([4, 2, 3, 3])
    """
    layers = [copy.deepcopy(layer).double() for layer in chain]
    with torch.no_grad():
        bias = _response_to_nothing(layers)
        if isinstance(layers[0], nn.Linear):
            weight = layers[0].weight.detach()
            for layer in layers[1:]:
                weight = layer.get_parameter("weight").detach() @ weight
            return weight, bias
        return _one_block_each(_impulse_response(layers), common_groups(layers)), bias


def common_groups(layers: Iterable[nn.Module]) -> int:
    """The groups of the one convolution that a chain of convolutions makes.

    >>> common_groups([nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3, groups=4)])
    4
    """
    return math.gcd(*(int(getattr(layer, "groups", 1)) for layer in layers))


def _one_block_each(weight: Tensor, groups: int) -> Tensor:
    """Of a dense kernel that is zero between groups, what is not."""
    out, into, *kernel = weight.shape
    blocks = weight.reshape(groups, out // groups, groups, into // groups, *kernel)
    return torch.cat([blocks[g, :, g] for g in range(groups)])


def _response_to_nothing(layers: list[nn.Module]) -> Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    first: Any = layers[0]
    channels = first.weight.shape[1] * int(getattr(first, "groups", 1))
    return _without_padding(layers, first.weight.new_zeros(1, channels, *_kernel(layers))).flatten()


def _impulse_response(layers: list[nn.Module]) -> Tensor:
    """Every entry of a patch of the size of the composed kernel, one by one."""
    kernel = _kernel(layers)
    first: Any = layers[0]
    channels = first.in_channels
    size = channels * math.prod(kernel)
    patches = torch.eye(size, dtype=torch.float64, device=first.weight.device)
    seen = [
        _without_padding(layers, p, with_bias=False)
        for p in patches.reshape(size, channels, *kernel).split(512)
    ]
    return torch.cat(seen).flatten(1).T.reshape(-1, channels, *kernel)


def _kernel(layers: list[Any]) -> list[int]:
    """The size of the composed kernel: one per dimension is larger than one, or none."""
    sizes = [layer.kernel_size for layer in layers] if hasattr(layers[0], "kernel_size") else []
    return [max(size) for size in zip(*sizes, strict=True)]


def _without_padding(layers: list[Any], x: Tensor, with_bias: bool = True) -> Tensor:
    for layer in layers:
        bias = layer.bias if with_bias else None
        if isinstance(layer, nn.Linear):
            x = nn.functional.linear(x, layer.weight, bias)
            continue
        name = f"conv{len(layer.kernel_size)}d"
        x = getattr(nn.functional, name)(x, layer.weight, bias, groups=layer.groups)
    return x
