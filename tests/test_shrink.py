"""Shrinking by weights alone: exact where rows span others, and both corrections of the source."""

import pytest
import torch
from torch import nn

import fxsvd
from fxsvd.errors import PlanError
from fxsvd.linalg.interpolation import fit_rows, pivoted_qr
from fxsvd.passes import Shrink


def decaying(rows, columns, last, seed=0):
    """A matrix with singular values from 1 down to ``last``."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(noise, full_matrices=False)
    return (u * torch.logspace(0, last, len(s), dtype=torch.float64)) @ vh


def shrunk(net, x, **options):
    return fxsvd.compile(net, x, passes=[Shrink(**options)], progress=False)


def change(net, small, x):
    with torch.no_grad():
        expected = net(x)
        return float((small(x) - expected).norm() / expected.norm())


def test_the_inverse_beats_the_transpose_and_pivots_beat_first_rows():
    a, r = decaying(64, 576, -4), 32
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    first, rest = u[:r, :r], u[r:, :r]
    low = (first * s[:r]) @ vh[:r]

    def error(t, kept):
        return float((a - t @ kept).norm() / a.norm())

    def stacked(inverse):
        return torch.cat([torch.eye(r, dtype=torch.float64), rest @ inverse])

    transpose = error(stacked(first.T), low)
    inverse = error(stacked(torch.linalg.inv(first)), low)
    assert inverse == pytest.approx(float(s[r:].norm() / s.norm()), rel=1e-6)
    assert transpose > 50 * inverse
    pivots = pivoted_qr(a.T, r)[0]
    by_pivots = error(fit_rows(a, a[pivots]), a[pivots])
    by_first = error(fit_rows(a, a[:r]), a[:r])
    assert inverse < by_pivots < by_first


def test_the_pass_does_what_pivots_and_least_squares_say():
    a = decaying(12, 30, -3)
    net = nn.Sequential(nn.Linear(30, 12, bias=False), nn.Linear(12, 5)).double()
    with torch.no_grad():
        net[0].weight.copy_(a)
    small = shrunk(net, torch.randn(4, 30, dtype=torch.float64), ratio=0.5)
    kept = sorted(pivoted_qr(a.T, 6)[0].tolist())
    assert small.report.plan.edits[0].keep == tuple(kept)
    assert torch.equal(small.get_submodule("0").weight, a[kept])
    expected = net[1].weight @ fit_rows(a, a[kept])
    assert torch.allclose(small.get_submodule("1").weight, expected, rtol=0, atol=1e-12)


def spanned_rows(out, columns, rank):
    return decaying(out, rank, -1) @ decaying(rank, columns, -1, seed=1)


def test_rows_that_others_span_go_without_loss():
    net = nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 3)).double()
    with torch.no_grad():
        rows = spanned_rows(8, 11, 4)
        net[0].weight.copy_(rows[:, :10])
        net[0].bias.copy_(rows[:, :10] @ torch.ones(10, dtype=torch.float64))
    x = torch.randn(6, 10, dtype=torch.float64)
    small = shrunk(net, x, ratio=0.5)
    assert small.get_submodule("0").out_features == 4
    assert change(net, small, x) < 1e-9


def test_bias_is_the_one_nearest_in_the_space_that_is_left():
    net = nn.Sequential(nn.Linear(7, 6), nn.Linear(6, 2)).double()
    small = shrunk(net, torch.randn(3, 7, dtype=torch.float64), ratio=0.5)
    (edit,) = small.report.plan.edits
    a, b = net[0].weight.detach(), net[0].bias.detach()
    t = fit_rows(a, a[list(edit.keep)])
    best = torch.linalg.lstsq(t, b.unsqueeze(1)).solution[:, 0]
    assert torch.allclose(small.get_submodule("0").bias, best, rtol=0, atol=1e-9)


def test_flattened_images_are_absorbed_channel_by_channel():
    layers = nn.Conv2d(3, 8, 1, bias=False), nn.Flatten(), nn.Linear(8 * 9, 4)
    net = nn.Sequential(*layers).double()
    with torch.no_grad():
        net[0].weight.copy_(spanned_rows(8, 3, 2)[..., None, None])
    x = torch.randn(2, 3, 3, 3, dtype=torch.float64)
    small = shrunk(net, x, ratio=0.75)
    assert small.get_submodule("2").in_features == 18
    assert change(net, small, x) < 1e-9


def test_batch_norm_scales_count_and_their_biases_follow():
    layers = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=0)
    net = nn.Sequential(*layers).double().eval()
    generator = torch.Generator().manual_seed(3)
    norm = net[1]
    with torch.no_grad():
        norm.weight.copy_(torch.rand(8, generator=generator) + 0.5)
        norm.running_var.copy_(torch.rand(8, generator=generator) + 0.5)
        norm.running_mean.copy_(torch.randn(8, generator=generator))
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        seen = spanned_rows(8, 3, 2)
        net[0].weight.copy_((seen / scale[:, None])[..., None, None])
        offset = seen @ torch.ones(3, dtype=torch.float64)
        norm.bias.copy_(offset - scale * (net[0].bias - norm.running_mean))
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    small = shrunk(net, x, ratio=0.75).eval()
    assert small.get_submodule("1").num_features == 2
    assert change(net, small, x) < 1e-9


class Stream(nn.Module):
    """Two layers write one space."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(5, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.a(x) + self.b(x))


def test_all_layers_that_write_a_space_keep_the_same_rows():
    net = Stream().double()
    with torch.no_grad():
        rows = spanned_rows(6, 12, 3)
        for part, layer in ((rows[:, :6], net.a), (rows[:, 6:], net.b)):
            layer.weight.copy_(part[:, :5])
            layer.bias.copy_(part[:, 5])
    x = torch.randn(4, 5, dtype=torch.float64)
    small = shrunk(net, x, ratio=0.5)
    assert (small.get_submodule("a").out_features, small.get_submodule("b").out_features) == (3, 3)
    assert change(net, small, x) < 1e-9


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.PReLU(6), "`1.weight` holds a number for each channel"),
        (nn.Conv2d(6, 6, 1, groups=6), "`1.weight` holds a number for each channel"),
        (nn.Conv2d(6, 6, 1, groups=2), "it is not between plain linear layers"),
    ],
)
def test_spaces_with_more_than_plain_layers_stay(layer, reason):
    net = nn.Sequential(nn.Conv2d(3, 6, 1), layer, nn.Conv2d(6, 4, 1))
    plan = shrunk(net, torch.randn(2, 3, 4, 4)).report.plan
    skips = {s.space: s.why for s in plan.skips}
    assert skips["0"].startswith(reason)
    assert plan.values == ()


def test_widths_follow_ratios_and_multiples():
    net = nn.Sequential(nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 2))
    x = torch.randn(3, 9)
    assert [len(e.keep) for e in shrunk(net, x, ratio=0.25).report.plan.edits] == [9, 9]
    assert [len(e.keep) for e in shrunk(net, x, ratio=0.5, round_to=8).report.plan.edits] == [8, 8]
    assert [e.space for e in shrunk(net, x, ratio={"2": 0.5}).report.plan.edits] == ["2"]
    with pytest.raises(PlanError, match="fraction removed"):
        Shrink(ratio=1.5)


class Tiled(nn.Module):
    """Some channels are read twice, others once."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 5)

    def forward(self, x):
        return self.b(self.a(x).repeat(1, 2)[:, :6])


def test_channels_that_are_read_unequally_often_stay():
    (skip, _) = fxsvd.plan(Tiled(), torch.randn(3, 6), passes=[Shrink(ratio=0.5)]).skips
    assert "stand more often in `b.weight`" in skip.why
