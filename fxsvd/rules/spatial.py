"""Ops along positions: pooling, resizing, unfolding. Channels pass, positions stay."""

from __future__ import annotations

from typing import Any

from fxsvd.axes import TensorType
from fxsvd.rules.registry import Call, Key, rule, spellings

POOLS = {
    k: spellings(
        *(f"avg_pool{k}d", f"max_pool{k}d", f"lp_pool{k}d", f"fractional_max_pool{k}d"),
        *(f"adaptive_avg_pool{k}d", f"adaptive_max_pool{k}d"),
        *(f"max_pool{k}d_with_indices", f"adaptive_max_pool{k}d_with_indices"),
    )
    for k in (1, 2, 3)
}


def positions(call: Call, input: TensorType, count: int) -> Any:
    """The last ``count`` dimensions are positions."""
    rank = len(input.shape)
    t = call.fix(input, range(rank - count, rank), "slides along it")
    shapes = call.out if not hasattr(call.out, "numel") else (call.out,)
    types = tuple(TensorType(tuple(shape), t.blocks) for shape in shapes)
    return types[0] if shapes is not call.out else types


def _register(count: int, keys: list[Key]) -> None:
    @rule(*keys)
    def pool(call: Call, input: TensorType, *_: Any, **__: Any) -> Any:
        """Pooling over the last dimensions."""
        return positions(call, input, count)


for _count, _keys in POOLS.items():
    _register(_count, _keys)


@rule(*spellings("interpolate", "upsample", "upsample_nearest", "upsample_bilinear"))
def interpolate(call: Call, input: TensorType, *_: Any, **__: Any) -> Any:
    """Resizing of everything behind the channels."""
    return positions(call, input, len(input.shape) - 2)


@rule(*spellings("grid_sample"))
def grid_sample(call: Call, input: TensorType, grid: TensorType, *_: Any, **__: Any) -> Any:
    """Positions by a grid, which is not narrowed."""
    call.freeze(grid, "reads positions from it")
    return positions(call, input, len(input.shape) - 2)


@rule(*spellings("unfold"))
def unfold(call: Call, input: TensorType, *args: Any, **__: Any) -> TensorType:
    """``F.unfold``: ``[B, C·k, L]``; ``Tensor.unfold(dim, size, step)``: windows come last."""
    if len(args) == 3 and len(call.out) == len(input.shape) + 1:
        t = call.fix(input, (args[0] % len(input.shape),), "slides along it")
        return TensorType(tuple(call.out), t.blocks)
    t = positions(call, input, 2)
    batch, channels = input.shape[:2]
    window = call.out[1] // channels
    seen = TensorType((batch, channels, window, call.out[2]), t.blocks)
    return call.reshape(seen, tuple(call.out))


@rule(*spellings("fold"))
def fold(call: Call, input: TensorType, *_: Any, **__: Any) -> TensorType:
    """``[B, C·k, L]`` back to ``[B, C, H, W]``: all entries of a window go together."""
    batch, rows, length = input.shape
    channels = call.out[1]
    seen = call.reshape(input, (batch, channels, rows // channels, length))
    t = call.fix(seen, (2, 3), "adds windows up")
    return TensorType(tuple(call.out), t.blocks)
