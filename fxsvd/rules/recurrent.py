"""Recurrent layers: gates are rows of one weight, tied gate by gate and through time."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import Any

import numpy as np
import torch

from fxsvd.axes import Block, TensorType, take
from fxsvd.rules.contraction import LETTERS
from fxsvd.rules.joining import concatenate
from fxsvd.rules.registry import Call, rule


@rule(torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
def recurrent(
    call: Call,
    input: TensorType,
    state: Any,
    parameters: dict[str, TensorType],
    layers: int,
    directions: int,
    gates: int,
) -> Any:
    """``nn.LSTM``, ``nn.GRU``, ``nn.RNN``.

    A hidden feature has one row per gate in both weights, a column in its own recurrence, a place
    in the output and one in the next layer's input. Layers and directions may keep different
    features, but equally many: the layer has one hidden size.
    """
    x, hidden = input, []
    for layer in range(layers):
        sides = [
            _cell(call, x, parameters, f"_l{layer}{side}", gates)
            for side in ("", "_reverse")[:directions]
        ]
        hidden += [_last(t) for t in sides]
        x = _side_by_side(call, sides)
    rows = np.stack(hidden)
    call.relations.equal_rows(rows, f"`{call.label}` has one hidden size")
    out, final = call.out
    states = (final,) if isinstance(final, torch.Size) else tuple(final)
    types = tuple(_state(call, shape, rows) for shape in states)
    for given, t in zip(_flat(state), types, strict=False):
        call.combine(t, given)
    return TensorType(tuple(out), x.blocks), types[0] if isinstance(final, torch.Size) else types


def _flat(state: Any) -> tuple[TensorType, ...]:
    if isinstance(state, TensorType):
        return (state,)
    return tuple(state) if isinstance(state, (tuple, list)) else ()


def _cell(
    call: Call, x: TensorType, parameters: dict[str, TensorType], suffix: str, gates: int
) -> TensorType:
    """One layer in one direction: ``[…, features]`` to ``[…, hidden]``."""
    batch = LETTERS[: len(x.shape) - 1]
    inward, back = (_gates(call, parameters[f"weight_{k}{suffix}"], gates) for k in ("ih", "hh"))
    out = call.einsum([(batch + "Y", x), ("ZY", inward)], batch + "Z")
    again = call.einsum([(batch + "Y", out), ("ZY", back)], batch + "Z")
    out = call.combine(out, again)
    for k in ("ih", "hh"):
        if f"bias_{k}{suffix}" in parameters:
            out = call.combine(out, _gates(call, parameters[f"bias_{k}{suffix}"], gates))
    return out


def _gates(call: Call, t: TensorType, gates: int) -> TensorType:
    """The rows of all gates laid over each other."""
    size = t.shape[0] // gates
    parts = [
        take(call.relations, t, 0, np.arange(g * size, (g + 1) * size), f"`{call.label}`")
        for g in range(gates)
    ]
    call.produced(t, (0,))
    call.consumed(t, range(1, len(t.shape)))
    return reduce(lambda a, b: call.combine(a, b), parts)


def _last(t: TensorType) -> Any:
    atoms = t.vector(len(t.shape) - 1)
    assert atoms is not None  # a cell's hidden features
    return atoms


def _side_by_side(call: Call, sides: list[TensorType]) -> TensorType:
    if len(sides) == 1:
        return sides[0]
    dim = len(sides[0].shape) - 1
    shape = torch.Size((*sides[0].shape[:dim], 2 * sides[0].shape[dim]))
    return concatenate(replace(call, out=shape), sides, dim)


def _state(call: Call, shape: Any, rows: Any) -> TensorType:
    """``[layers · directions, (batch,) hidden]``: row by row other features."""
    if len(rows) == 1:
        return TensorType(tuple(shape), (Block((len(shape) - 1,), rows[0]),))
    return TensorType(tuple(shape), (Block((0, len(shape) - 1), rows),))
