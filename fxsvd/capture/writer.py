"""Adds nodes to a graph, each with its value, and named after the module it is in."""

from __future__ import annotations

from typing import Any

from torch import fx


class Writer:
    """A graph that grows, and where in the model it is at.

    Attributes:
        graph: The graph so far.
        scopes: The paths of the modules that are running, the innermost last.

    Example:
        >>> writer = Writer()
        >>> writer.scopes.append("body.0")
        >>> writer.scoped("add")
        'body_0_add'
    """

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.scopes = [""]

    def scoped(self, name: str) -> str:
        """Names a node after the module it is in."""
        return "_".join([*filter(None, self.scopes[-1].split(".")), name.strip("_")])

    def describe(self, node: fx.Node, value: Any, scope: str | None = None) -> None:
        """Gives a node its value and its module, by default the one that is running."""
        node.meta["val"] = value
        node.meta["scope"] = self.scopes[-1] if scope is None else scope
