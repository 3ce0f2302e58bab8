"""The report: its numbers agree with the networks, its text is exact, its JSON is complete."""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from torch import Tensor, nn

import fxsvd
from fxsvd.passes import Prune, Widen


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.conv(x)).relu().mean((2, 3)))
        return out


class Sorted(nn.Module):
    """Sorting the channels has no consistent narrowing."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(x).sort(-1).values)
        return out


def report_of(model: nn.Module, inputs: Tensor, *passes: Prune, **options: Any) -> fxsvd.Report:
    small = fxsvd.compile(model, inputs, passes=passes or [Prune(ratio=0.5)], **options)
    report = small.report
    assert isinstance(report, fxsvd.Report)
    return report


def test_the_text_is_a_table() -> None:
    report = report_of(Chain(), torch.randn(2, 3, 8, 8), verify=False)
    assert str(report).splitlines() == [
        "                      before     after    kept",
        "parameters              258       130    50.4%",
        "MACs                  13.8 k    6.92 k   50.0%",
        "bytes                 1.10 k      560    50.7%",
        "activation bytes      4.86 k    2.82 k   57.9%",
        "",
        "space  before   after  written by",
        "conv        8       4  conv",
        "",
        "not narrowed:",
        "  head (2): it is the network's output",
    ]


def test_the_numbers_are_those_of_the_networks() -> None:
    model = Chain()
    small = fxsvd.compile(model, torch.randn(2, 3, 8, 8), passes=[Prune(ratio=0.5)])
    report: Any = small.report
    assert report.before.parameters == sum(p.numel() for p in model.parameters())
    assert report.after.parameters == sum(p.numel() for p in small.parameters())
    assert sum(row.parameters_before for row in report.layers) == report.before.parameters
    assert sum(row.parameters_after for row in report.layers) == report.after.parameters


def test_a_row_per_layer_tells_its_shape() -> None:
    report = report_of(Chain(), torch.randn(2, 3, 8, 8))
    rows = [(row.name, row.kind, row.before, row.after) for row in report.layers]
    assert rows == [
        ("conv", "Conv2d", (8, 3, 3, 3), (4, 3, 3, 3)),
        ("norm", "BatchNorm2d", (8,), (4,)),
        ("head", "Linear", (2, 8), (2, 4)),
    ]


def test_verification_leaves_its_error() -> None:
    report = report_of(Chain(), torch.randn(2, 3, 8, 8))
    assert report.error is not None
    assert 0 <= report.error < 1e-12
    assert f"verified: equals the silenced original to {report.error:.1e}" in str(report)


def test_what_stays_has_its_reason() -> None:
    report = report_of(Sorted(), torch.randn(2, 4))
    first, last = report.spaces
    assert (first.before, first.after) == (8, 8)
    assert "sort" in first.why
    assert last.why == "it is the network's output"
    assert f"  first (8): {first.why}" in str(report).splitlines()


def test_several_passes_are_counted_together() -> None:
    report = report_of(Chain(), torch.randn(2, 3, 8, 8), Prune(ratio=0.5), Prune(ratio=0.5))
    assert [(row.before, row.after) for row in report.spaces] == [(8, 2), (2, 2)]
    assert report.plan.then is not None


def test_the_json_holds_everything() -> None:
    report = report_of(Chain(), torch.randn(2, 3, 8, 8))
    data = json.loads(report.to_json())
    assert data["before"]["parameters"] == 258
    assert [row["name"] for row in data["layers"]] == ["conv", "norm", "head"]
    assert data["spaces"][0]["producers"] == ["conv"]
    assert fxsvd.Plan.from_json(json.dumps(data["plan"])) == report.plan


def test_a_wider_network_is_reported_as_such():
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    wide = fxsvd.compile(net, torch.zeros(2, 4), passes=[Widen(ratio=0.5)], progress=False)
    text = str(wide.report)
    assert re.search(r"^0 +8 +12 +0$", text, re.MULTILINE)
    assert "equals the original to" in text
    assert "not widened:\n  2 (2): it is the network's output" in text
