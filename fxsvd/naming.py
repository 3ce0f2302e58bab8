"""Meaning spaces by name: layers, glob patterns, enclosing modules, or module objects."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import fx, nn

from fxsvd.dependency import Dependencies
from fxsvd.errors import PlanError
from fxsvd.spaces import Space, layer_name

Name = str | nn.Module
Names = Name | Collection[Name]
Value = TypeVar("Value")


def listed(names: Names) -> tuple[Name, ...]:
    """The names, where a single one may stand for itself.

    >>> listed("conv1"), listed(["conv1", "fc"])
    (('conv1',), ('conv1', 'fc'))
    """
    return (names,) if isinstance(names, str | nn.Module) else tuple(names)


def spaces_named(deps: Dependencies, names: Names) -> set[int]:
    """Numbers of the spaces that any of the names means: by its own name or by a producer's.

    Raises:
        PlanError: a name means nothing in this network; near names are suggested.
    """
    return {i for name in listed(names) for i in _spaces_of(deps, name)}


def by_name(deps: Dependencies, values: Mapping[str, Value]) -> dict[int, Value]:
    """A value per space, from a mapping of patterns; the first pattern that matches counts."""
    out: dict[int, Value] = {}
    for name, value in values.items():
        for i in _spaces_of(deps, name):
            out.setdefault(i, value)
    return out


def paths_of(graph: fx.GraphModule, module: nn.Module) -> list[str]:
    """Where the module is in the network; of a container that capture took apart: its layers.

    Raises:
        PlanError: it is no part of the network.
    """
    found = [path for path, candidate in graph.named_modules() if candidate is module]
    if found:
        return found
    parameters = {id(p): name for name, p in graph.named_parameters()}
    within = {layer_name(parameters[i]) for i in map(id, module.parameters()) if i in parameters}
    if not within:
        raise PlanError(f"this {type(module).__name__} is no part of the network")
    return sorted(within)


def _spaces_of(deps: Dependencies, name: Name) -> list[int]:
    graph = deps.analysis.graph
    patterns = [name] if isinstance(name, str) else paths_of(graph, name)
    found = [
        i
        for i, space in enumerate(deps.spaces)
        if any(means(pattern, n) for n in _names(space) for pattern in patterns)
    ]
    if not found:
        known = sorted({n for space in deps.spaces for n in _names(space)})
        require_known(graph, patterns, known, "layer or space")
    return found


def _names(space: Space) -> list[str]:
    return [space.name, *space.layers, *(site.tensor for site in space.producers)]


def means(pattern: str, name: str) -> bool:
    """Whether a pattern is a name, a container of it, or a glob that matches it.

    >>> means("layer1", "layer1.0.conv1"), means("*.conv1", "layer1.0.conv1"), means("fc", "fc1")
    (True, True, False)
    """
    return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)


def require_known(
    graph: fx.GraphModule, patterns: Sequence[str], near: Collection[str], kind: str
) -> None:
    """Raise unless some module has a name like that (an activation, say, that has no channels).

    Args:
        graph: the network.
        patterns: what was asked for; the first one is named.
        near: names to suggest.
        kind: what none of them is.

    Raises:
        PlanError: none has.
    """
    modules = [path for path, _ in graph.named_modules() if path]
    if any(fnmatchcase(path, pattern) for path in modules for pattern in patterns):
        return
    found = get_close_matches(patterns[0], near, 3, 0.4)
    hint = f"; did you mean {', '.join(map(repr, found))}?" if found else ""
    raise PlanError(f"no {kind} is called {patterns[0]!r}{hint}")
