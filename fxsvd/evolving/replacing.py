"""A graph takes over what another one is made of, and stays the same object."""

from __future__ import annotations

from torch import fx


def become(graph: fx.GraphModule, other: fx.GraphModule) -> None:
    """Let a graph have the layers, parameters and code of another, which is used up.

    Whoever holds the graph (a training loop, a wrapper) holds the resized network then. Its own
    mode and hooks stay, each layer has the mode that it has in the other one.

    >>> from torch import nn
    >>> one, two = (fx.symbolic_trace(nn.Sequential(nn.Linear(2, n))) for n in (3, 4))
    >>> become(one, two)
    >>> one.get_parameter("0.weight").shape
    torch.Size([4, 2])
    """
    for held in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
        old, new = getattr(graph, held), getattr(other, held)
        old.clear()
        old.update(new)
    graph.meta.clear()
    graph.meta.update(other.meta)
    graph.graph = other.graph
