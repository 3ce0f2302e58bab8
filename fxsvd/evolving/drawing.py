"""Widths, parameters and loss over the steps, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fxsvd.errors import FxsvdError

Line = tuple[list[int], list[int]]


def draw(events: Sequence[Any], path: str | Path) -> None:
    """Draw a history (see ``fxsvd.evolving.history``).

    Args:
        events: the resizes, in order.
        path: of the picture; its ending says which kind.

    Raises:
        FxsvdError: nothing was resized yet, or matplotlib is not installed.

    >>> draw([], "widths.png")
    Traceback (most recent call last):
    fxsvd.errors.FxsvdError: nothing was resized yet: there is nothing to plot
    """
    if not events:
        raise FxsvdError("nothing was resized yet: there is nothing to plot")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FxsvdError("plots need matplotlib: pip install 'fxsvd[plot]'") from error
    figure = Figure(figsize=(8, 9), layout="constrained")
    widths, sizes, losses = figure.subplots(3, 1, sharex=True)
    for name, line in width_lines(events).items():
        widths.plot(*line, drawstyle="steps-post", marker=".", label=name)
    widths.set_ylabel("width")
    steps = [event.step for event in events]
    sizes.plot(steps, [event.parameters for event in events], drawstyle="steps-post", marker=".")
    sizes.set_ylabel("parameters")
    judged = [event for event in events if event.after is not None]
    undone = [event for event in judged if event.undone]
    losses.plot([e.step for e in judged], [e.before for e in judged], ".-", label="before")
    losses.plot([e.step for e in judged], [e.after for e in judged], ".-", label="after")
    losses.plot([e.step for e in undone], [e.after for e in undone], "x", label="undone")
    losses.set(ylabel="loss", xlabel="step")
    for axes in (widths, losses):
        if axes.get_lines():
            axes.legend(fontsize="x-small", ncols=3)
    figure.savefig(path)


def width_lines(events: Sequence[Any]) -> dict[str, Line]:
    """Steps and widths of every space that changed; a line begins before its first resize.

    >>> from types import SimpleNamespace as Some
    >>> event = Some(step=4, widths=[Some(space="a", before=8, after=6)])
    >>> width_lines([event])
    {'a': ([3, 4], [8, 6])}
    """
    out: dict[str, Line] = {}
    for event in events:
        for width in event.widths:
            start = [event.step - 1], [width.before]
            steps, widths = out.setdefault(width.space, start)
            steps.append(event.step)
            widths.append(width.after)
    return {name: line for name, line in out.items() if len(set(line[1])) > 1}
