"""Recurrent layers: one or two directions, several layers, either layout."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tests.helpers.nets.base import SEQUENCE, Net, idiom, tokens
from tests.helpers.nets.layers import OUT


def tagger(layer: nn.RNNBase, factor: int = 1) -> nn.Module:
    """Every step's output is read."""

    def run(m: Net, x: Tensor) -> Tensor:
        return m.out(m.rnn(m.a(x))[0])

    return Net(run, a=nn.Linear(5, 8), rnn=layer, out=nn.Linear(factor * 6, 3))


HIDDEN = {"a": (8, 4), "rnn": (6, 3), **OUT}


@idiom(SEQUENCE, HIDDEN)
def lstm() -> nn.Module:
    return tagger(nn.LSTM(8, 6, batch_first=True))


@idiom(SEQUENCE, HIDDEN)
def gru() -> nn.Module:
    return tagger(nn.GRU(8, 6, batch_first=True))


@idiom(SEQUENCE, HIDDEN)
def plain_rnn_without_bias() -> nn.Module:
    return tagger(nn.RNN(8, 6, batch_first=True, bias=False, nonlinearity="relu"))


@idiom(
    SEQUENCE,
    {"a": (8, 4), "rnn#1": (6, 3), "rnn#2": (6, 3), "rnn#3": (6, 3), "rnn#4": (6, 3), **OUT},
)
def lstm_deep_and_both_ways() -> nn.Module:
    """Layers and directions choose their own features, equally many."""
    return tagger(nn.LSTM(8, 6, 2, bidirectional=True, batch_first=True), 2)


@idiom(SEQUENCE, {"a": (8, 4), "rnn#1": (6, 3), "rnn#2": (6, 3), **OUT})
def gru_both_ways() -> nn.Module:
    return tagger(nn.GRU(8, 6, bidirectional=True, batch_first=True), 2)


@idiom(tokens(6), {"words": (8, 4), "rnn#1": (6, 3), "rnn#2": (6, 3), **OUT})
def lstm_last_state_sequence_first() -> nn.Module:
    def run(m: Net, x: Tensor) -> Any:
        _, (hidden, _) = m.rnn(m.words(x).transpose(0, 1))
        return m.out(hidden[-1])

    return Net(run, words=nn.Embedding(11, 8), rnn=nn.LSTM(8, 6, 2), out=nn.Linear(6, 3))


@idiom(SEQUENCE, {"a": (8, 4), "first": (6, 3), **OUT})
def encoder_state_starts_the_decoder() -> nn.Module:
    """The state ties the two layers' features together."""

    def run(m: Net, x: Tensor) -> Any:
        y = m.a(x)
        _, state = m.first(y)
        return m.out(m.second(y, state)[0])

    first, second = (nn.GRU(8, 6, batch_first=True) for _ in range(2))
    return Net(run, a=nn.Linear(5, 8), first=first, second=second, out=nn.Linear(6, 3))
