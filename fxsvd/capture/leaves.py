"""Which modules stay whole in the graph, and which are recorded as what they consist of."""

from __future__ import annotations

from torch import nn

from fxsvd.capture.attention import can_write_out
from fxsvd.capture.function import CustomFunction

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
    CustomFunction,
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
