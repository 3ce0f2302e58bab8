"""The types of dimensions, and the operations on them that rules are made of."""

from fxsvd.axes.combination import combine, contract, einsum
from fxsvd.axes.movement import insert, keep_rows_equal, permute, pick, take
from fxsvd.axes.types import (
    Block,
    Shape,
    TensorType,
    dimension,
    fix_dims,
    freeze_type,
    marginal,
    tie,
)

__all__ = [
    "Block",
    "Shape",
    "TensorType",
    "combine",
    "contract",
    "dimension",
    "einsum",
    "fix_dims",
    "freeze_type",
    "insert",
    "keep_rows_equal",
    "marginal",
    "permute",
    "pick",
    "take",
    "tie",
]
