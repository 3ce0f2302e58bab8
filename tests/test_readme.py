"""README.md keeps its word: its Python runs and prints what it says, its commands parse."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from fxsvd.cli import _parser
from fxsvd.layers import LAYERS
from fxsvd.rules import RULES

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
VARIES = re.compile(r"\d\.\de-\d\d")  # rounding errors differ from machine to machine


@pytest.fixture
def tables() -> Iterator[None]:
    """What the README registers must not reach other tests."""
    saved = [(table, dict(table)) for table in (LAYERS, RULES)]
    yield
    for table, content in saved:
        table.clear()
        table.update(content)


def python_blocks() -> Iterator[tuple[str, str]]:
    """Code and, where the next block is text, what it prints."""
    following = [*BLOCKS[1:], ("", "")]
    for (language, code), (next_language, text) in zip(BLOCKS, following, strict=True):
        if language == "python":
            yield code, text if next_language == "text" else ""


@pytest.mark.usefixtures("tables")
def test_the_code_runs_and_prints_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("torchvision", "onnxruntime"):
        pytest.importorskip(package, reason=f"the README uses {package}")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "readme"}
    for code, text in python_blocks():
        exec(code, names)
        printed = VARIES.sub("?", capsys.readouterr().out)
        if text:
            assert printed.rstrip() == VARIES.sub("?", text).rstrip()


def test_the_commands_parse() -> None:
    shell = "".join(code for language, code in BLOCKS if language == "bash")
    commands = [line for line in shell.splitlines() if line.startswith("fxsvd ")]
    assert len(commands) >= 5
    for command in commands:
        _parser().parse_args(shlex.split(command)[1:])


def test_files_that_it_links_to_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_two_commands_do_all_the_set_up() -> None:
    lines = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    install = 'python3 -m venv .venv && .venv/bin/pip install -e ".[{}]" && .venv/bin/{}'
    assert lines == [install.format("demo", "fxsvd demo"), install.format("test", "pytest")]
