"""Leaves a model as it was, whatever its forward does to it."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_MUTABLE = (dict, list, set, OrderedDict)


@contextmanager
def untouched(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Sets every module's mode; afterwards restores attributes, and what lists and dicts hold."""
    saved = []
    for module in model.modules():
        state = dict(vars(module))
        contents = {
            name: copy.copy(value) for name, value in state.items() if type(value) in _MUTABLE
        }
        saved.append((module, state, contents))
        vars(module)["training"] = training
    try:
        yield
    finally:
        for module, state, contents in saved:
            vars(module).clear()
            vars(module).update(state)
            for name, content in contents.items():
                container = state[name]
                container.clear()
                refill = container.extend if type(content) is list else container.update
                refill(content)
