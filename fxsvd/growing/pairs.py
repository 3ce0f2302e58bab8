"""Channels over which two activations are multiplied: those of queries and keys, say."""

from __future__ import annotations

import operator

import numpy as np
import torch
from torch import fx
from torch.nn import functional as F

from fxsvd.axes import TensorType
from fxsvd.dependency import Dependencies
from fxsvd.narrowing import Mask

PRODUCTS = (torch.matmul, torch.bmm, operator.matmul, torch.baddbmm, torch.einsum, "matmul", "bmm")


def paired(deps: Dependencies) -> Mask:
    """By channel, whether it is summed over in a product of two activations.

    >>> from torch import nn
    >>> from fxsvd.capture import capture
    >>> from fxsvd.dependency import analyze
    >>> deps = analyze(capture(nn.Bilinear(2, 3, 4), (torch.zeros(2, 2), torch.zeros(2, 3))))
    >>> paired(deps).any()
    np.False_
    """
    out = np.zeros(deps.channels.count, dtype=bool)
    for node in deps.analysis.types:
        sides = [t for t in map(deps.analysis.types.get, _operands(node)) if _flows(t)]
        if len(sides) < 2:
            continue
        first, second = (_channels(deps, t) for t in sides[:2])
        out[np.intersect1d(first, second)] = True
    return out


def _operands(node: fx.Node) -> list[fx.Node]:
    if node.op not in ("call_function", "call_method"):
        return []
    known = node.target in PRODUCTS or node.target is F.scaled_dot_product_attention
    return node.all_input_nodes[:2] if known else []


def _flows(t: object) -> bool:
    return isinstance(t, TensorType) and bool(t.blocks) and not t.stored


def _channels(deps: Dependencies, t: object) -> np.ndarray:
    assert isinstance(t, TensorType)
    return np.concatenate([deps.channels.of[b.atoms.ravel()] for b in t.blocks])
