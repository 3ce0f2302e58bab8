"""Two processes that resize the network they train together, against one that sees all data."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, fx, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import fxsvd
from fxsvd.edits import Assign, Plan, Remap
from fxsvd.errors import FxsvdError
from fxsvd.passes import Factorize, Prune, Shrink, Slice, Widen

LAST = 8
PASSES = {
    2: (Widen(ratio=0.5, init="split"),),
    4: (Prune(0.25, only="0"),),
    5: (Prune(0.9),),  # costs too much
    6: (Widen(to={"0": 14}),),
    7: (Factorize(rank={"2": 3}),),
}
PATIENCE = timedelta(seconds=3)
LONG = 300  # seconds: far more than anything here takes


def batch(step: int, share: slice) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    return x[share], (x[share].sum(1) > 0).long()


class Wrapped:
    """A network under a wrapper that has to be made anew after a resize."""

    def __init__(self, network: fx.GraphModule, wrap: Callable[[nn.Module], nn.Module]) -> None:
        self.network, self.wrap = network, wrap
        self.model = wrap(network)

    @contextmanager
    def whole(self) -> Iterator[None]:
        yield
        self.model = self.wrap(self.network)


def alone(evolver: fxsvd.Evolver) -> Wrapped:
    return Wrapped(evolver.model, lambda network: network)


def replicated(evolver: fxsvd.Evolver) -> Wrapped:
    return Wrapped(evolver.model, DistributedDataParallel)


def sharded(evolver: fxsvd.Evolver) -> fxsvd.Sharded:
    def shard(network: fx.GraphModule) -> None:
        fully_shard(network.get_submodule("0"))
        fully_shard(network)

    return fxsvd.Sharded(evolver.model, evolver.optimizer, shard)


def trained(share: slice, spread: Callable[[fxsvd.Evolver], Any]) -> dict[str, Any]:
    """Steps on a share of every batch; the gradients of all shares are averaged by the wrapper."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 2)
    ).double()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)

    def loss(network: nn.Module) -> Tensor:
        x, y = batch(100, share)
        narrow: Any = network.get_submodule("0")
        return F.cross_entropy(network(x), y) + 5 / int(narrow.out_features)

    evolver = fxsvd.Evolver(
        net,
        batch(0, share)[0],
        optimizer,
        policy=fxsvd.Schedule(PASSES),
        loss=loss,
        max_loss_increase=0.5,
    )
    held = spread(evolver)
    for step in range(1, LAST + 1):
        x, y = batch(step, share)
        optimizer.zero_grad()
        F.cross_entropy(held.model(x), y).backward()
        optimizer.step()
        with torch.no_grad():
            held.model(x)  # FSDP leaves parameters whole behind this
        with held.whole():
            evolver.step(step)
    with held.whole():
        return evolver.state_dict()


@dataclass(frozen=True)
class Own:
    """A pass that decides by what only this rank knows."""

    keep: tuple[int, ...]
    value: float

    def propose(self, deps: fxsvd.Dependencies, data: Any = None, say: Any = None) -> Plan:
        del data, say
        bias = deps.analysis.by_name("0.bias").value
        new = Assign("0.bias", torch.full_like(bias, self.value), "a rank's own")
        return Plan((Remap("0", 8, self.keep),), values=(new,))


def evolver_of(net: nn.Module, share: slice, **options: Any) -> fxsvd.Evolver:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    return fxsvd.Evolver(net, batch(0, share)[0], optimizer, **options)


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).double()


def said(act: Callable[[], Any]) -> str:
    try:
        act()
    except FxsvdError as error:
        return str(error)
    return ""


def normed(share: slice) -> dict[str, Any]:
    """Running statistics are of one's own share, and Shrink reads them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).double()
    evolver = evolver_of(net, share)
    for step in range(3):
        evolver.model(batch(step, share)[0] * torch.tensor([1, 9, 1, 1]) ** (share.start or 0))
    event = evolver.resize(Shrink(ratio=0.5, only="0"))
    return {"plan": event.plan.to_json(), "model": evolver.model.state_dict()}


def tokens(share: slice) -> dict[str, Any]:
    """Slice sees one's own share."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2)]
    evolver = evolver_of(nn.Sequential(*layers).double(), share)
    evolver.resize(Slice(ratio=0.5), data=[batch(1, share)[0]])
    return evolver.model.state_dict()


def taylor(share: slice, batches: int = 2) -> dict[str, Any]:
    """Each share by itself has other channels that matter."""

    def loss(y: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(y, target, reduction="sum")

    data = [batch(step, share) for step in range(batches)]
    evolver = evolver_of(plain(), share)
    event = evolver.resize(Prune(0.5, criterion="taylor", loss=loss, data=data))
    return {"plan": event.plan.to_json(), "model": evolver.model.state_dict()}


def bare(share: slice) -> str:
    """An evolver of a network that somebody else sharded, and what it says."""
    net = plain()
    fully_shard(net)
    return said(lambda: evolver_of(net, share))


def late(share: slice) -> str:
    evolver = evolver_of(plain(), share)
    fully_shard(evolver.model)
    return said(lambda: evolver.resize(Prune(0.5)))


def disagreeing(rank: int, share: slice) -> dict[str, Any]:
    """Each case: what the evolver said, how wide the network is, and its numbers."""
    cases = {
        "plan": (Own((0, 1, 2) if rank else (0, 1, 3), 0.0),),
        "policy": (Prune(0.5),) * (rank + 1),
        "seed": (Prune(0.5, criterion="random", seed=rank),),
        "numbers": (Own((0, 1, 2), float(rank)),),
    }
    out = {}
    for name, passes in cases.items():
        evolver = evolver_of(plain(), share, policy=fxsvd.Schedule({1: passes}))
        out[name] = said(lambda e=evolver: e.step(1)), evolver.model.state_dict()
    return out


def join(rank: int, store: str, timeout: timedelta = timedelta(seconds=LONG)) -> slice:
    torch.set_num_threads(1)
    where = f"file://{store}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2, timeout=timeout)
    return slice(rank, None, 2)


def work(rank: int, store: str, out: str) -> None:
    share = join(rank, store)
    results = {
        "replicated": trained(share, replicated),
        "sharded": trained(share, sharded),
        "disagreeing": disagreeing(rank, share),
        "normed": normed(share),
        "tokens": tokens(share),
        "taylor": taylor(share),
        "taylor of one rank": taylor(share, batches=2 * rank),
        "taylor of none": said(lambda: taylor(share, batches=0)),
        "bare": bare(share),
        "late": late(share),
    }
    torch.save(results, f"{out}{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes got."""
    folder = tmp_path_factory.mktemp("ranks")
    context = mp.spawn(work, (str(folder / "store"), str(folder / "out")), nprocs=2, join=False)
    start = time.monotonic()
    while not context.join(timeout=5):
        if time.monotonic() - start > LONG:
            for process in context.processes:
                process.kill()
            pytest.fail("two processes did not agree in five minutes")
    return [torch.load(folder / f"out{rank}.pt", weights_only=True) for rank in range(2)]


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def outline(text: str) -> tuple[Any, str]:
    """What a plan does, without its numbers."""
    plan = Plan.from_json(text)
    return plan.edits, str(plan)


@pytest.mark.parametrize("way", ["replicated", "sharded"])
def test_two_processes_resize_and_train_as_one(ranks: list[Any], way: str) -> None:
    one = trained(slice(None), alone)
    for rank in range(2):
        state = ranks[rank][way]
        for ours, theirs in zip(state["events"], one["events"], strict=True):
            for key in ("step", "parameters", "undone"):
                assert ours[key] == theirs[key]
            assert outline(ours["plan"]) == outline(theirs["plan"])
        assert [e["undone"] for e in state["events"]] == [False, False, True, False, False]
        for name, value in one["model"].items():
            assert torch.allclose(state["model"][name], value, rtol=1e-9, atol=1e-11), name
        for number, known in one["optimizer"]["state"].items():
            for key, value in known.items():
                ours = state["optimizer"]["state"][number][key]
                assert torch.allclose(ours, value, rtol=1e-9, atol=1e-11), (number, key)


@pytest.mark.parametrize("what", ["normed", "taylor", "taylor of one rank"])
def test_ranks_of_different_data_resize_alike(ranks: list[Any], what: str) -> None:
    zero, one = (rank[what] for rank in ranks)
    assert zero["plan"] == one["plan"]
    assert same(zero["model"], one["model"])


def test_taylor_scores_are_those_of_all_data(ranks: list[Any]) -> None:
    shares = [taylor(slice(rank, None, 2))["plan"] for rank in range(2)]
    whole = taylor(slice(None))["plan"]
    assert shares[0] != whole == ranks[0]["taylor"]["plan"]
    assert ranks[0]["taylor of one rank"]["plan"] == shares[1]
    assert all("got no batch" in rank["taylor of none"] for rank in ranks)


def test_statistics_that_differ_are_those_of_the_first_rank(ranks: list[Any]) -> None:
    own = [normed(slice(rank, None, 2)) for rank in range(2)]
    assert own[0]["plan"] != own[1]["plan"]
    assert ranks[1]["normed"]["plan"] == own[0]["plan"]


def test_numbers_of_a_pass_that_does_not_reduce_are_those_of_the_first_rank(
    ranks: list[Any],
) -> None:
    assert same(ranks[0]["tokens"], ranks[1]["tokens"])
    for rank in ranks:
        message, model = rank["disagreeing"]["numbers"]
        assert message == ""
        assert torch.equal(model["0.bias"], torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("case", "words"),
    [("plan", "Own proposes\n0: 8 -> 3"), ("policy", "asks for Prune"), ("seed", "same options")],
)
def test_ranks_that_disagree_all_say_so_and_change_nothing(
    ranks: list[Any], case: str, words: str
) -> None:
    untouched = plain().state_dict()
    for rank in ranks:
        message, model = rank["disagreeing"][case]
        assert message.startswith("ranks disagree: ")
        assert words in message
        assert same(model, untouched)


@pytest.mark.parametrize("when", ["bare", "late"])
def test_sharded_networks_are_refused_with_the_way_out(ranks: list[Any], when: str) -> None:
    for rank in ranks:
        assert "is sharded: give Evolver the network as it was before" in rank[when]
        assert "fxsvd.Sharded(evolver.model, optimizer, fully_shard)" in rank[when]


def losing(rank: int, store: str, out: str) -> None:
    """The second process is killed in the middle of a resize."""
    share, calls = join(rank, store, PATIENCE), 0

    def loss(network: nn.Module) -> Tensor:
        nonlocal calls
        calls += 1
        if rank == 1 and calls == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return network(batch(0, share)[0]).square().mean()

    passes = fxsvd.Schedule(dict.fromkeys(range(1, 6), (Prune(0.2),)))
    evolver = evolver_of(plain(), share, policy=passes, loss=loss, max_loss_increase=1e9)
    for step in range(1, 6):
        Path(f"{out}{rank}").write_text(f"began {step}")
        evolver.step(step)


def test_when_one_process_is_killed_the_other_ends_with_an_error(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    given = str(tmp_path / "store"), str(tmp_path / "out")
    first, second = (context.Process(target=losing, args=(rank, *given)) for rank in range(2))
    first.start()
    second.start()
    first.join(LONG)
    for process in (first, second):
        process.kill()
        process.join()
    assert (first.exitcode, second.exitcode) == (1, -signal.SIGKILL)
    assert (tmp_path / "out0").read_text() == "began 2"
