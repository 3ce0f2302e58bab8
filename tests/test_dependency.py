"""Spaces, as a user sees them."""

import networkx as nx
import pytest
import torch
from torch import nn

import fxsvd
from fxsvd.dependency import analyze


class Branches(nn.Module):
    """Two branches joined by a cat, one of them gated; a head on an unknown op."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.gate = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1)
        self.join, self.head = nn.Conv2d(10, 8, 1), nn.Linear(8, 2)

    def forward(self, x):
        b = self.b(x)
        y = torch.cat([self.a(x), b * self.gate(b).sigmoid()], 1)
        return self.head(torch.cummax(self.join(y), 1).values.mean((2, 3)))


@pytest.fixture
def deps():
    return analyze(fxsvd.capture(Branches(), torch.zeros(2, 3, 5, 5)))


def test_spaces(deps):
    rows = [
        (s.name, s.width, s.layers, sorted({c.tensor for c in s.consumers}), s.frozen is None)
        for s in deps.spaces
    ]
    assert rows == [
        ("b", 6, ("b", "gate"), ["gate.weight", "join.weight"], True),
        ("a", 4, ("a",), ["join.weight"], True),
        ("join", 8, ("join",), [], False),
        ("head", 2, ("head",), [], False),
    ]


def test_reasons_are_in_words(deps):
    assert deps.space("head").frozen == "it is the network's output"
    assert deps.space("join").frozen == "`cummax`: cummax has no rule"
    with pytest.raises(KeyError):
        deps.space("nowhere")


def test_text_lists_the_frozen_last(deps):
    lines = str(deps).splitlines()
    assert [line.split()[0] for line in lines] == ["space", "b", "a", "join", "head"]
    assert lines[-1].endswith("[frozen: it is the network's output]")


def test_graph(deps):
    graph = deps.graph
    assert isinstance(graph, nx.DiGraph)
    assert graph.nodes["b"]["width"] == 6
    assert graph.edges["gate", "b"]["role"] == "writes"
    assert graph.edges["b", "join"]["role"] == "reads"
    assert nx.has_path(graph, "a", "join")


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x**3


class Cubed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(Cube.apply(self.first(x)))


def test_autograd_functions_are_frozen_until_a_rule_is_registered(own_tables):
    graph = fxsvd.capture(Cubed(), torch.zeros(2, 4))
    assert analyze(graph).space("first").frozen == (
        "`_function0`: Cube has no row in the layer table (see fxsvd.register_layer)"
    )
    fxsvd.register_rule(Cube)(lambda call, x: x)
    assert analyze(graph).space("first").frozen is None
