"""What is rewritten besides weights, and what the result can do."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxsvd
from fxsvd.edits import Assign, Plan, Remap, describe_inputs, make_inputs
from fxsvd.errors import PlanError
from fxsvd.passes import Prune


class Net(nn.Module):
    """A residual block, a depthwise layer, and a reshape with written sizes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise, self.point = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)
        self.fc, self.out = nn.Linear(8 * 4, 10), nn.Linear(10, 2)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.point(self.depthwise(x))
        x = F.adaptive_avg_pool2d(x, 2)
        return self.out(F.relu(self.fc(x.view(x.shape[0], 32))))


X = torch.randn(2, 3, 6, 6)


@pytest.fixture(scope="module")
def small():
    return fxsvd.compile(Net(), X, passes=[Prune(0.5)])


def test_attributes_follow(small):
    assert (small.stem.out_channels, small.norm.num_features) == (4, 4)
    assert (small.depthwise.in_channels, small.depthwise.groups) == (4, 4)
    assert (small.fc.in_features, small.fc.out_features) == (16, 5)
    assert "Conv2d(3, 4," in repr(small.stem)


def test_literals_and_code_follow(small):
    assert "view(size, 16)" in small.code


def test_shapes_are_propagated(small):
    values = {n.name: n.meta["val"] for n in small.graph.nodes if "val" in n.meta}
    shapes = {name: tuple(v.shape) for name, v in values.items() if isinstance(v, torch.Tensor)}
    assert shapes["stem"][1:] == (4, 6, 6)
    assert shapes["fc"][1] == 5


def test_names_stay_and_survivors_are_bit_identical(small):
    net = Net()
    assert list(small.state_dict()) == list(net.state_dict())
    keep = {e.space: list(e.keep) for e in small.report.plan.edits}
    assert torch.equal(small.stem.weight, net.stem.weight[keep["stem"]])
    assert torch.equal(small.out.weight, net.out.weight[:, keep["fc"]])


def test_the_original_is_untouched_and_shares_nothing(small):
    net = Net()
    before = copy.deepcopy(net.state_dict())
    result = fxsvd.compile(net, X, passes=[Prune(0.5)])
    with torch.no_grad():
        for p in result.parameters():
            p.fill_(7)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())


def test_result_trains_copies_pickles_and_compiles_again(small):
    optimizer = torch.optim.SGD((net := copy.deepcopy(small)).parameters(), 0.1)
    before = net.stem.weight.detach().clone()
    net.train()(X).square().mean().backward()
    optimizer.step()
    assert not torch.equal(net.stem.weight, before)
    again = pickle.loads(pickle.dumps(small))
    torch.testing.assert_close(again.eval()(X), small.eval()(X))
    twice = fxsvd.compile(small, X, passes=[Prune(0.5)])
    assert twice.stem.out_channels == 2


def test_result_exports(small):
    exported = torch.export.export(small.eval(), (X,)).module()
    torch.testing.assert_close(exported(X), small(X))
    compiled = torch.compile(small, backend="eager")
    torch.testing.assert_close(compiled(X), small(X))


def test_report_stays_with_a_copy(small):
    assert copy.deepcopy(small).report.after == small.report.after
    assert pickle.loads(pickle.dumps(small)).report.plan == small.report.plan


def test_several_passes_make_one_plan():
    net = Net()
    passes = [Prune(0.5), Prune(0.5, only=("fc",))]
    small, plan = fxsvd.compile(net, X, passes=passes), fxsvd.plan(net, X, passes=passes)
    assert small.fc.out_features == 2
    assert small.report.plan == plan
    assert fxsvd.apply(net, Plan.from_json(plan.to_json())).fc.out_features == 2
    assert "then:" in str(plan)


def test_a_graph_takes_a_plan_without_inputs():
    net = Net()
    graph = fxsvd.capture(net, X)
    plan = fxsvd.plan(graph, passes=[Prune(0.5)])
    assert fxsvd.apply(graph, plan).stem.out_channels == 4
    with pytest.raises(PlanError, match="what inputs"):
        fxsvd.apply(net, plan)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan((Remap("stemm", 8, (0,)),)), "no space 'stemm'"),
        (Plan((Remap("stem", 9, (0,)),)), "made for another network"),
        (Plan((Remap("stem", 8, ()),)), "without a channel"),
        (Plan((Remap("out", 2, (0,)),)), "cannot be narrowed"),
        (Plan(values=(Assign("fc.bias", torch.ones(1), ""),)), "made for another network"),
    ],
)
def test_plans_that_do_not_fit_are_refused(plan, message):
    with pytest.raises(PlanError, match=message):
        fxsvd.apply(fxsvd.capture(Net(), X), plan)


def test_plan_json_refuses_other_text():
    with pytest.raises(PlanError, match="no plan"):
        Plan.from_json("{}")


def test_inputs_are_described_and_made_again():
    inputs = ((torch.zeros(2, 3), {"mask": torch.ones(2, dtype=torch.int64)}), {"flag": True})
    made = make_inputs(describe_inputs(inputs))
    assert made[0][0].shape == (2, 3)
    assert made[0][1]["mask"].dtype == torch.int64
    assert made[1] == {"flag": True}
