"""README.md and CONTRIBUTING.md keep their word: their Python runs and prints what they say."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import fxsvd
from fxsvd.cli import _parser
from fxsvd.passes import Prune
from tests.helpers.nets import IDIOMS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
VARIES = re.compile(r"\d\.\de-\d\d")  # rounding errors differ from machine to machine


@pytest.fixture
def own_idioms() -> Iterator[None]:
    """Idioms that a document registers do not reach other tests."""
    saved = dict(IDIOMS)
    yield
    IDIOMS.clear()
    IDIOMS.update(saved)


def blocks(document: str) -> list[tuple[str, str]]:
    """The language and the content of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", document, re.MULTILINE | re.DOTALL)


def python_blocks(document: str) -> Iterator[tuple[str, str]]:
    """Code and, where the next block is text, what it prints."""
    found = blocks(document)
    for (language, code), (next_language, text) in zip(found, [*found[1:], ("", "")], strict=True):
        if language == "python":
            yield code, text if next_language == "text" else ""


def run(code: str, names: dict[str, object]) -> None:
    """As a module of its own would run it: without this file's ``__future__`` imports."""
    exec(compile(code, "<document>", "exec", dont_inherit=True), names)


@pytest.mark.usefixtures("own_tables")
def test_the_code_runs_and_prints_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("torchvision", "onnxruntime"):
        pytest.importorskip(package, reason=f"the README uses {package}")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "readme"}
    for code, text in python_blocks(README):
        run(code, names)
        printed = VARIES.sub("?", capsys.readouterr().out)
        if text:
            assert printed.rstrip() == VARIES.sub("?", text).rstrip()


@pytest.mark.usefixtures("own_tables", "own_idioms")
def test_the_worked_examples_of_contributing_work() -> None:
    names: dict[str, object] = {"__name__": "contributing"}
    before = set(IDIOMS)
    for code, _ in python_blocks(CONTRIBUTING):
        run(code, names)
    added = [idiom for name, idiom in IDIOMS.items() if name not in before]
    assert [idiom.name for idiom in added] == ["hypotenuse", "threshold_layer"]
    for idiom in added:
        small = fxsvd.compile(idiom.build(), idiom.inputs(2), passes=[Prune(0.5)])
        rows = small.report.spaces
        widths = {r.name: (r.before, r.after if r.after < r.before else r.why) for r in rows}
        assert widths == idiom.widths


def test_the_commands_parse() -> None:
    shell = "".join(code for language, code in blocks(README) if language == "bash")
    commands = [line for line in shell.splitlines() if line.startswith("fxsvd ")]
    assert len(commands) >= 5
    for command in commands:
        _parser().parse_args(shlex.split(command)[1:])


@pytest.mark.parametrize("document", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_files_that_it_links_to_exist(document: str) -> None:
    prose = re.sub(r"^```.*?^```", "", document, flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#:]+)\)", prose):
        assert (ROOT / target).exists(), target


def test_two_commands_do_all_the_set_up() -> None:
    lines = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    install = 'python3 -m venv .venv && .venv/bin/pip install -e ".[{}]" && .venv/bin/{}'
    assert lines == [install.format("demo", "fxsvd demo"), install.format("test", "pytest")]
