"""Channels that go without a trace: the outputs of the original, not of a silenced one."""

import pytest
import torch
from torch import nn

import fxsvd
from fxsvd.capture import capture
from fxsvd.constants import constant_inputs
from fxsvd.passes import Prune


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 10, 3), nn.BatchNorm2d(10), nn.GELU()),
        *(nn.Conv2d(10, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3)),
    )


def channel(net: nn.Sequential, layer: int, index: int, weight: float, bias: float) -> None:
    with torch.no_grad():
        net[layer].weight[index], net[layer].bias[index] = weight, bias


CASES = {
    # what is done to the network: the width of each space afterwards
    "scale off, reader unpadded": (lambda n: channel(n, 1, 0, 0, 0.7), (7, 10, 6, 7)),
    "scale off, relu makes zero": (lambda n: channel(n, 1, 1, 0, -0.7), (7, 10, 6, 7)),
    "scale off, reader padded": (lambda n: channel(n, 4, 2, 0, 0.5), (8, 10, 6, 7)),
    "zero, reader padded": (lambda n: channel(n, 4, 3, 0, 0), (8, 9, 6, 7)),
    "constant through pool and flatten": (lambda n: channel(n, 6, 0, 0, 0.3), (8, 10, 5, 7)),
    "unread": (lambda n: n[12].weight.data[:, 5].zero_(), (8, 10, 6, 6)),
    "alive": (lambda n: None, (8, 10, 6, 7)),
}


@pytest.mark.parametrize("case", CASES)
def test_dead_channels_go_and_no_output_changes(case):
    change, widths = CASES[case]
    net, x = network(), torch.randn(3, 3, 12, 12)
    change(net)
    small = fxsvd.compile(net, x, passes=[Prune(criterion="dead")])
    assert [small.get_submodule(n).weight.shape[0] for n in ("0", "3", "6", "10")] == list(widths)
    for training in (False, True):
        net.train(training)
        small.train(training)
        torch.testing.assert_close(small(x), net(x), rtol=1e-5, atol=1e-6)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


def test_a_zero_that_enters_a_norm_is_not_dead():
    net = Normed()
    with torch.no_grad():
        net.first.weight[0], net.first.bias[0], net.last.weight[:, 0] = 0, 0, 0
    small = fxsvd.compile(net, torch.randn(2, 4), passes=[Prune(criterion="dead")])
    assert small.first.out_features == 6


def test_constants_are_found_per_feature():
    net = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight[2], net[0].bias[2] = 0, 0
    found = constant_inputs(capture(net, torch.zeros(2, 3)))
    assert found["2"].isnan().tolist() == [True, True, False, True]
    assert found["2"][2] == 0.5


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(nn.functional.dropout(self.first(x), 0.5, self.training))


def test_a_constant_behind_a_functional_dropout_is_none_in_train_mode():
    net = Dropping()
    with torch.no_grad():
        net.first.weight[:2], net.first.bias[0], net.first.bias[1] = 0, 0.5, 0
    found = constant_inputs(capture(net, torch.zeros(2, 3)))
    assert found["last"].isnan().tolist() == [True, False, True, True]


def test_a_dead_plan_survives_json():
    net, x = network(), torch.randn(2, 3, 12, 12)
    channel(net, 6, 0, 0, 0.3)
    plan = fxsvd.plan(net, x, passes=[Prune(criterion="dead")])
    again = fxsvd.Plan.from_json(plan.to_json())
    assert again == plan
    assert again.values[0].parameter == "10.bias"
    net.eval()
    torch.testing.assert_close(fxsvd.apply(net, again).eval()(x), net(x), rtol=1e-5, atol=1e-6)
