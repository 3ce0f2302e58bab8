"""The examples run as scripts, and say what their readers are told they say."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NEEDS = {
    "compress_resnet": ("torchvision", "onnxruntime"),
    "without_retraining": ("sklearn",),
}
SAYS = {
    "compress_resnet": (
        "layer4.1.conv1     512     128  layer4.1.conv1",
        "made again, equal: True",
    ),
    "custom_layer": (
        "[frozen: `swish_default`: swish.default has no rule]",
        "scale: 8 channels, beta: 16 features",
    ),
    "transformer": (
        "encoder.layers.0.linear1: 256 -> 64",
        "embed: 64 stays (not in `only`)",
        "logits of another batch: (7, 5)",
    ),
    "without_retraining": (
        "selected and refitted to half its widths: 25% of the parameters",
        "lost of its variance: predicted  measured",
    ),
}

LAUNCHED = {"evolve_torchrun"}  # see test_evolve_torchrun.py


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == SAYS.keys() | LAUNCHED


@pytest.mark.usefixtures("own_tables")
@pytest.mark.parametrize("name", SAYS)
def test_the_example_runs(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for package in NEEDS.get(name, ()):
        pytest.importorskip(package, reason=f"{name} needs {package}")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    out = capsys.readouterr().out
    for line in SAYS[name]:
        assert line in out
