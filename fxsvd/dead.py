"""Channels that can go without changing an output: nobody reads them, or they are constant."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fxsvd.analysis import Site
from fxsvd.constants import constant_inputs
from fxsvd.dependency import Dependencies
from fxsvd.edits import Assign
from fxsvd.layers import CONVOLUTIONS
from fxsvd.nests import flatten
from fxsvd.rules import RULES, attention, contraction
from fxsvd.rules.normalization import group_norm, layer_norm
from fxsvd.rules.reduction import over_survivors, total
from fxsvd.spaces import layer_name

Mask = npt.NDArray[np.bool_]
STATISTICS = (over_survivors, total, layer_norm, group_norm)
PRODUCTS = (contraction.matmul, contraction.einsum, attention.scaled_dot_product_attention)
STATISTIC_LAYERS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True, eq=False)
class Dead:
    """Which channels are exactly removable, and what their readers see of them.

    Attributes:
        channels: True where a channel may go.
        inputs: by layer, the constant value of each input feature (NaN: not constant).
    """

    channels: Mask
    inputs: dict[str, Tensor]

    def shifts(self, deps: Dependencies, gone: Mask) -> tuple[Assign, ...]:
        """What the biases of the readers take over from constant channels that go."""
        out = []
        for site in deps.analysis.sites:
            values = self.inputs.get(layer_name(site.tensor)) if site.role == "consumer" else None
            if values is None or site.atoms.size != len(values):
                continue
            here = torch.from_numpy(gone[deps.channels.of[site.atoms.ravel()]])
            values = torch.where(here, values.cpu(), 0.0).nan_to_num()
            if bool((values != 0).any()):
                out.append(_shift(deps, site, values))
        return tuple(out)


def _shift(deps: Dependencies, site: Site, values: Tensor) -> Assign:
    layer = layer_name(site.tensor)
    graph = deps.analysis.graph
    weight = graph.get_parameter(f"{layer}.weight").detach().double().cpu()
    bias = graph.get_parameter(f"{layer}.bias").detach().double().cpu()
    total = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
    return Assign(f"{layer}.bias", bias + total @ values, "takes over constant channels")


def dead_channels(deps: Dependencies) -> Dead:
    """Find the channels that can go without any output changing.

    A channel is dead where each of its readers has zero weights for it, or sees a constant that its
    bias can take over: zero anywhere, another constant in a linear layer or a convolution without
    padding. Channels that enter statistics or products of activations are never dead: their absence
    would be noticed.
    """
    inputs = constant_inputs(deps.analysis.graph)
    read = np.zeros(deps.channels.count, dtype=bool)
    alive = np.zeros(deps.channels.count, dtype=bool)
    for site in deps.analysis.sites:
        if site.role == "consumer":
            channel = deps.channels.of[site.atoms.ravel()]
            read[channel] = True
            alive[channel[~_ignored(deps, site, inputs)]] = True
    return Dead(read & ~alive & ~_counted(deps), inputs)


def _ignored(deps: Dependencies, site: Site, inputs: dict[str, Tensor]) -> Mask:
    """Of a reader's entries: those with zero weights, or with a constant it can take over."""
    known = deps.analysis.by_name(site.tensor)
    block = next(b for b in known.type.blocks if b.atoms is site.atoms)
    other = [d for d in range(known.value.dim()) if d not in block.dims]
    value = known.value.detach().abs()
    top = (value.amax(other) if other else value).cpu().double()
    out: Mask = (top == 0).numpy().ravel()
    layer = layer_name(site.tensor)
    constant = inputs.get(layer)
    if constant is not None and len(constant) == len(out):
        seen = constant.cpu().numpy()
        out = out | (seen == 0)
        if _takes_constants(deps.analysis.graph.get_submodule(layer)):
            out = out | ~np.isnan(seen)
    return out


def _takes_constants(module: nn.Module) -> bool:
    if isinstance(module, CONVOLUTIONS):
        unpadded = module.padding == "valid" or not any(map(int, module.padding))
        return module.bias is not None and module.groups == 1 and unpadded
    return isinstance(module, nn.Linear) and module.bias is not None


def _counted(deps: Dependencies) -> Mask:
    """Channels over which a norm, a mean or a product of activations sums."""
    out = np.zeros(deps.channels.count, dtype=bool)
    graph = deps.analysis.graph
    for node in deps.analysis.types:
        layer = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        rule = RULES.get(node.target) if node.op.startswith("call_") and layer is None else None
        if rule in (*STATISTICS, *PRODUCTS) or isinstance(layer, STATISTIC_LAYERS):
            inputs = flatten([deps.analysis.types[n] for n in node.all_input_nodes])
            for block in (b for t in inputs if not t.stored for b in t.blocks):
                out[deps.channels.of[block.atoms].ravel()] = True
    return out
