"""A graph that runs a node at a time, so that one may look, and change what comes behind."""

from __future__ import annotations

from torch import fx

from fxsvd.data.batches import Batch
from fxsvd.running import placeholder_values


class Lane:
    """A graph that runs a node at a time over all batches.

    Args:
        graph: a captured graph.
        data: its batches; all are held, with what is alive of their activations.

    Attributes:
        values: by batch, those of the nodes that ran and that something still reads.

    >>> import torch
    >>> from torch import nn
    >>> graph = fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    >>> lane = Lane(graph, [((torch.tensor([-1.0, 2.0]),), {})])
    >>> for node in graph.graph.nodes:
    ...     lane.run(node)
    >>> lane.values[0][node.all_input_nodes[0]]
    tensor([0., 2.])
    """

    def __init__(self, graph: fx.GraphModule, data: list[Batch]) -> None:
        self.interpreter = fx.Interpreter(graph, garbage_collect_values=False)
        self.values = [placeholder_values(graph, batch) for batch in data]
        self.waiting = {node: len(node.users) for node in graph.graph.nodes}

    def run(self, node: fx.Node) -> None:
        """Compute a node."""
        if node.op in ("placeholder", "output"):
            return
        for values in self.values:
            self.interpreter.env = values
            values[node] = self.interpreter.run_node(node)

    def leave(self, node: fx.Node) -> None:
        """Forget the values that only this node was waiting for."""
        for source in node.all_input_nodes:
            self.waiting[source] -= 1
        for gone in (n for n in (*node.all_input_nodes, node) if self.waiting[n] == 0):
            for values in self.values:
                values.pop(gone, None)
