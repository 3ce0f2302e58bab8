"""Channel spaces: channels that live in the same axes of the same parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fxsvd.analysis import Analysis, Site
from fxsvd.relations import Atoms, Channels


@dataclass(frozen=True, eq=False)
class Space:
    """Channels that live in the same axes of the same parameters.

    Attributes:
        name: the layer of the first producer; with a running number, ``qkv#1``, where that layer
            writes several spaces, all of which ``qkv`` means.
        channels: the channels' numbers, in the order of the first producer's axis.
        producers: parameter axes that write them.
        consumers: parameter axes that contract them.
        followers: parameter axes with one entry per channel in between.
        frozen: why they cannot go, in words; None where they can.
    """

    name: str
    channels: Atoms
    producers: tuple[Site, ...]
    consumers: tuple[Site, ...]
    followers: tuple[Site, ...]
    frozen: str | None

    @property
    def width(self) -> int:
        """The number of channels."""
        return len(self.channels)

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers (or raw parameters) that produce the space."""
        return _layers(self.producers)

    @property
    def flow(self) -> str:
        """Who writes and who reads it, and why it is frozen, in words."""
        reads = _shortened([layer_name(s.tensor) for s in self.consumers])
        line = f"{_shortened(self.layers)} -> {reads}"
        return f"{line}  [frozen: {self.frozen}]" if self.frozen else line

    def __str__(self) -> str:
        """One line: name, width and flow."""
        return f"{self.name}  {self.width}  {self.flow}"


def layer_name(parameter: str) -> str:
    """The layer a parameter belongs to; a raw parameter's own name.

    >>> layer_name("layer1.0.conv1.weight"), layer_name("pos_embed")
    ('layer1.0.conv1', 'pos_embed')
    """
    head, _, tail = parameter.rpartition(".")
    return (
        head
        if head and tail.partition("_")[0] in ("weight", "bias", "in", "running")
        else parameter
    )


def _layers(sites: Iterable[Site]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(layer_name(site.tensor) for site in sites))


def _shortened(names: Iterable[str], most: int = 3) -> str:
    unique = list(dict.fromkeys(names))
    more = f" +{len(unique) - most}" if len(unique) > most else ""
    return (", ".join(unique[:most]) or "nobody") + more


def spaces_of(
    analysis: Analysis, channels: Channels, signature: np.ndarray, reasons: dict[int, str]
) -> tuple[tuple[Space, ...], Atoms]:
    """Channels by signature; only those that somebody produces or consumes are spaces."""
    _, first, kind = np.unique(signature, return_index=True, return_inverse=True)
    sites_of: dict[int, list[Site]] = {}
    for site in analysis.sites:
        for k in _distinct(kind[channels.of[site.atoms]].ravel()):
            sites_of.setdefault(k, []).append(site)
    order = np.argsort(kind, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(kind[order])) + 1)
    space_of = np.full(channels.count, -1, dtype=np.int64)
    roles = {k: _by_role(sites_of.get(k, [])) for k in np.argsort(first).tolist()}
    found = {k: by_role for k, by_role in roles.items() if by_role["producer"]}
    names = _names([by_role["producer"] for by_role in found.values()])
    spaces: list[Space] = []
    for (k, by_role), name in zip(found.items(), names, strict=True):
        space_of[members[k]] = len(spaces)
        spaces.append(_space(name, members[k], by_role, reasons))
    return tuple(spaces), space_of


def _names(producers: Sequence[tuple[Site, ...]]) -> list[str]:
    """A name per space: its first writer, numbered where that writes several spaces."""
    writers = [_layers(sites) for sites in producers]
    several = Counter(layer for layers in writers for layer in layers)
    numbers: Counter[str] = Counter()
    out = []
    for first, *_ in writers:
        numbers[first] += 1
        out.append(f"{first}#{numbers[first]}" if several[first] > 1 else first)
    return out


def _distinct(kinds: Atoms) -> set[int]:
    """The distinct numbers in a vector that consists of a few long runs."""
    starts = np.flatnonzero(kinds[1:] != kinds[:-1]) + 1
    return {int(kinds[0]), *kinds[starts].tolist()}


def _by_role(sites: list[Site]) -> dict[str, tuple[Site, ...]]:
    return {
        role: tuple(s for s in sites if s.role == role)
        for role in ("producer", "consumer", "follower")
    }


def _space(
    name: str, members: Atoms, sites: dict[str, tuple[Site, ...]], reasons: dict[int, str]
) -> Space:
    frozen = next((reasons[c] for c in members.tolist() if c in reasons), None)
    return Space(name, members, sites["producer"], sites["consumer"], sites["follower"], frozen)
