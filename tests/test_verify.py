"""The verifier must see every way in which a result can be wrong."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxsvd
from fxsvd.capture import capture
from fxsvd.dependency import analyze
from fxsvd.errors import PlanError, VerificationError
from fxsvd.passes import Prune
from fxsvd.rewrite import rewrite
from fxsvd.survivors import SURVIVING
from fxsvd.verify import verify_rewrite

X = torch.randn(2, 3, 8, 8)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(F.relu(self.b(F.relu(self.norm(self.a(x))))).mean((2, 3)))


@pytest.fixture
def case():
    deps = analyze(capture(Net(), X))
    plan = Prune(0.5).propose(deps)
    return deps, plan, rewrite(deps, plan)


def test_a_right_result_passes_to_the_last_digits(case):
    assert verify_rewrite(*case, X) < 1e-13


def test_a_changed_number_is_seen_and_named(case):
    deps, plan, small = case
    with torch.no_grad():
        small.b.weight[0, 0, 0, 0] += 1e-3
    with pytest.raises(VerificationError, match=r"b\.weight"):
        verify_rewrite(deps, plan, small, X)


def test_mispaired_channels_are_seen_and_the_layer_is_named(case):
    deps, plan, small = case
    for node in small.graph.nodes:
        if node.name == "b":
            with small.graph.inserting_before(node):
                node.args = (small.graph.call_method("flip", (node.args[0], 1)),)
    small.recompile()
    with pytest.raises(VerificationError, match="first at `b`"):
        verify_rewrite(deps, plan, small, X)


def test_a_zero_head_hides_nothing(case):
    net = Net()
    nn.init.zeros_(net.fc.weight)
    deps = analyze(capture(net, X))
    plan = Prune(0.5).propose(deps)
    small = rewrite(deps, plan)
    small.graph.find_nodes(op="call_module", target="b")[0].append(
        node := small.graph.call_function(torch.neg, ())
    )
    b = small.graph.find_nodes(op="call_module", target="b")[0]
    b.replace_all_uses_with(node)
    node.args = (b,)
    small.recompile()
    assert torch.equal(small.eval()(X), net.eval()(X))
    with pytest.raises(VerificationError):
        verify_rewrite(deps, plan, small, X)


def test_train_mode_is_compared_too(case):
    deps, plan, small = case
    small.norm.momentum, small.norm.track_running_stats = 0.1, True
    small.norm.eps = 0.5
    with pytest.raises(VerificationError):
        verify_rewrite(deps, plan, small, X)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_verifying_leaves_every_number_of_the_original_as_it_was(dtype):
    net, x = Net().to(dtype).train(), X.to(dtype)
    net(x)  # statistics that differ from channel to channel
    before = copy.deepcopy(net.state_dict())
    plan = Prune(0.5, only="b")
    small = fxsvd.compile(net, x, passes=[plan], progress=False)
    assert small.b.out_channels == 3
    after = net.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_public_verify_reads_the_plan_and_refuses_strangers():
    net = Net()
    small = fxsvd.compile(net, X, passes=[Prune(0.5)])
    assert fxsvd.verify(net, small, X) < 1e-12
    with torch.no_grad():
        small.fc.bias += 1
    with pytest.raises(VerificationError):
        fxsvd.verify(net, small, X)
    with pytest.raises(PlanError, match="compile returned"):
        fxsvd.verify(net, nn.Linear(2, 2), X)


def test_mask_is_the_original_class_with_silent_channels():
    net = Net().eval()
    plan = fxsvd.plan(net, X, passes=[Prune(0.5)])
    masked, small = fxsvd.mask(net, plan), fxsvd.apply(net, plan).eval()
    assert type(masked) is Net
    assert {k: v.shape for k, v in masked.state_dict().items()} == {
        k: v.shape for k, v in net.state_dict().items()
    }
    torch.testing.assert_close(masked(X), small(X))
    assert not torch.equal(net(X), small(X))


def test_mask_counts_survivors_in_layer_norms():
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    plan = fxsvd.plan(net, x, passes=[Prune(0.5)])
    torch.testing.assert_close(fxsvd.mask(net, plan)(x), fxsvd.apply(net, plan)(x))
    copy.deepcopy(fxsvd.mask(net, plan))


STATISTICS = {
    "layer_norm": (F.layer_norm, lambda n: ((n,),)),
    "rms_norm": (F.rms_norm, lambda n: ((n,), None, 1e-6)),
    "mean": (torch.mean, lambda n: (-1, True)),
    "var": (torch.var, lambda n: (-1,)),
    "std": (torch.std, lambda n: (-1,)),
    "var_mean": (torch.var_mean, lambda n: (-1,)),
    "std_mean": (torch.std_mean, lambda n: (-1,)),
    "amax": (torch.amax, lambda n: (-1,)),
    "amin": (torch.amin, lambda n: (-1,)),
    "max": (torch.max, lambda n: (-1,)),
    "min": (torch.min, lambda n: (-1,)),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_over_survivors_are_those_of_the_small_tensor(name):
    function, arguments = STATISTICS[name]
    x, keep = torch.randn(3, 5, 8, dtype=torch.float64), torch.tensor([0, 2, 3, 7])
    mask = torch.zeros(8, dtype=torch.bool)
    mask[keep] = True
    small = function(x[..., keep], *arguments(4))
    full = SURVIVING[name](x, mask, *arguments(8))
    if name in ("max", "min"):
        small, full = small.values, full.values
    full = full[..., keep] if name.endswith("norm") else full
    torch.testing.assert_close(full, small)


def test_group_norm_over_survivors():
    x, mask = torch.randn(2, 6, 4, dtype=torch.float64), torch.tensor([1, 0, 1, 0, 1, 1]).bool()
    keep = mask.nonzero().ravel()
    full = SURVIVING["group_norm"](x, mask.reshape(6, 1), 2)
    torch.testing.assert_close(full[:, keep], F.group_norm(x[:, keep], 2))


def test_batch_norm_over_survivors():
    x, mask = torch.randn(2, 3, 8, dtype=torch.float64), torch.arange(8) < 5
    full = SURVIVING["batch_norm"](x, mask, None, None, None, None, True)
    torch.testing.assert_close(full[..., :5], F.batch_norm(x[..., :5], None, None, training=True))
