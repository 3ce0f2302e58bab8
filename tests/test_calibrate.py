"""Calibration against brute force, and what it refuses."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fxsvd
from fxsvd import calibrate as calibrate_function
from fxsvd.calibrate import LEAST, MOST, calibrate, chosen_rows
from fxsvd.capture import capture
from fxsvd.data.moments import Moment
from fxsvd.data.readers import input_rows, positions, readers
from fxsvd.data.statistics import Statistics
from fxsvd.dependency import Dependencies, analyze
from fxsvd.errors import FxsvdError, PlanError

EXACT = {"rtol": 1e-9, "atol": 1e-9}


class Convolutions(nn.Module):
    """Plain, grouped, depthwise and strided convolutions, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2, stride=2)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, padding=1, padding_mode="reflect")
        self.twice, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.grouped(F.relu(self.plain(x))))
        x = self.twice(F.relu(self.twice(self.depthwise(x))))
        return self.fc(x.mean((2, 3)))


class Attention(nn.Module):
    """A packed projection over tokens, heads, and a linear layer over a grid of features."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.grid = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(self.grid(y).transpose(1, 2).flatten(2))


NETS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "convolutions": (Convolutions, (3, 6, 6)),
    "attention": (Attention, (5, 8)),
}


def made(name: str) -> tuple[nn.Module, Dependencies, list[Tensor]]:
    torch.manual_seed(0)
    kind, shape = NETS[name]
    net = kind().double().eval()
    data = [torch.randn(n, *shape, dtype=torch.float64) for n in (40, 40, 7)]
    return net, analyze(capture(net, data[0], check=False)), data


def brute_force(net: nn.Module, name: str, data: Iterable[Tensor]) -> Tensor:
    """All rows that a layer sees, ``[rows, groups, row]``, by hooks and unfold."""
    layer, seen = net.get_submodule(name), []

    def see(module: Any, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        if isinstance(module, nn.Linear):
            seen.append(x.reshape(-1, 1, x.shape[-1]).clone())
            return
        if module.padding_mode != "zeros":
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        padding = module.padding if module.padding_mode == "zeros" else 0
        rows = F.unfold(x, module.kernel_size, module.dilation, padding, module.stride)
        seen.append(rows.transpose(1, 2).reshape(-1, module.groups, rows.shape[1] // module.groups))

    hook = layer.register_forward_pre_hook(see)
    with torch.no_grad():
        for batch in data:
            net(batch)
    hook.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("name", NETS)
def test_all_positions_equal_brute_force(name: str) -> None:
    net, deps, data = made(name)
    found = calibrate(deps, data, positions="all")
    assert found.keys() == {
        n for n, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))
    }
    assert found.samples == 87
    for layer, moment in found.items():
        rows = brute_force(net, layer, data)
        centred = rows - rows.mean(0)
        assert moment.count == len(rows)
        torch.testing.assert_close(moment.mean, rows.mean(0), **EXACT)
        expected = torch.einsum("ngi,ngj->gij", centred, centred) / len(rows)
        torch.testing.assert_close(moment.covariance, expected, **EXACT)


def test_large_batches_are_multiplied_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    _, deps, data = made("convolutions")
    whole = calibrate(deps, data, positions="all")
    monkeypatch.setattr(sys.modules["fxsvd.calibrate"], "LARGEST", 500)
    parts = calibrate(deps, data, positions="all")
    for layer, moment in whole.items():
        assert parts[layer].batches > 3 or moment.count * moment.mean.numel() < 3 * 500
        torch.testing.assert_close(parts[layer].covariance, moment.covariance, **EXACT)


def test_only_the_layers_asked_for() -> None:
    _, deps, data = made("convolutions")
    assert list(calibrate(deps, data, layers=["fc", "plain"])) == ["fc", "plain"]


# ---------------------------------------------------------------- the choice of rows


def test_as_many_positions_of_each_sample_as_asked_for() -> None:
    _, deps, data = made("convolutions")
    reader = readers(deps)["plain"]
    where = chosen_rows(reader, data[0], 5, (0, 0)).reshape(40, 5)
    assert (where // 36 == torch.arange(40).unsqueeze(1)).all()
    assert {m.count for m in calibrate(deps, data, layers=["plain"], positions=5).values()} == {435}
    everything = chosen_rows(reader, data[0], 99, (0, 0))
    assert torch.equal(everything, torch.arange(40 * 36))


@pytest.mark.parametrize("count", [1, 5, 7, 35])
def test_every_position_is_as_likely_as_any_other(count: int) -> None:
    """Each count is a sum of at most two Bernoulli variables per sample: five standard errors."""
    _, deps, _ = made("convolutions")
    reader, samples = readers(deps)["plain"], 20_000
    where = chosen_rows(reader, torch.empty(samples, 3, 6, 6), count, (0, 0))
    share = torch.bincount(where % 36, minlength=36) / samples
    expected = count / 36
    assert (share - expected).abs().max() < 5 * (expected / samples) ** 0.5


def test_the_choice_follows_seed_and_batch() -> None:
    _, deps, data = made("convolutions")
    by_name = readers(deps)
    first = chosen_rows(by_name["plain"], data[0], 3, (0, 0))
    assert torch.equal(first, chosen_rows(by_name["plain"], data[0], 3, (0, 0)))
    for seed in ((1, 0), (0, 1)):
        assert not torch.equal(first, chosen_rows(by_name["plain"], data[0], 3, seed))
    other = torch.empty(40, 8, 12, 12)  # as many positions
    assert positions(by_name["grouped"].module, other) == 36
    assert torch.equal(first, chosen_rows(by_name["grouped"], other, 3, (0, 0)))


def test_layers_of_one_geometry_share_a_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    made_for: list[Any] = []
    module = sys.modules["fxsvd.calibrate"]

    def lookup(conv: Any, x: Tensor, where: Tensor) -> Any:
        made_for.append((conv.kernel_size, len(x)))
        return readers_lookup(conv, x, where)

    readers_lookup = module.lookup  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "lookup", lookup)
    threes = [nn.Conv2d(4, 4, 3, padding=1).double() for _ in range(3)]
    net = nn.Sequential(*threes, nn.Conv2d(4, 4, 1).double(), nn.Conv2d(4, 4, 3).double()).eval()
    data = [torch.randn(n, 4, 6, 6, dtype=torch.float64) for n in (40, 40, 7)]
    found = calibrate(analyze(capture(net, data[0], check=False)), data, positions=9)
    each = [(3, 3), (1, 1), (3, 3)]
    assert made_for == [(kernel, n) for n in (40, 40, 7) for kernel in each]
    with torch.no_grad():
        inputs = [[net[:i](x) for i in range(len(net))] for x in data]
    for i, layer in enumerate(net):
        reader = readers(analyze(capture(net, data[0], check=False)))[str(i)]
        expected = Moment()
        for number, values in enumerate(inputs):
            where = chosen_rows(reader, values[i], 9, (0, number))
            expected.add(input_rows(layer, values[i], where))
        torch.testing.assert_close(found[str(i)].covariance, expected.covariance, **EXACT)


def test_the_choice_leaves_the_random_state_alone() -> None:
    _, deps, data = made("convolutions")
    state = torch.random.get_rng_state()
    calibrate(deps, data, positions=3)
    assert torch.equal(state, torch.random.get_rng_state())


CHOICE = """
import json, torch
from torch import nn
from fxsvd.calibrate import chosen_rows
from fxsvd.capture import capture
from fxsvd.dependency import analyze
from fxsvd.data.readers import readers
x = torch.zeros(4, 3, 6, 6)
deps = analyze(capture(nn.Sequential(nn.Conv2d(3, 2, 3, padding=1)), x, check=False))
print(json.dumps(chosen_rows(readers(deps)["0"], x, 3, (7, 2)).tolist()))
"""


def test_the_choice_is_the_same_in_another_process() -> None:
    x = torch.zeros(4, 3, 6, 6)
    deps = analyze(capture(nn.Sequential(nn.Conv2d(3, 2, 3, padding=1)), x, check=False))
    own = chosen_rows(readers(deps)["0"], x, 3, (7, 2)).tolist()
    other = subprocess.run(
        [sys.executable, "-c", CHOICE],
        cwd=Path(__file__).parent.parent,
        env={"PYTHONPATH": ".", "PYTHONHASHSEED": "123", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=True,
    )
    assert json.loads(other.stdout) == own


def test_auto_takes_about_what_the_layer_costs_within_bounds() -> None:
    """Rows per sample: ¾ · positions · outputs / row entries, in [4, 64], or all there are."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),  # ¾ · 400 · 4 / 27
        nn.Conv2d(4, 64, 1),  # ¾ · 400 · 16, at most 64
        nn.Conv2d(64, 2, 3),  # ¾ · 324 · 2 / 576, at least 4
        nn.Conv2d(2, 2, 17),  # 4 positions
    )
    data = [torch.randn(10, 3, 20, 20)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = calibrate(analyze(capture(net, data[0], check=False)), data)
    assert [m.count // 10 for m in found.values()] == [45, MOST, LEAST, 4]


def test_wide_rows_may_take_more_positions_than_narrow_ones() -> None:
    net, x = nn.Sequential(nn.Linear(400, 400)), torch.randn(5, 300, 400)
    (moment,) = calibrate(analyze(capture(net, x, check=False)), [x]).values()
    assert moment.count == 5 * 100


def test_sampled_positions_estimate_the_moment_of_all() -> None:
    _, deps, _ = made("convolutions")
    data = [torch.randn(400, 3, 6, 6, dtype=torch.float64) for _ in range(4)]
    every = calibrate(deps, data, layers=["grouped"], positions="all")["grouped"]
    some = calibrate(deps, data, layers=["grouped"], positions=3)["grouped"]
    error = (some.covariance - every.covariance).norm() / every.covariance.norm()
    assert error < 3 * some.accuracy


# ---------------------------------------------------------------- stopping early, saying


def test_calibration_stops_once_it_is_accurate() -> None:
    net = nn.Sequential(nn.Linear(6, 3))
    data = [torch.randn(100, 6) for _ in range(50)]
    deps = analyze(capture(net, data[0], check=False))
    lines: list[str] = []
    found = calibrate(deps, data, accuracy=0.05, say=lines.append)
    assert found["0"].accuracy <= 0.05
    assert 200 <= found.samples < 5000
    assert len(lines) == found.samples // 100
    assert lines[0] == "calibrating: 100 samples, accuracy inf"
    assert lines[-1].startswith(f"calibrating: {found.samples} samples, accuracy 0.0")
    before = calibrate(deps, data[: found.samples // 100 - 1])
    assert before["0"].accuracy > 0.05
    assert calibrate(deps, data, accuracy=1e-9).samples == 5000


def test_progress_counts_samples() -> None:
    _, deps, data = made("attention")
    lines: list[str] = []
    calibrate(deps, data, say=lines.append)
    assert lines == [f"calibrating: {n} samples" for n in (40, 80, 87)]


# ---------------------------------------------------------------- what comes back


def test_statistics_read_well() -> None:
    _, deps, data = made("attention")
    assert fxsvd.calibrate is calibrate_function
    found = fxsvd.calibrate(deps, data, positions="all")
    assert isinstance(found, fxsvd.Statistics)
    assert str(found) == "87 samples\nqkv: 435 rows of 8\ngrid: 870 rows of 4\nproj: 435 rows of 8"
    few = Statistics({"fc": Moment(2, torch.zeros(1, 3)), "none": Moment()}, 2)
    assert str(few) == "2 samples\nfc: 2 rows of 3 (too few)\nnone: nothing"


def test_one_warning_names_the_layer_that_needs_most_samples() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(36, 50), nn.Linear(50, 2))
    x = torch.randn(10, 3, 4, 4)
    deps = analyze(capture(net, x, check=False))
    message = r"^3 saw 10 rows, fewer than the 50 entries of each \(1 further .* least 50 samples"
    with pytest.warns(UserWarning, match=message) as caught:
        found = calibrate(deps, [x])
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert found.few() == {"2": 36, "3": 50}
    calibrate(deps, [torch.randn(50, 3, 4, 4)])


def test_a_wide_layer_keeps_its_few_rows_and_never_makes_their_square() -> None:
    """The classifier of a VGG, whose covariance would take 5 GB."""
    net, x = nn.Sequential(nn.Linear(25_088, 3)).double(), torch.randn(20, 25_088).double()
    deps = analyze(capture(net, x[:2], check=False))
    with pytest.warns(UserWarning, match="0 saw 20 rows, fewer than the 25088 entries"):
        moment = calibrate(deps, list(x.split(7)))["0"]
    w = net[0].weight.detach().unsqueeze(0)
    outputs = moment.times(w)[0] @ w[0].T
    assert moment.scatter is None
    with torch.no_grad():
        torch.testing.assert_close(outputs, net(x).T.cov(correction=0), **EXACT)


# ---------------------------------------------------------------- bad input


def test_a_last_batch_may_be_smaller_and_images_may_differ_in_size() -> None:
    net, deps, _ = made("convolutions")
    data = [torch.randn(n, 3, s, s, dtype=torch.float64) for n, s in ((40, 6), (40, 9), (1, 8))]
    found = calibrate(deps, data, positions="all")
    rows = brute_force(net, "grouped", data)
    torch.testing.assert_close(found["grouped"].mean, rows.mean(0), **EXACT)


def test_a_batch_that_the_network_cannot_run_is_named() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    x = torch.randn(8, 2, 2)
    with pytest.raises(FxsvdError, match="batch 1 of the data cannot be run: The size"):
        calibrate(analyze(capture(net, x, check=False)), [x, torch.randn(8, 3, 3)])


@pytest.mark.parametrize(
    "data", [[], DataLoader(TensorDataset(torch.zeros(0, 5, 8)), batch_size=2)]
)
def test_no_batch_is_an_error(data: Any) -> None:
    _, deps, _ = made("attention")
    with pytest.raises(FxsvdError, match="the data has no batch"):
        calibrate(deps, data)


def test_one_sample_is_enough_to_be_warned() -> None:
    _, deps, data = made("attention")
    with pytest.warns(UserWarning, match="qkv saw 5 rows"):
        found = calibrate(deps, [data[0][:1]])
    assert found.samples == 1
    assert found["proj"].covariance.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_name_the_layer_and_the_batch(bad: float) -> None:
    _, deps, data = made("attention")
    data[1][3, 2, 1] = bad
    with pytest.raises(FxsvdError, match="qkv sees numbers that are not finite in batch 1"):
        calibrate(deps, data)


def test_numbers_that_become_infinite_inside_name_the_layer_that_sees_them() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight[1] = torch.inf
    x = torch.rand(9, 3)
    with pytest.raises(FxsvdError, match=r"^1 sees numbers that are not finite in batch 0"):
        calibrate(analyze(capture(net, x, check=False)), [x])


def test_labels_and_further_keys_are_left_out() -> None:
    _, deps, data = made("attention")
    expected = calibrate(deps, data)
    loader = [(x, torch.zeros(len(x))) for x in data]
    by_key = [{"x": x, "label": torch.zeros(len(x))} for x in data]
    for given in (loader, by_key):
        found = calibrate(deps, given)
        assert all(torch.equal(found[n].covariance, expected[n].covariance) for n in expected)


def test_a_generator_is_refused_before_anything_is_run() -> None:
    _, deps, data = made("attention")
    with pytest.raises(FxsvdError, match="give a list or a DataLoader"):
        calibrate(deps, (x for x in data))


def test_unknown_layers_and_positions_are_refused() -> None:
    _, deps, data = made("attention")
    with pytest.raises(
        FxsvdError, match=r"no layer 'pro' that could be refitted; near: \['proj'\]"
    ):
        calibrate(deps, data, layers=["pro"])
    for wrong in ("some", 0, -1):
        with pytest.raises(FxsvdError, match="positions is 'auto', 'all' or a number"):
            calibrate(deps, data, positions=wrong)  # type: ignore[arg-type]


def test_weights_without_numbers_are_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 2, device="meta"))
    deps = analyze(capture(net, torch.zeros(2, 3), check=False))
    with pytest.raises(PlanError, match="meta device"):
        calibrate(deps, [torch.zeros(4, 3)])


# ---------------------------------------------------------------- the model stays as it is


def state(net: nn.Module) -> dict[str, Any]:
    tensors = {name: t.clone() for name, t in net.state_dict().items()}
    modes = {name: m.training for name, m in net.named_modules()}
    hooks = {n: (len(m._forward_pre_hooks), len(m._forward_hooks)) for n, m in net.named_modules()}
    return {"tensors": tensors, "modes": modes, "hooks": hooks}


class Normed(nn.Module):
    """Batch norm and dropout, partly in eval mode, and a hook of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.norm(self.conv(x)).relu()).mean((2, 3)))


@pytest.mark.parametrize("bad", [False, True])
def test_the_model_is_left_as_it_was(bad: bool) -> None:
    net = Normed().train()
    net.norm.eval()
    data = [torch.randn(8, 3, 5, 5), torch.randn(8, 3, 5, 5)]
    deps = analyze(capture(net, data[0], check=False))
    before, graph = copy.deepcopy(state(net)), copy.deepcopy(state(deps.analysis.graph))
    if bad:
        data[1][0] = float("nan")
        with pytest.raises(FxsvdError, match="not finite"):
            calibrate(deps, data)
    else:
        calibrate(deps, data)
    for module, expected in ((net, before), (deps.analysis.graph, graph)):
        after = state(module)
        assert after["modes"] == expected["modes"]
        assert after["hooks"] == expected["hooks"]
        for name, value in expected["tensors"].items():
            assert torch.equal(after["tensors"][name], value)
    assert all(p.grad is None for p in net.parameters())


# ---------------------------------------------------------------- several processes


def split_in_turns(data: list[Tensor], rank: int) -> list[Tensor]:
    return data[rank::2]


def one_rank_alone(data: list[Tensor], rank: int) -> list[Tensor]:
    return data if rank == 0 else []


SHARES = {"in turns": split_in_turns, "one rank alone": one_rank_alone}
RUNS: dict[str, dict[str, Any]] = {
    "all": {"positions": "all"},
    "sampled": {"positions": 3},
    "stopping": {"positions": "all", "accuracy": 1e-9},
}


def work(rank: int, store: str, out: str) -> None:
    """One of two processes: moments of its share of the data, reduced over both."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    _, deps, data = made("convolutions")
    data = [d + 1e3 for d in data]
    results = {}
    for share, of in SHARES.items():
        for run, options in RUNS.items():
            found = calibrate(deps, of(data, rank), **options)
            results[share, run] = found.samples, {n: vars(m) for n, m in found.items()}
    moment, rows = Moment(), paired()
    if rank == 0:
        moment.add(*rows)
    results["pairs"] = vars(moment.reduced())
    torch.save(results, f"{out}{rank}.pt")
    dist.destroy_process_group()


def paired() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 2, 6, generator=generator, dtype=torch.float64)
    return x, x[..., :3] ** 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each of two processes got."""
    folder = tmp_path_factory.mktemp("ranks")
    context = mp.spawn(work, (str(folder / "store"), str(folder / "out")), nprocs=2, join=False)
    assert context is not None
    for _ in range(60):
        if context.join(timeout=5):
            break
    else:
        for process in context.processes:
            process.kill()
        pytest.fail("two processes did not agree in five minutes")
    return [torch.load(folder / f"out{r}.pt", weights_only=False) for r in range(2)]


@pytest.mark.parametrize(
    ("share", "run"),
    [(s, r) for s in SHARES for r in RUNS if (s, r) != ("one rank alone", "sampled")],
)
def test_two_processes_give_what_one_gives(ranks: list[Any], share: str, run: str) -> None:
    _, deps, data = made("convolutions")
    expected = calibrate(deps, [d + 1e3 for d in data], **RUNS[run])
    for result in ranks:
        samples, moments = result[share, run]
        assert samples == expected.samples
        for name, moment in expected.items():
            got = moments[name]
            assert got["count"] == moment.count
            scale = float(moment.covariance.abs().max())
            for mine, theirs in (
                (got["mean"], moment.mean),
                (got["scatter"] / moment.count / scale, moment.covariance / scale),
            ):
                torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_pairs_of_one_process_reach_the_other(ranks: list[Any]) -> None:
    expected = Moment()
    expected.add(*paired())
    expected.covariance  # noqa: B018  # leaves the dual form
    for result in ranks:
        for name in ("mean", "scatter", "mean_y", "cross", "scatter_y"):
            torch.testing.assert_close(result["pairs"][name], getattr(expected, name), **EXACT)
