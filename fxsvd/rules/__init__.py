"""One small function per op family: how it carries axes.

A rule is called with a ``Call`` and the op's own arguments (tensors replaced by their types), and
returns the type of the result. It is registered once under every spelling of the op: the function
itself for ``call_function`` nodes, the method's name for ``call_method`` nodes.

>>> import torch
>>> torch.nn.functional.linear in RULES
True
"""

from fxsvd.rules import (
    attention,
    contraction,
    elementwise,
    factory,
    gathering,
    indexing,
    joining,
    movement,
    normalization,
    recurrent,
    reduction,
    spatial,
)
from fxsvd.rules.registry import LITERALS, RULES, Call, Edit, find, literals, register_rule, rule

__all__ = [
    "LITERALS",
    "RULES",
    "Call",
    "Edit",
    "attention",
    "contraction",
    "elementwise",
    "factory",
    "find",
    "gathering",
    "indexing",
    "joining",
    "literals",
    "movement",
    "normalization",
    "recurrent",
    "reduction",
    "register_rule",
    "rule",
    "spatial",
]
