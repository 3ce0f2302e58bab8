"""Channel spaces: which channels must change together, who writes and reads them, who is frozen.

``analyze`` walks the graph (``fxsvd.analysis``), solves the relations and sorts the channels into
spaces: channels that live in the same parameter axes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import networkx as nx
import numpy as np
import numpy.typing as npt
from torch import fx

from fxsvd.analysis import Analysis
from fxsvd.coupling import Group, couple
from fxsvd.relations import Atoms, Channels, Relations
from fxsvd.spaces import Space, layer_name, spaces_of


@dataclass(frozen=True, eq=False)
class Dependencies:
    """The result of ``analyze``: spaces, and the groups in which their channels go.

    ``print`` it for a table; ``graph`` is the same as a ``networkx.DiGraph`` from producing layers
    through spaces to consuming layers.
    """

    analysis: Analysis
    channels: Channels
    spaces: tuple[Space, ...]
    groups: tuple[Group, ...]
    space_of: Atoms = field(repr=False)

    @cached_property
    def graph(self) -> nx.DiGraph:
        """Layers and spaces as nodes, ``writes`` / ``reads`` / ``follows`` as edges."""
        graph = nx.DiGraph()
        for space in self.spaces:
            graph.add_node(space.name, kind="space", width=space.width, frozen=space.frozen)
            for role, sites in (("follows", space.followers), ("writes", space.producers)):
                for site in sites:
                    graph.add_edge(layer_name(site.tensor), space.name, role=role)
            for site in space.consumers:
                graph.add_edge(space.name, layer_name(site.tensor), role="reads")
        return graph

    @cached_property
    def growing(self) -> Dependencies:
        """The same for growth: what is gathered from channels again and again grows without them.

        So each stream of a network whose skips are tiles is a space of its own.

        >>> import torch
        >>> from fxsvd.capture import capture
        >>> class Block(torch.nn.Module):
        ...     def __init__(self, width, out):
        ...         super().__init__()
        ...         self.a, self.b = torch.nn.Linear(width, 5), torch.nn.Linear(5, out)
        ...     def forward(self, x):
        ...         return x.repeat(1, 2) + self.b(self.a(x))
        >>> net = torch.nn.Sequential(Block(2, 4), Block(4, 8), torch.nn.Linear(8, 3))
        >>> deps = analyze(capture(net, torch.zeros(2, 2)))
        >>> [[(s.name, s.width) for s in d.spaces if not s.frozen] for d in (deps, deps.growing)]
        [[('0.b', 4), ('0.a', 5), ('1.a', 5)], [('0.b', 4), ('0.a', 5), ('1.b', 8), ('1.a', 5)]]
        """
        relations = self.analysis.relations
        if relations.growing or not relations.copies:
            return self
        analysis = Analysis(self.analysis.graph, Relations(growing=True)).run()
        assert analysis.relations.count == relations.count  # types of one are types of the other
        _tie_copies(analysis)
        return _solved(analysis)

    def within(self, whole: Dependencies) -> Atoms:
        """By channel, the one that it is (a part of) in another analysis of the same graph.

        Args:
            whole: what has this one as its ``growing``, or this one.
        """
        out: Atoms = np.zeros(self.channels.count, dtype=np.int64)
        out[self.channels.of] = whole.channels.of
        return out

    def space(self, name: str) -> Space:
        """The space of that name.

        Raises:
            KeyError: there is none.
        """
        for space in self.spaces:
            if space.name == name:
                return space
        raise KeyError(name)

    def __str__(self) -> str:
        """A table with a line per space, the frozen ones last."""
        rows = sorted(self.spaces, key=lambda space: space.frozen is not None)
        size = max([5, *(len(space.name) for space in rows)])
        head = f"{'space':<{size}}  {'width':>6}  written by -> read by"
        return "\n".join([head, *(f"{s.name:<{size}}  {s.width:>6}  {s.flow}" for s in rows)])


def analyze(graph: fx.GraphModule) -> Dependencies:
    """Find which channels of a captured graph hang together.

    Args:
        graph: what ``fxsvd.capture`` returned.

    >>> import torch
    >>> from fxsvd.capture import capture
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> deps = analyze(capture(net, torch.zeros(2, 4)))
    >>> [(s.name, s.width, s.frozen) for s in deps.spaces]
    [('0', 8, None), ('2', 2, "it is the network's output")]
    """
    return _solved(Analysis(graph).run())


def _solved(analysis: Analysis) -> Dependencies:
    channels, signature, groups = _coupled(analysis)
    while _tie_rows(analysis, channels, groups):
        channels, signature, groups = _coupled(analysis)
    least = 1 if analysis.relations.growing else 2
    groups, reasons = _freeze_groups(groups, channels, _counts_rows(analysis, channels), least)
    signature[[c for c in reasons if c not in channels.reasons]] += np.uint64(1)
    spaces, space_of = spaces_of(analysis, channels, signature, reasons)
    wanted = [g for g in groups if (space_of[g.channels] >= 0).all()]
    return Dependencies(analysis, channels, spaces, tuple(wanted), space_of)


def _tie_copies(analysis: Analysis) -> None:
    """Let copies grow with their originals where nobody else writes them, or reads those."""
    channels = analysis.relations.solve()
    roles = {role: np.zeros(channels.count, dtype=bool) for role in ("producer", "consumer")}
    for site in analysis.sites:
        if site.role in roles:
            roles[site.role][channels.of[site.atoms]] = True
    for new, old in analysis.relations.copies:
        written, read = roles["producer"][channels.of[new]], roles["consumer"][channels.of[old]]
        if not (written.any() and read.any()):
            analysis.relations.unify(new, old)


def _coupled(analysis: Analysis) -> tuple[Channels, np.ndarray, list[Group]]:
    channels = analysis.relations.solve()
    signature = _signatures(analysis, channels)
    return channels, signature, couple(analysis.relations, channels, signature)


def _tie_rows(analysis: Analysis, channels: Channels, groups: list[Group]) -> bool:
    """Let rows that cannot shrink go whole instead (heads whose features attend to each other).

    Returns:
        Whether anything was tied, so that the relations have to be solved again.
    """
    stuck = np.zeros(channels.count, dtype=bool)
    counts = _counts_rows(analysis, channels)
    for group in groups:
        frozen = any(c in channels.reasons for c in group.channels.tolist())
        if group.why and not frozen and (group.steps == 1 or counts[group.channels].any()):
            stuck[group.channels] = True
    tied = False
    for rows, _ in analysis.relations.lengths if stuck.any() else ():
        if not isinstance(rows, np.ndarray):
            continue
        of = channels.of[rows]
        if stuck[of].all() and (of != of[..., :1]).any():
            analysis.relations.unify(rows, rows[..., :1])
            tied = True
    return tied


def _signatures(analysis: Analysis, channels: Channels) -> np.ndarray:
    """A hash per channel of the parameter axes it lives in."""
    rng = np.random.default_rng(1)
    signature = np.zeros(channels.count, dtype=np.uint64)
    for site in analysis.sites:
        # A channel that is found several times in an axis is counted once.
        signature[channels.of[site.atoms]] += rng.integers(1, 1 << 63, dtype=np.uint64)
    frozen = np.fromiter(channels.reasons, dtype=np.int64, count=len(channels.reasons))
    signature[frozen] += np.uint64(1)
    return signature


def _counts_rows(analysis: Analysis, channels: Channels) -> npt.NDArray[np.bool_]:
    """Which channels are indices of rows: they go only with all that is in the row."""
    out = np.zeros(channels.count, dtype=bool)
    for parents, children in analysis.relations.nests:
        row = channels.of[children]
        out[channels.of[parents[(row != row[:, :1]).any(axis=1)]]] = True
    return out


def _freeze_groups(
    groups: list[Group], channels: Channels, rows: npt.NDArray[np.bool_], least: int
) -> tuple[list[Group], dict[int, str]]:
    """A group with a frozen channel is frozen whole, as is one of fewer equal steps than needed."""
    reasons = dict(channels.reasons)
    live = []
    for group in groups:
        members = group.channels.tolist()
        why = next((reasons[c] for c in members if c in reasons), None)
        if why is None and rows[group.channels].any():
            why = "it counts rows of channels (heads, groups) and follows whole ones"
        if why is None and group.steps >= least:
            live.append(group)
            continue
        for channel in members:
            reasons.setdefault(channel, _why_frozen(group, why))
    return live, reasons


def _why_frozen(group: Group, why: str | None) -> str:
    if why is not None:
        return f"{group.why}, and a part cannot go: {why}" if group.why else why
    if len(group.channels) == 1:
        return "a single channel"
    return f"{group.why}: parts of {_sizes(group)} channels cannot shrink in step"


def _sizes(group: Group) -> str:
    sizes = sorted({len(cell.channels) for cell in group.cells})
    return ", ".join(map(str, sizes[:4]))
