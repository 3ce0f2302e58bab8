"""The example of training on several processes: begun by one process, continued by two."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = str(ROOT / "examples" / "evolve_torchrun.py")
ONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}


def test_two_processes_go_on_where_one_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn", reason="evolve_torchrun needs scikit-learn")
    options = ["--checkpoint", str(tmp_path / "evolved.pt"), "--epochs"]
    with monkeypatch.context() as changed:
        for name, value in (ONE | {"MASTER_PORT": "0"}).items():
            changed.setenv(name, value)
        changed.setattr(sys, "argv", [EXAMPLE, *options, "2"])
        runpy.run_path(EXAMPLE, run_name="__main__")
    first = capsys.readouterr().out.splitlines()
    assert first[2].endswith("| 0 32 -> 24, 3 64 -> 48, 6 64 -> 48 |")

    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [sys.executable, *launch, EXAMPLE, *options, "4"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    said = result.stdout.splitlines()
    assert said[0] == "resumed after epoch 2"
    assert said[1:4] == first[:3]
    assert said[4].endswith("| 0 24 -> 18, 3 48 -> 36, 6 48 -> 36 |")
    assert said[5].endswith(" right after 4 epochs, 18208 parameters")
    assert float(said[5].split("%")[0]) > 90
