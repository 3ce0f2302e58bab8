"""Saying what is going on, on stderr, once it takes longer than a moment."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

Say = Callable[[str], None]


class Stages:
    """A line per stage with the seconds since the start, from ``quiet`` seconds on.

    >>> Stages(quiet=60.0)("nothing is said before that")
    """

    def __init__(self, quiet: float = 2.0) -> None:
        self.start, self.quiet = time.perf_counter(), quiet

    def __call__(self, line: str) -> None:
        """Say that a stage begins."""
        seconds = time.perf_counter() - self.start
        if seconds >= self.quiet:
            print(f"[{seconds:6.1f} s] {line}", file=sys.stderr, flush=True)  # noqa: T201


def sayer(progress: bool | Say) -> Say:
    """The function behind a ``progress`` option: none, lines on stderr, or the user's own."""
    if callable(progress):
        return progress
    return Stages() if progress else quiet


def quiet(line: str) -> None:
    """Say nothing.

    >>> quiet("planning")
    """
