"""Which smaller layers can take a layer's place, at what rank, and with what settings.

A *kind* says how: ``channel`` (the kernel to k channels, then 1×1; for a linear layer, two linear
layers), ``spatial`` (k×1, then 1×k), ``tucker`` (1×1, the kernel, 1×1) and ``cp`` (1×1, two
depthwise kernels, 1×1). See ``fxsvd.linalg.kernels``. With groups, every group is split alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fxsvd.edits import Part
from fxsvd.linalg.kernels import cp, spatial_svd, tucker2
from fxsvd.linalg.svd import rank_for_energy, rank_for_error, rank_for_ratio
from fxsvd.substitution import convolution_part, linear_part, options_of

Rank = tuple[int, ...]
"""Channels between the parts: one number, or two for ``tucker`` (of outputs, of inputs)."""
KINDS = ("channel", "spatial", "tucker", "cp")


@dataclass(frozen=True)
class Shape:
    """The weight of one group of a layer.

    Attributes:
        out: outputs.
        into: inputs.
        kernel: its spatial size; empty for a linear layer.

    >>> Shape(8, 4, (3, 3)).kinds
    ('channel', 'spatial', 'tucker', 'cp')
    """

    out: int
    into: int
    kernel: tuple[int, ...] = ()

    @classmethod
    def of(cls, layer: nn.Module) -> Shape:
        """Of a linear layer or convolution."""
        weight, groups = layer.get_parameter("weight"), int(getattr(layer, "groups", 1))
        return cls(weight.shape[0] // groups, weight.shape[1], tuple(weight.shape[2:]))

    @property
    def numbers(self) -> int:
        """How many numbers the weight holds."""
        return self.out * self.into * math.prod(self.kernel)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that the layer can be split by."""
        if math.prod(self.kernel) == 1:
            return ("channel",)
        return KINDS if len(self.kernel) == 2 else ("channel", "tucker")

    def most(self, kind: str) -> int:
        """The largest rank that means anything."""
        if kind == "channel":
            return min(self.out, self.into * math.prod(self.kernel))
        if kind == "spatial":
            return min(self.into * self.kernel[0], self.out * self.kernel[1])
        if kind == "tucker":
            return self.out
        return self.numbers // max(self.out, self.into, *self.kernel)

    def rank(self, kind: str, k: int) -> Rank:
        """A rank from one number; a Tucker core keeps the layer's ratio of inputs to outputs."""
        if kind != "tucker":
            return (k,)
        return k, min(self.into, max(1, round(k * self.into / self.out)))

    def size(self, kind: str, rank: Rank) -> int:
        """Numbers in the weights of the parts.

        >>> Shape(4096, 25088).size("channel", (141,))
        4114944
        """
        k = rank[0]
        if kind == "tucker":
            inner = rank[1] * (self.into + k * math.prod(self.kernel))
            return inner + k * self.out
        if kind == "channel":
            return k * (self.out + self.into * math.prod(self.kernel))
        if kind == "spatial":
            return k * (self.into * self.kernel[0] + self.out * self.kernel[1])
        return k * (self.out + self.into + sum(self.kernel))

    def for_ratio(self, kind: str, ratio: float, rounding: Literal["down", "up"] = "down") -> Rank:
        """The rank at which the layer is ``ratio`` times smaller.

        >>> Shape(4096, 25088).for_ratio("channel", 150, "up")
        (24,)
        """
        if kind == "channel":
            inputs = self.into * math.prod(self.kernel)
            return (rank_for_ratio(self.out, inputs, ratio, rounding=rounding),)
        wanted = self.numbers / ratio * (1 + 1e-12)
        low, high = 1, self.most(kind)
        while low < high:  # the largest rank that fits
            middle = (low + high + 1) // 2
            fits = self.size(kind, self.rank(kind, middle)) <= wanted
            low, high = (middle, high) if fits else (low, middle - 1)
        short = rounding == "up" and self.size(kind, self.rank(kind, low)) * ratio < self.numbers
        return self.rank(kind, min(low + short, self.most(kind)))


def for_share(kind: str, weight: Tensor, share: float, *, of: Literal["energy", "error"]) -> Rank:
    """The rank of a kernel that keeps a share of its energy, or has at most a relative error.

    Args:
        kind: ``"spatial"`` or ``"tucker"``; on each side of the core, for that.
        weight: ``[out, in, *kernel]``.
        share: of Σσ², or ‖W − W'‖ / ‖W‖.
        of: which of the two it is.

    >>> for_share("spatial", torch.ones(4, 4, 3, 3), 0.9, of="energy")
    (1,)
    """
    pick = rank_for_energy if of == "energy" else rank_for_error
    w = weight.detach().double()
    if kind == "spatial":
        sides = [w.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)]
    else:
        sides = [w.flatten(1), w.transpose(0, 1).flatten(1)]
    return tuple(pick(torch.linalg.svdvals(side), share) for side in sides)


SPLITS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "spatial": lambda w, rank, seed: spatial_svd(w, *rank),
    "tucker": lambda w, rank, seed: tucker2(w, *rank),
    "cp": lambda w, rank, seed: cp(w, rank[0], seed),
}
"""``SPLITS[kind](weight, rank, seed)``: kernels in order of application, by the weight alone."""
_PRODUCTS = {
    "spatial": "rihx,orxw->oihw",
    "cp": "rixy,rxhz,ryzw,orxy->oihw",
}


def product(kind: str, kernels: Sequence[Tensor]) -> Tensor:
    """The kernel ``[out, in, *kernel]`` that a split stands for.

    >>> w = torch.ones(4, 3, 3, 3, dtype=torch.float64)
    >>> product("tucker", SPLITS["tucker"](w, (1, 1), 0)).sub(w).abs().max().item() < 1e-12
    True
    """
    if kind == "tucker":
        first, core, last = (k.flatten(2) for k in kernels)
        out = torch.einsum("ji,kjp,ok->oip", first[..., 0], core, last[..., 0])
        return out.reshape(*out.shape[:2], *kernels[1].shape[2:])
    return torch.einsum(_PRODUCTS[kind], *kernels)


def parts(
    layer: nn.Module, kind: str, kernels: Sequence[Tensor], bias: Tensor | None
) -> tuple[Part, ...]:
    """The layers that a split is made of, with the settings shared out.

    Args:
        layer: the layer that they replace.
        kind: of the split.
        kernels: weights in order of application, all groups on top of each other.
        bias: of the last.

    >>> [p.kind for p in parts(nn.Linear(4, 3), "channel", [torch.ones(1, 4), torch.ones(3, 1)],
    ...                        None)]
    ['Linear', 'Linear']
    """
    biases = [None] * (len(kernels) - 1) + [bias]
    if isinstance(layer, nn.Linear):
        return tuple(linear_part(k, b) for k, b in zip(kernels, biases, strict=True))
    settings = _settings(options_of(layer), kind, kernels, kernels[0].dim() - 2)
    rows = zip(kernels, biases, settings, strict=True)
    return tuple(convolution_part(k, b, **options) for k, b, options in rows)


def _settings(
    options: dict[str, Any], kind: str, kernels: Sequence[Tensor], dims: int
) -> list[dict[str, Any]]:
    plain = {"groups": options["groups"]}
    along = partial(_along, options, dims)
    if kind == "channel":
        return [options, plain]
    if kind == "tucker":
        return [plain, options, plain]
    pair = [along(0), along(1)]
    if kind == "spatial":
        return [p | plain for p in pair]
    depthwise = {"groups": len(kernels[1])}
    return [plain, *(p | depthwise for p in pair), plain]


def _along(options: dict[str, Any], dims: int, dim: int) -> dict[str, Any]:
    """The settings of one dimension; nothing happens along the others."""
    rest = {"stride": 1, "padding": 0, "dilation": 1}
    out: dict[str, Any] = {"padding_mode": options["padding_mode"]}
    for name, neutral in rest.items():
        value = options[name]
        single = isinstance(value, str)
        out[name] = (
            value if single else tuple(v if d == dim else neutral for d, v in enumerate(value))
        )
    return out
