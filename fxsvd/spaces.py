"""Channel spaces: channels that live in the same axes of the same parameters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fxsvd.analysis import Analysis, Site
from fxsvd.relations import Atoms, Channels


@dataclass(frozen=True, eq=False)
class Space:
    """Channels that live in the same axes of the same parameters.

    Attributes:
        name: the first producer's parameter (with a running number where it writes several spaces).
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
        return tuple(dict.fromkeys(layer_name(site.tensor) for site in self.producers))

    def __str__(self) -> str:
        """One line: name, width, who writes and reads it, or why it is frozen."""
        reads = _shortened([layer_name(s.tensor) for s in self.consumers])
        line = f"{self.name:<40} {self.width:>6}  {_shortened(self.layers)} -> {reads}"
        return f"{line}  [frozen: {self.frozen}]" if self.frozen else line


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
    spaces: list[Space] = []
    names: dict[str, int] = {}
    for k in sorted(range(len(first)), key=lambda k: int(first[k])):
        by_role = _by_role(sites_of.get(k, []))
        if by_role["producer"]:
            space_of[members[k]] = len(spaces)
            spaces.append(_space(members[k], by_role, reasons, names))
    return tuple(spaces), space_of


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
    members: Atoms,
    sites: dict[str, tuple[Site, ...]],
    reasons: dict[int, str],
    names: dict[str, int],
) -> Space:
    base = layer_name(sites["producer"][0].tensor)
    names[base] = names.get(base, 0) + 1
    name = base if names[base] == 1 else f"{base}#{names[base]}"
    frozen = next((reasons[c] for c in members.tolist() if c in reasons), None)
    return Space(name, members, sites["producer"], sites["consumer"], sites["follower"], frozen)
