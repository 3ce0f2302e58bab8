"""How an idiom is written down: a small network, its inputs, and its widths when pruned by half."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

OUTPUT = "it is the network's output"
Width = tuple[int, int | str]


class Net(nn.Module):
    """A module from its members and a function of itself and its inputs."""

    def __init__(self, run: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        self.run = run
        for name, member in members.items():
            if isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, x: Any, *more: Any) -> Any:
        return self.run(self, x, *more)


@dataclass(frozen=True)
class Idiom:
    """A way to write networks, and what becomes of it.

    Attributes:
        name: the function that builds it.
        build: makes the network.
        inputs: makes inputs for a batch size.
        widths: for each space, the width before and after, or before and (part of) why it stays.
        masked: whether ``fxsvd.mask`` says what the result computes (it cannot where the network's
            own code calls a norm as a function).
        prune: options of ``Prune`` beside the ratio.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    widths: dict[str, Width]
    masked: bool = True
    prune: dict[str, Any] = field(default_factory=dict)


IDIOMS: dict[str, Idiom] = {}


def idiom(
    inputs: Callable[[int], Any], widths: dict[str, Width], *, masked: bool = True, **prune: Any
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Register the decorated builder."""

    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        name = build.__name__
        assert name not in IDIOMS, f"two idioms are called {name}"
        IDIOMS[name] = Idiom(name, build, inputs, widths, masked, prune)
        return build

    return register


def floats(*shape: int) -> Callable[[int], Tensor]:
    """Inputs ``[batch, *shape]``."""
    return lambda batch: torch.randn(batch, *shape)


def tokens(length: int, vocabulary: int = 11) -> Callable[[int], Tensor]:
    """Token numbers ``[batch, length]``."""
    return lambda batch: torch.randint(vocabulary, (batch, length))


def several(*makers: Callable[[int], Tensor]) -> Callable[[int], tuple[Tensor, ...]]:
    """A tuple of inputs."""
    return lambda batch: tuple(make(batch) for make in makers)


IMAGE = floats(3, 8, 8)
SEQUENCE = floats(6, 5)
VECTOR = floats(7)


def randomized(model: nn.Module) -> nn.Module:
    """The model with seeded noise in every parameter and buffer: none is zero or one by chance."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            tensor.copy_(noise.abs() + 0.5 if name.endswith("running_var") else 0.5 * noise)
    return model


def to_double(value: Any) -> Any:
    """A nest of inputs in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: to_double(v) for k, v in value.items()}
    return tuple(to_double(v) for v in value)


def call(model: nn.Module, inputs: Any) -> Any:
    """Run a model on a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def leaves(value: Any) -> list[Tensor]:
    """All tensors in a nest of outputs."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [t for v in items for t in leaves(v)] if isinstance(value, (dict, tuple, list)) else []
