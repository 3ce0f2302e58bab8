"""What a wheel holds: two source folders, one package, with and without symbolic links."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

pytest.importorskip("setuptools", minversion="77", reason="builds a wheel with setuptools")

ROOT = Path(__file__).resolve().parent.parent
BUILD = "from setuptools.build_meta import build_wheel; build_wheel('dist')"


def copy_of_the_repository(target: Path) -> Path:
    for folder in ("fxsvd", "passes"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, target / folder, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    return target


def files_of_wheel(source: Path) -> set[str]:
    command = [sys.executable, "-c", BUILD]
    subprocess.run(command, cwd=source, check=True, capture_output=True, text=True)
    (wheel,) = source.glob("dist/*.whl")
    with ZipFile(wheel) as archive:
        return set(archive.namelist())


def expected_files() -> set[str]:
    folders = [p for p in (ROOT / "fxsvd").iterdir() if p.is_dir() and not p.is_symlink()]
    modules = [*(ROOT / "fxsvd").glob("*.py"), *(m for f in folders for m in f.glob("*.py"))]
    passes = {f"fxsvd/passes/{path.name}" for path in (ROOT / "passes").glob("*.py")}
    assert len(passes) > 1
    return {m.relative_to(ROOT).as_posix() for m in modules} | passes | {"fxsvd/py.typed"}


@pytest.mark.parametrize("links", [True, False])
def test_the_wheel_holds_every_module(links: bool, tmp_path: Path) -> None:
    source = copy_of_the_repository(tmp_path)
    if not links:
        (source / "fxsvd" / "passes").unlink()
    files = files_of_wheel(source)
    packaged = {name for name in files if name.startswith("fxsvd/")}
    assert packaged == expected_files()
    assert [name for name in files if name.endswith("/licenses/LICENSE")]
    assert not [name for name in files if name.startswith(("passes", "tests", "examples"))]


def test_every_package_is_listed() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {path.parent for path in (ROOT / "fxsvd").rglob("__init__.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in found} | {"fxsvd.passes"}
    assert set(listed) == names


def test_passes_refuse_to_be_imported_under_another_name() -> None:
    command = [sys.executable, "-c", "import passes"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "import this package as 'fxsvd.passes', not as 'passes'" in result.stderr


def test_passes_are_one_package_whichever_path_leads_there() -> None:
    from fxsvd import passes

    assert passes.__name__ == "fxsvd.passes"
    assert Path(passes.__file__ or "").resolve() == ROOT / "passes" / "__init__.py"
