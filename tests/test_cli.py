"""The command line, in process: what it writes, what it says, and its exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fxsvd
from fxsvd import models
from fxsvd.cli import main

ROOT = Path(__file__).resolve().parent.parent
FACTORY = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 5))

def tokens():
    return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 6)), torch.arange(6).reshape(2, 3)

def text():
    return "no module"

def branching():
    class Branching(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x
    return Branching()
"""
NET = ["nets_of_the_user:net", "--input-size", "3,8,8"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with a module in it, as a user would have."""
    (tmp_path / "nets_of_the_user.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "nets_of_the_user", raising=False)
    return tmp_path


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The message of a command that must fail with code 1 and without a traceback."""
    assert main(argv) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err.partition("fxsvd: error: ")[2].rstrip()


def usage_error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    return capsys.readouterr().err


# ---------------------------------------------------------------- compress


def test_compress_prints_the_report_and_its_stages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", *NET, "--ratio", "0.25"]) == 0
    out, err = capsys.readouterr()
    assert "verified: equals the silenced original" in out
    assert ["0", "16", "12", "0"] in [line.split() for line in out.splitlines()]
    assert "3 (5): it is the network's output" in out
    assert "ms before" in out
    stages = ("loading", "capturing", "analysing", "planning Prune", "rewriting", "verifying")
    assert [line.split("] ")[1].partition(" nets")[0] for line in err.splitlines()[:6]] == [*stages]


def test_compress_writes_an_onnx_file_that_computes_the_same(folder: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the onnx extra")
    assert main(["compress", *NET, "--onnx", "net.onnx", "--plan", "plan.json"]) == 0
    plan = fxsvd.Plan.from_json((folder / "plan.json").read_text())
    model, _ = models.load("nets_of_the_user:net", size=(3, 8, 8))
    small = fxsvd.apply(model, plan)
    session = onnxruntime.InferenceSession(folder / "net.onnx")
    x = torch.randn(5, 3, 8, 8)
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(got, small(x).detach().numpy(), atol=1e-5)


def test_the_report_is_written_as_json(folder: Path) -> None:
    assert main(["compress", *NET, "--save-report", "report.json", "--no-verify"]) == 0
    report = json.loads((folder / "report.json").read_text())
    assert report["error"] is None
    assert [(row["name"], row["before"], row["after"]) for row in report["spaces"]] == [
        ("0", 16, 8),
        ("3", 5, 5),
    ]


def test_a_dry_run_prints_and_writes_the_plan_only(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", *NET, "--dry-run", "--plan", "plan.json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["0: 16 -> 8", "3: 5 stays (it is the network's output)", "wrote plan.json"]
    assert len(fxsvd.Plan.from_json((folder / "plan.json").read_text()).edits[0].keep) == 8


@pytest.mark.parametrize(
    ("options", "width"),
    [
        (["--criterion", "l1", "--scope", "global", "--ratio", "0.5"], 8),
        (["--ratio", "0.4", "--round-to", "8"], 16),
        (["--ratio", "0.5", "--only", "0"], 8),
        (["--ratio", "0.5", "--ignore", "[0-2]"], 16),
        (["--criterion", "dead"], 16),
    ],
)
def test_options_reach_the_pass(options: list[str], width: int, folder: Path) -> None:
    assert main(["compress", *NET, *options, "--save-report", "report.json"]) == 0
    report = json.loads((folder / "report.json").read_text())
    assert report["spaces"][0]["after"] == width


def test_a_factory_may_return_example_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "nets_of_the_user:tokens", "--ratio", "0.5"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["0", "8", "4", "0"] in rows


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_compress_a_model_of_a_library(
    library: str, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    pytest.importorskip(library, reason=f"needs the {library} extra")
    name = f"{library}:resnet18"
    command = ["compress", name, "--input-size", "3,64,64", "--save-report", "report.json"]
    assert main([*command, "--ignore", "layer1"]) == 0
    rows = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert ["layer4.0.conv1", "512", "256"] in rows
    report = json.loads((folder / "report.json").read_text())
    frozen = {row["name"]: row["why"] for row in report["spaces"] if row["why"]}
    assert frozen["layer1.0.conv1"] == "in `ignore`"
    assert frozen["fc"] == "it is the network's output"


# ---------------------------------------------------------------- inspect, demo


def test_inspect_shows_spaces_costs_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *NET]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("3.33 k parameters · 18.4 k MACs")
    assert lines[1] == "1 of 2 channel spaces can be narrowed"
    assert lines[-2].split() == ["0", "16", "0", "->", "3"]
    assert lines[-1].endswith("3 -> nobody  [frozen: it is the network's output]")


def test_the_demo_compresses_and_keeps_its_accuracy(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn", reason="needs the demo extra")
    pytest.importorskip("onnxruntime", reason="needs the onnx extra")
    assert main(["demo", "--out", "new/folder", "--epochs", "5"]) == 0
    out, err = capsys.readouterr()
    assert (folder / "new/folder/fxsvd-demo.onnx").is_file()
    assert "fxsvd-demo.onnx" in out
    assert "epoch 5 of 5: test accuracy" in err
    rows = [line.split() for line in out.splitlines()]
    assert ["blocks.0.conv1", "32", "16", "blocks.0.conv1"] in rows
    (line,) = [line for line in out.splitlines() if line.startswith("test accuracy")]
    trained, pruned, tuned = (float(number) for number in re.findall(r"([\d.]+)%", line))
    assert pruned < 95 <= min(trained, tuned)


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_are_loaded(suffix: str, wrapped: bool, folder: Path) -> None:
    model, _ = models.load("nets_of_the_user:net", size=(3, 8, 8))
    state = {name: torch.rand_like(value) for name, value in model.state_dict().items()}
    path = folder / f"weights{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": state, "epoch": 3} if wrapped else state, path)
    else:
        pytest.importorskip("safetensors").torch.save_file(state, path)
    loaded, _ = models.load("nets_of_the_user:net", size=(3, 8, 8), weights=path)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in state.items())


def test_random_weights_are_the_same_in_every_run_and_the_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    first, x = models.load("nets_of_the_user:net", size=(3, 8, 8), batch=4)
    again, y = models.load("nets_of_the_user:net", size=(3, 8, 8), batch=4)
    assert torch.equal(x, y)
    assert x.shape == (4, 3, 8, 8)
    assert torch.equal(
        nn.utils.parameters_to_vector(first.parameters()),
        nn.utils.parameters_to_vector(again.parameters()),
    )
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("torchvision:efficientnet_b1", (3, 240, 240)),
        ("torchvision:lraspp_mobilenet_v3_large", (3, 520, 520)),
        ("timm:test_resnet", (3, 160, 160)),
    ],
)
def test_the_input_size_comes_from_the_models_configuration(
    name: str, size: tuple[int, ...]
) -> None:
    library = name.partition(":")[0]
    pytest.importorskip(library, reason=f"needs the {library} extra")
    _, inputs = models.load(name)
    assert inputs.shape == (1, *size)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["inspect", "resnet18"], "'resnet18' names no model: write timm:NAME, torchvision:NAME"),
        (["inspect", "timm:resnet19"], "timm has no model 'resnet19'; did you mean resnet18"),
        (["inspect", "torchvision:resnet19"], "torchvision has no model 'resnet19'; did you mean"),
        (["inspect", "no_such_module:net"], "cannot import no_such_module: No module named"),
        (["inspect", "nets_of_the_user:nett"], "no callable 'nett'; did you mean net?"),
        (["inspect", "nets_of_the_user:text"], "returns a str, not an nn.Module"),
        (["inspect", "nets_of_the_user:net"], "give --input-size, such as 3,224,224"),
        (["inspect", "torchvision:r3d_18"], "give --input-size, such as 3,224,224"),
        (["inspect", *NET, "--pretrained"], "pretrained weights are for timm: and torchvision:"),
        (["inspect", *NET, "--weights", "no.pt"], "cannot read weights from no.pt: [Errno 2]"),
        (["compress", *NET, "--ratio", "1.5"], "ratio is the fraction removed, in [0, 1); got 1.5"),
        (["compress", *NET, "--ignore", "con"], "no layer or space is called 'con'"),
        (["compress", *NET, "--onnx", "no/net.onnx"], "cannot write no/net.onnx: there is no fol"),
        (["inspect", "nets_of_the_user:branching", "--input-size", "3"], "nets_of_the_user.py"),
    ],
)
def test_errors_are_one_message_and_code_1(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for library in ("timm", "torchvision"):
        if argv[1].startswith(library):
            pytest.importorskip(library, reason=f"needs the {library} extra")
    assert message in error_of(capsys, *argv)


def test_weights_of_another_model_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), folder / "other.pt")
    message = error_of(capsys, "inspect", *NET, "--weights", "other.pt")
    assert "other.pt does not hold this model's weights" in message
    assert "Missing key(s)" in message
    torch.save([1, 2], folder / "list.pt")
    message = error_of(capsys, "inspect", *NET, "--weights", "list.pt")
    assert message == "list.pt holds a list, not a state dict"


def test_weights_that_cannot_be_fetched_are_explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchvision", reason="needs the torchvision extra")

    def unreachable(*args: object, **kwargs: object) -> None:
        raise OSError("name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setenv("TORCH_HOME", "empty")
    message = error_of(capsys, "inspect", "torchvision:squeezenet1_1", "--pretrained")
    assert message == (
        "cannot get the pretrained weights of torchvision:squeezenet1_1: name or service not known "
        "(without a connection, download them elsewhere and give --weights FILE)"
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "COMMAND"),
        (["compress"], "MODEL"),
        (["inspect", "timm:resnet18", "--input-size", "3,x"], "'3,x' is no shape such as"),
        (["inspect", "timm:resnet18", "--batch", "0"], "0 is not a positive number"),
        (["compress", "timm:resnet18", "--criterion", "taylor"], "invalid choice: 'taylor'"),
        (["compress", "m:f", "--dry-run", "--onnx", "a.onnx"], "goes without --onnx"),
    ],
)
def test_wrong_usage_is_code_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in usage_error(capsys, *argv)


def test_the_command_as_a_process(folder: Path) -> None:
    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import fxsvd.__main__"
        command = [sys.executable, "-c", code, *argv]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run("compress", *NET, "--plan", "plan.json")
    assert done.returncode == 0, done.stderr
    assert "verified" in done.stdout
    assert (folder / "plan.json").is_file()
    failed = run("inspect", "nowhere:net")
    assert failed.returncode == 1
    assert failed.stderr.endswith(
        "fxsvd: error: cannot import nowhere: No module named 'nowhere'\n"
    )
