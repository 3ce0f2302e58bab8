"""Channels that may be chosen late: when the one layer that reads them is reached.

There, what the layers before have become is known, and so is the target: the choice is made for the
inputs that the layer really gets. Until then all of these channels have to be there, so nothing
before the reader may mix them: only what acts on every channel alone stands in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import fx, nn
from torch.nn.modules import activation, dropout, pooling

from fxsvd.coupling import Group
from fxsvd.data.readers import Reader
from fxsvd.dependency import Dependencies
from fxsvd.layers import BATCH_NORMS
from fxsvd.nests import flatten
from fxsvd.relations import Atoms
from fxsvd.rules import RULES, elementwise, joining, movement, reshape, spatial

ALONE = {m.__name__ for m in (elementwise, joining, movement, reshape, spatial)}
"""Rules in these files do not mix channels."""
LAYERS_ALONE = {m.__name__ for m in (activation, dropout, pooling)}
MIXING = (nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin, nn.MultiheadAttention)


def postponable(
    deps: Dependencies, groups: Sequence[Group], found: dict[str, Reader]
) -> dict[str, list[int]]:
    """Which groups may be chosen when a layer is reached.

    Args:
        deps: the analysis.
        groups: channels that go together.
        found: the layers that can be refitted.

    Returns:
        By layer, the numbers of the groups that it alone reads.

    >>> import torch
    >>> from fxsvd.capture import capture
    >>> from fxsvd.dependency import analyze
    >>> from fxsvd.data.readers import readers
    >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> deps = analyze(capture(net, torch.zeros(2, 3)))
    >>> postponable(deps, deps.groups, readers(deps))
    {'2': [0]}
    """
    group_of = np.full(deps.channels.count + 1, -1, dtype=np.int64)
    for number, group in enumerate(groups):
        group_of[group.channels] = number
    users: dict[int, set[str | None]] = {}
    for node in deps.analysis.graph.graph.nodes:
        name = _reader(node, found)
        for number in _read(node, deps, group_of):
            if name is not None or not _alone(node):
                users.setdefault(number, set()).add(name)
    out: dict[str, list[int]] = {}
    for number, names in sorted(users.items()):
        (name, *others) = names
        if name is not None and not others:
            out.setdefault(name, []).append(number)
    return out


def _reader(node: fx.Node, found: dict[str, Reader]) -> str | None:
    reader = found.get(str(node.target)) if node.op == "call_module" else None
    once = reader is not None and len(reader.calls) == 1 and not reader.depthwise
    return reader.layer if reader is not None and once else None


def _read(node: fx.Node, deps: Dependencies, group_of: Atoms) -> Iterator[int]:
    """The groups whose channels are in the inputs of a node."""
    types = (deps.analysis.types.get(source) for source in node.all_input_nodes)
    atoms = [b.atoms.ravel() for t in flatten(list(types)) for b in t.blocks]
    if atoms:
        numbers = np.unique(group_of[deps.channels.of[np.concatenate(atoms)]])
        yield from (int(n) for n in numbers if n >= 0)


def _alone(node: fx.Node) -> bool:
    """Whether a node treats every channel alone."""
    if node.op == "output":
        return False
    if node.op == "call_module":
        module: Any = node.graph.owning_module.get_submodule(str(node.target))  # type: ignore[union-attr]
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return module.groups == module.in_channels
        known = type(module).__module__ in LAYERS_ALONE and not isinstance(module, MIXING)
        return known or isinstance(module, (*BATCH_NORMS, nn.Identity, nn.Flatten))
    return getattr(RULES.get(node.target), "__module__", "") in ALONE
