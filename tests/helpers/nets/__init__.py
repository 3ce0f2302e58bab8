"""One small network per idiom that has to be narrowed consistently, with the widths it must get."""

from tests.helpers.nets import (
    attention,
    blocks,
    layers,
    linear_attention,
    movement,
    recurrent,
    sharing,
    transformers,
)
from tests.helpers.nets.base import IDIOMS, Idiom, call, leaves, randomized, to_double

__all__ = [
    "IDIOMS",
    "Idiom",
    "attention",
    "blocks",
    "call",
    "layers",
    "leaves",
    "linear_attention",
    "movement",
    "randomized",
    "recurrent",
    "sharing",
    "to_double",
    "transformers",
]
