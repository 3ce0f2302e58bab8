"""ONNX files are compared with PyTorch in ONNX Runtime, and a wrong one never stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxsvd import export
from fxsvd.capture import capture
from fxsvd.errors import FxsvdError
from fxsvd.export import ExportError, export_onnx

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the onnx extra")
pytest.importorskip("onnxscript", reason="needs the onnx extra")


class Gate(nn.Module):
    """Takes nested arguments and a default; returns a dict with a tuple in it."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(3, 3)

    def forward(self, x: Tensor, shift: Tensor | None = None, pair: Any = None) -> dict[str, Any]:
        y = self.project(x)
        if shift is not None:
            y = y + shift
        if pair is not None:
            y = y * pair[0] - pair[1]["k"]
        return {"hidden": y, "rest": (y.relu(), y.argmax(-1))}


class Masked(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.masked_fill(x > 0, float("-inf")), x.softmax(-1)


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x


class BatchOfTwo(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, -1)


def row() -> Tensor:
    return torch.randn(1, 3)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "convolutional": (convolutional, lambda: torch.randn(2, 3, 8, 8)),
    "captured": (
        lambda: capture(convolutional(), torch.randn(2, 3, 8, 8)),
        lambda: torch.randn(5, 3, 8, 8),
    ),
    "tuple": (Gate, lambda: (row(), row())),
    "constant operand": (Gate, lambda: (row(), torch.randn(3))),
    "nested dict": (Gate, lambda: {"pair": (row(), {"k": row()}), "x": row()}),
    "tokens": (lambda: nn.Embedding(9, 4), lambda: torch.tensor([[1, 8, 0]])),
    "infinities": (Masked, row),
    "attention": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        lambda: torch.randn(1, 5, 8),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_file_computes_what_the_module_computes(name: str, tmp_path: Path) -> None:
    build, inputs = CASES[name]
    difference = export_onnx(build(), tmp_path / "net.onnx", inputs())
    assert difference is not None
    assert difference < 1e-5


def test_a_torchvision_model(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision", reason="needs the torchvision extra")
    net = torchvision.models.resnet18(weights=None)
    difference = export_onnx(net, tmp_path / "net.onnx", torch.randn(1, 3, 64, 64))
    assert difference is not None
    assert difference < 1e-4


def test_the_batch_is_dynamic_and_the_names_are_those_of_the_arguments(tmp_path: Path) -> None:
    export_onnx(Gate(), tmp_path / "net.onnx", {"x": row(), "shift": row()})
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    x = torch.randn(7, 3).numpy()
    assert [node.name for node in session.get_inputs()] == ["x", "shift"]
    assert [array.shape for array in session.run(None, {"x": x, "shift": x})] == [(7, 3)] * 2 + [
        (7,)
    ]


def test_module_inputs_and_modes_are_left_as_they_were(tmp_path: Path) -> None:
    net = convolutional().train()
    net[3].eval()
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    inputs = torch.randn(2, 3, 8, 8)
    given = inputs.clone()
    export_onnx(net, tmp_path / "net.onnx", inputs)
    assert torch.equal(inputs, given)
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert [layer.training for layer in net] == [True, True, True, False, True, True, True]


def test_it_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export_onnx(nn.Linear(3, 2), tmp_path / "net.onnx", row())
    assert capfd.readouterr() == ("", "")


def test_an_unchecked_file_is_written_without_running_it(tmp_path: Path) -> None:
    assert export_onnx(Noisy(), tmp_path / "net.onnx", row(), check=False) is None
    assert (tmp_path / "net.onnx").exists()


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Noisy(), r"output 0 differs by .* of its largest value"),
        (Branching(), r"torch.onnx cannot export this network: .*data-dependent"),
        (BatchOfTwo(), r"ONNX Runtime cannot run the exported file|cannot export"),
    ],
)
def test_what_cannot_be_right_raises_and_leaves_no_file(
    net: nn.Module, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message):
        export_onnx(net, tmp_path / "net.onnx", row())
    assert not list(tmp_path.iterdir())


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxruntime" else name)
    with pytest.raises(FxsvdError, match=r"needs onnxruntime: pip install 'fxsvd\[onnx\]'"):
        export_onnx(nn.Linear(3, 2), tmp_path / "net.onnx", row())
