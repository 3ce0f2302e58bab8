"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fxsvd.layers import LAYERS
from fxsvd.rules import LITERALS, RULES

# Not tests: imported by them, once, under their own names.
collect_ignore_glob = ["helpers/*", "zoo/models.py", "zoo/sweep.py"]


@pytest.fixture
def own_tables() -> Iterator[None]:
    """Rules and layer rows that a test registers do not reach other tests."""
    tables = (LAYERS, RULES, LITERALS)
    saved = [dict(table) for table in tables]
    yield
    for table, content in zip(tables, saved, strict=True):
        table.clear()
        table.update(content)
