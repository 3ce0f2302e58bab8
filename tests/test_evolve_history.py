"""What an evolver tells about its resizes."""

from __future__ import annotations

import builtins
import csv
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsvd
from fxsvd import cost
from fxsvd.edits import Plan
from fxsvd.errors import FxsvdError
from fxsvd.evolving.history import Event, History, Width
from fxsvd.evolving.spectra import effective_rank, smallest_share, spectrum
from fxsvd.passes import Factorize, Prune, Widen


def evolved() -> fxsvd.Evolver:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def first_rows(network: nn.Module) -> Tensor:
        return 1 / torch.tensor(len(network.get_parameter("0.weight")))

    evolver = fxsvd.Evolver(
        net, torch.randn(2, 6), optimizer, loss=first_rows, max_loss_increase=1.0
    )
    evolver.resize(Widen(ratio=0.5, only="0"), step=3)
    evolver.resize(Prune(0.8), step=5)  # costs too much
    evolver.resize(Prune(0.25), step=8)
    return evolver


def test_every_space_of_every_resize_is_noted_with_its_spectrum_before() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    evolver = fxsvd.Evolver(net, torch.randn(2, 6).double(), optimizer)
    values = [torch.linalg.svdvals(net[i].weight.detach()) for i in (0, 2)]
    event = evolver.resize(Prune(0.5), step=2)
    assert [(w.space, w.before, w.after) for w in event.widths] == [("0", 4, 2), ("2", 3, 3)]
    for width, v in zip(event.widths, values, strict=True):
        share = v / v.sum()
        assert width.smallest == pytest.approx(float(share.min()), rel=1e-9)
        rank = math.exp(-sum(p * math.log(p) for p in share.tolist()))
        assert width.rank == pytest.approx(rank, rel=1e-9)
    assert event.macs == cost.macs(evolver.model) == 6 * 2 + 2 * 3


def test_directions_that_are_missing_have_no_share() -> None:
    assert smallest_share(torch.tensor([2.0, 1.0]), 2) == pytest.approx(1 / 3)
    assert smallest_share(torch.tensor([2.0, 1.0]), 5) == 0
    assert smallest_share(torch.zeros(2), 2) == effective_rank(torch.zeros(2)) == 0


def test_a_space_whose_writer_is_no_matrix_has_no_spectrum_and_policies_leave_it() -> None:
    layers = nn.Conv2d(3, 4, 1), nn.ReLU(), nn.ConvTranspose2d(4, 8, 2, groups=2), nn.ReLU()
    net, x = nn.Sequential(*layers, nn.Conv2d(8, 2, 1)), torch.randn(2, 3, 5, 5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    policy = fxsvd.Spectral(prune_below=0.9, ignore="0")
    evolver = fxsvd.Evolver(net, x, optimizer, policy=policy)
    deps = fxsvd.analyze(evolver.model)
    assert not len(spectrum(deps, deps.space("2")))
    assert evolver.step(1) == []
    assert Width("2", 8, 4) in evolver.resize(Prune(0.5)).widths


def test_numbers_that_are_not_finite_show_as_such() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    net[0].weight.data[0, 0] = torch.nan
    deps = fxsvd.analyze(fxsvd.capture(net, torch.zeros(2, 4), check=False))
    assert spectrum(deps, deps.spaces[0]).isnan().all()


def test_the_table_has_a_row_per_resize() -> None:
    history = evolved().history
    assert history.table().splitlines() == [
        "| step | parameters | MACs | loss | what was done |",
        "|---:|---:|---:|---|---|",
        "| 3 | 151 | 132 | 0.125 -> 0.08333 | 0 8 -> 12 |",
        "| 5 | 151 | 132 | 0.08333 -> 0.5 | undone |",
        "| 8 | 105 | 90 | 0.08333 -> 0.1111 | 0 12 -> 9, 2 4 -> 3 |",
    ]
    assert isinstance(history, list)
    assert history[1:] == list(history)[1:]


def test_the_csv_has_a_row_per_resize_and_space() -> None:
    history = evolved().history
    rows = list(csv.DictReader(io.StringIO(history.csv())))
    assert [(r["step"], r["space"], r["before"], r["after"]) for r in rows[:3]] == [
        ("3", "0", "8", "12"),
        ("3", "2", "4", "4"),
        ("3", "4", "3", "3"),
    ]
    assert [(r["after"], r["undone"]) for r in rows[3:6]] == [
        ("12", "True"),
        ("4", "True"),
        ("3", "True"),
    ]
    assert float(rows[0]["smallest"]) == history[0].widths[0].smallest


class Notes:
    def __init__(self) -> None:
        self.noted: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.noted.append((tag, scalar_value, global_step))


def test_scalars_go_to_whatever_takes_them() -> None:
    history, notes = evolved().history, Notes()
    history.to_tensorboard(notes, prefix="net")
    noted = {(tag, step): value for tag, value, step in notes.noted}
    assert noted["net/parameters", 3] == 151
    assert noted["net/loss/after", 5] == pytest.approx(0.5)
    assert [noted["net/undone", step] for step in (3, 5, 8)] == [0, 1, 0]
    assert [noted["net/width/0", step] for step in (3, 5, 8)] == [12, 12, 9]
    assert noted["net/rank/0", 8] == history[2].widths[0].rank
    bare = Notes()
    History([Event(1, Plan(), 9, None, None, False)]).to_tensorboard(bare)
    assert [tag for tag, *_ in bare.noted] == ["fxsvd/parameters", "fxsvd/undone"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own
def test_tensorboard_itself_takes_them(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        evolved().history.to_tensorboard(writer)
    read: Any = EventAccumulator(str(tmp_path)).Reload()
    assert [(s.step, s.value) for s in read.Scalars("fxsvd/width/0")] == [(3, 12), (5, 12), (8, 9)]


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_plot_is_a_picture(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"widths.{ending}"
    evolved().history.plot(path)
    start = path.read_bytes()[:200]
    assert b"PNG" in start[:8] if ending == "png" else b"<?xml" in start
    bare = History([Event(1, Plan(), 9, None, None, False)])
    bare.plot(tmp_path / f"bare.{ending}")


def test_without_matplotlib_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = builtins.__import__

    def none_of_it(name: str, *rest: Any, **options: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **options)

    history = evolved().history
    monkeypatch.setattr(builtins, "__import__", none_of_it)
    with pytest.raises(FxsvdError, match=r"pip install 'fxsvd\[plot\]'"):
        history.plot(tmp_path / "widths.png")


def test_a_history_survives_saving_and_an_old_one_can_be_read(tmp_path: Path) -> None:
    evolver = evolved()
    torch.save(evolver.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)

    def fresh() -> fxsvd.Evolver:
        net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
        return fxsvd.Evolver(net, torch.randn(2, 6), torch.optim.SGD(net.parameters(), lr=0.1))

    again = fresh()
    again.load_state_dict(state)
    assert list(again.history) == list(evolver.history)
    assert again.history.table() == evolver.history.table()
    state.pop("averages")  # as they were before there were any of these
    for event in state["events"]:
        for key in ("macs", "widths", "advice"):
            event.pop(key)
    old = fresh()
    old.load_state_dict(state)
    assert [str(event) for event in old.history] == [str(event) for event in evolver.history]
    assert old.history[0].widths == ()


def test_a_layer_that_is_replaced_shows_in_the_table() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    evolver = fxsvd.Evolver(net, torch.randn(2, 8), optimizer)
    evolver.resize(Factorize(rank={"0": 2}))
    assert evolver.history.table().splitlines()[-1].count("factorized to rank 2") == 1
