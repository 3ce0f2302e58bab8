"""README.md and CONTRIBUTING.md keep their word: their Python runs and prints what they say."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fxsvd.cli import _parser
from fxsvd.layers import LAYERS
from fxsvd.rules import RULES
from tests.helpers.nets import IDIOMS, randomized
from tests.test_idioms import compiled

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
VARIES = re.compile(r"\d\.\de-\d\d")  # rounding errors differ from machine to machine


@pytest.fixture
def tables() -> Iterator[None]:
    """What a document registers must not reach other tests."""
    saved = [(table, dict(table)) for table in (LAYERS, RULES, IDIOMS)]
    yield
    for table, content in saved:
        table.clear()
        table.update(content)
