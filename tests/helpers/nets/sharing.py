"""Weights and modules used more than once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers.nets.base import IMAGE, OUTPUT, VECTOR, Net, floats, idiom, several, tokens
from tests.helpers.nets.layers import HEAD, OUT, conv, head


@idiom(tokens(6), {"words#1": (11, "looks rows up by number"), "words#2": (8, 4), "b": (12, 6)})
def tied_embedding_and_head() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.words(x)
        return m.head(m.norm(y + m.c(m.b(y).relu())))

    words, out = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
    out.weight = words.weight
    return Net(
        run, words=words, b=nn.Linear(8, 12), c=nn.Linear(12, 8), norm=nn.LayerNorm(8), head=out
    )


@idiom(tokens(6), {"words#1": (11, "looks rows up by number"), "words#2": (8, 4)})
def tied_head_by_function() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(m.words(x)), m.words.weight)

    return Net(run, words=nn.Embedding(11, 8))


@idiom(several(VECTOR, VECTOR), {"a": (8, 4), **OUT})
def siamese() -> nn.Module:
    def run(m: Net, x: Tensor, y: Tensor) -> Tensor:
        return m.out(torch.abs(m.a(x) - m.a(y)))

    return Net(run, a=nn.Linear(7, 8), out=nn.Linear(8, 3))


@idiom(IMAGE, {"a": (8, 4), **HEAD})
def block_applied_twice() -> nn.Module:
    """Its output is its own input: one space."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        for _ in range(2):
            y = m.n(m.b(y)).relu()
        return m.head(y)

    return Net(run, a=conv(3, 8), b=conv(8, 8), n=nn.BatchNorm2d(8), head=head(8))


@idiom(IMAGE, {"a": (8, 4), "b": (6, 3), **HEAD})
def head_shared_by_two_levels() -> nn.Module:
    """A detector's head: both levels end in the same space."""

    def run(m: Net, x: Tensor) -> Any:
        fine = m.a(x).relu()
        coarse = m.c(F.avg_pool2d(fine, 2))
        return m.head(m.b(fine)), m.head(m.b(coarse))

    return Net(run, a=conv(3, 8), b=conv(8, 6), c=conv(8, 8), head=head(6))


@idiom(VECTOR, {"a": (8, 4), "c": (6, 3), "out": (3, OUTPUT)})
def tied_weight_of_two_layers() -> nn.Module:
    """An autoencoder's decoder uses the encoder's weight transposed."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        y = F.linear(m.c(y).relu(), m.c.weight.t())
        return m.out(y)

    return Net(run, a=nn.Linear(7, 8), c=nn.Linear(8, 6), out=nn.Linear(8, 3))


@idiom(floats(4, 7), {"a": (8, 4), **OUT})
def dict_of_outputs() -> nn.Module:
    def run(m: Net, x: Tensor) -> Any:
        y = m.a(x)
        return {"logits": m.out(y.mean(1)), "each": (m.out(y),)}

    return Net(run, a=nn.Linear(7, 8), out=nn.Linear(8, 3))


@idiom(lambda batch: {"x": torch.randn(batch, 7)}, {"a": (8, 4), **OUT})
def keyword_inputs() -> nn.Module:
    return Net(lambda m, x: m.out(m.a(x).relu()), a=nn.Linear(7, 8), out=nn.Linear(8, 3))


@idiom(VECTOR, {"a": (8, 4), "first.0": (6, 3), **OUT})
def block_with_two_names() -> nn.Module:
    """As in CoaT: the same module under several names, called by each."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        return m.out(m.second(y + m.first(y)))

    block = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8))
    return Net(run, a=nn.Linear(7, 8), first=block, second=block, out=nn.Linear(8, 3))
