"""Refitting a layer, against least squares on the rows themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxsvd.capture import capture
from fxsvd.data.moments import Moment
from fxsvd.data.readers import Reader, readers
from fxsvd.dependency import analyze
from fxsvd.selecting.fit import fit, lost, own_output

EXACT = {"rtol": 1e-9, "atol": 1e-9}
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (6,)),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), (6,)),
    "convolution": (lambda: nn.Conv2d(2, 4, (1, 3)), (2, 5, 5)),
    "grouped": (lambda: nn.Conv2d(6, 4, (1, 2), groups=2), (6, 5, 5)),
}


def reader_of(module: nn.Module, shape: tuple[int, ...], *behind: nn.Module) -> tuple[Any, Reader]:
    torch.manual_seed(0)
    net = nn.Sequential(module, *behind).double().eval()
    graph = capture(net, torch.randn(2, *shape, dtype=torch.float64), check=False)
    return graph, readers(analyze(graph))["0"]


def rows_for(reader: Reader, count: int = 200) -> Tensor:
    """Correlated rows with a mean."""
    groups, size = reader.entries().shape
    torch.manual_seed(1)
    mix = torch.randn(size, size, dtype=torch.float64)
    return torch.randn(count, groups, size, dtype=torch.float64) @ mix + 3


def outputs_of(reader: Reader, rows: Tensor) -> Tensor:
    """``[rows, groups, out / groups]``."""
    y = torch.einsum("goi,ngi->ngo", reader.matrices(), rows)
    bias = reader.module.bias
    return y if bias is None else y + bias.detach().reshape(y.shape[1:])


def moment_of(rows: Tensor, y: Tensor | None = None) -> Moment:
    moment = Moment()
    for i in range(0, len(rows), 50):
        moment.add(rows[i : i + 50], None if y is None else y[i : i + 50])
    return moment


def some(reader: Reader) -> Any:
    alive = np.ones(reader.entries().shape, dtype=bool)
    alive[0, [1, 4]] = False
    alive[-1, [0, 2, 5]] = False
    return alive


def solved(x: Tensor, y: Tensor, w: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Minimise Σ‖y − b − M x‖²/n + ε Σⱼ Cⱼⱼ ‖Mⱼ − Wⱼ‖² by QR, with a column of ones."""
    n, pull = len(x), (ridge * x.var(0, unbiased=False)).sqrt()
    data = torch.cat([x, torch.ones(n, 1, dtype=x.dtype)], 1) / n**0.5
    prior = torch.cat([torch.diag(pull), torch.zeros(len(pull), 1, dtype=x.dtype)], 1)
    left, right = torch.cat([data, prior]), torch.cat([y / n**0.5, pull.unsqueeze(1) * w.T])
    solution = torch.linalg.lstsq(left, right, driver="gelsd").solution
    return solution[:-1].T, solution[-1]


@pytest.mark.parametrize("ridge", [0.0, 1e-4, 0.3])
@pytest.mark.parametrize("name", LAYERS)
def test_the_fit_is_ridge_regression_towards_the_old_weights(name: str, ridge: float) -> None:
    make, shape = LAYERS[name]
    _, reader = reader_of(make(), shape)
    x, alive = rows_for(reader), some(reader)
    noise = torch.randn(len(x), len(reader.weight.value), dtype=torch.float64)
    y = outputs_of(reader, x) + noise.reshape(len(x), reader.groups, -1)
    found = fit(reader, moment_of(x, y), alive, ridge=ridge)
    intercept = found.intercept.reshape(reader.groups, -1)
    left = torch.zeros(())
    for g in range(reader.groups):
        kept = torch.from_numpy(np.flatnonzero(alive[g]))
        m, b = solved(x[:, g, kept], y[:, g], reader.matrices()[g][:, kept], ridge)
        torch.testing.assert_close(found.matrices[g][:, kept], m, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(intercept[g], b, rtol=1e-7, atol=1e-7)
        left = left + (y[:, g] - x[:, g, kept] @ m.T - b).square().sum()
    assert not found.matrices[torch.from_numpy(~alive).unsqueeze(1).expand_as(found.matrices)].any()
    share = float(left / (y - y.mean(0)).square().sum())
    assert found.error == pytest.approx(share, rel=1e-7)


@pytest.mark.parametrize("name", LAYERS)
def test_own_output_is_what_the_layer_computes(name: str) -> None:
    make, shape = LAYERS[name]
    _, reader = reader_of(make(), shape)
    x = rows_for(reader)
    expected = moment_of(x, outputs_of(reader, x))
    found = own_output(reader, moment_of(x))
    for part in ("mean", "scatter", "mean_y", "cross", "scatter_y"):
        torch.testing.assert_close(getattr(found, part), getattr(expected, part), **EXACT)


@pytest.mark.parametrize("name", LAYERS)
def test_with_all_inputs_a_layer_stays_what_it_is(name: str) -> None:
    make, shape = LAYERS[name]
    _, reader = reader_of(make(), shape)
    everything = np.ones(reader.entries().shape, dtype=bool)
    found = fit(reader, own_output(reader, moment_of(rows_for(reader))), everything)
    torch.testing.assert_close(found.matrices, reader.matrices(), **EXACT)
    assert found.error < 1e-12
    bias = reader.module.bias
    expected = torch.zeros(4).double() if bias is None else bias.detach()
    torch.testing.assert_close(found.intercept, expected, **EXACT)


def test_inputs_that_repeat_others_are_not_missed() -> None:
    _, reader = reader_of(nn.Linear(6, 4), (6,))
    x = rows_for(reader)
    x[..., 4] = 2 * x[..., 0] - 1
    alive = np.ones((1, 6), dtype=bool)
    alive[0, 4] = False
    found = fit(reader, own_output(reader, moment_of(x)), alive, ridge=0)
    assert found.error < 1e-12
    w = reader.matrices()[0]
    torch.testing.assert_close(found.matrices[0, :, 0], w[:, 0] + 2 * w[:, 4], **EXACT)


def test_constant_inputs_fold_into_the_bias() -> None:
    _, reader = reader_of(nn.Linear(6, 4), (6,))
    x = rows_for(reader)
    x[..., 2] = 7.0
    alive = np.ones((1, 6), dtype=bool)
    alive[0, 2] = False
    found = fit(reader, own_output(reader, moment_of(x)), alive)
    assert found.error < 1e-12
    bias = reader.module.bias.detach() + 7 * reader.matrices()[0, :, 2]
    torch.testing.assert_close(found.intercept, bias, **EXACT)


def test_lost_of_nothing_is_everything() -> None:
    _, reader = reader_of(nn.Linear(6, 4), (6,))
    moment = own_output(reader, moment_of(rows_for(reader)))
    assert lost(moment, torch.zeros_like(reader.matrices())) == pytest.approx(1, rel=1e-12)
    assert lost(moment, reader.matrices()) < 1e-12
    assert lost(moment, 0.5 * reader.matrices()) == pytest.approx(0.25, rel=1e-9)


# ---------------------------------------------------------------- where the numbers go


def assigned(module: nn.Module, *behind: nn.Module) -> tuple[Any, Any, dict[str, Tensor]]:
    """A graph, a fit of its first layer on half of the inputs, and the values by name."""
    graph, reader = reader_of(module, (6, 5, 5), *behind)
    alive = np.arange(6).reshape(1, 6) % 2 == 0
    found = fit(reader, own_output(reader, moment_of(rows_for(reader))), alive)
    return graph, found, {a.parameter: a.value for a in found.assigns(graph)}


def test_a_layer_with_a_bias_gets_another() -> None:
    _, found, values = assigned(nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4))
    assert values.keys() == {"0.weight", "0.bias"}
    assert torch.equal(values["0.bias"], found.intercept)
    assert values["0.weight"].shape == (4, 6, 1, 1)
    assert torch.equal(values["0.weight"].flatten(1), found.matrices[0])


def test_without_a_bias_the_mean_of_the_batch_norm_behind_moves() -> None:
    graph, found, values = assigned(nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4))
    assert values.keys() == {"0.weight", "1.running_mean"}
    norm, x = graph.get_submodule("1"), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        expected = norm(x + found.intercept.reshape(-1, 1, 1))
        norm.running_mean.copy_(values["1.running_mean"])
        torch.testing.assert_close(norm(x), expected, **EXACT)


@pytest.mark.parametrize(
    "behind", [(), (nn.ReLU(),), (nn.BatchNorm2d(4, track_running_stats=False),)]
)
def test_without_either_a_bias_is_added(behind: tuple[nn.Module, ...]) -> None:
    _, found, values = assigned(nn.Conv2d(6, 4, 1, bias=False), *behind)
    assert values.keys() == {"0.weight", "0.bias"}
    assert torch.equal(values["0.bias"], found.intercept)


def test_no_bias_is_added_where_it_would_be_zero() -> None:
    graph, reader = reader_of(nn.Linear(6, 4, bias=False), (6,))
    x = rows_for(reader)
    x = torch.cat([x, -x])
    moment = Moment()
    moment.add(x)
    moment.mean = torch.zeros_like(moment.mean)
    found = fit(reader, own_output(reader, moment), some(reader))
    assert [a.parameter for a in found.assigns(graph)] == ["0.weight"]


def test_an_estimate_names_layer_and_edit() -> None:
    _, found, _ = assigned(nn.Conv2d(6, 4, 1))
    estimate = found.estimate("select")
    assert (estimate.layer, estimate.edit, estimate.error) == ("0", "select", found.error)
    assert 0 < found.error < 1
