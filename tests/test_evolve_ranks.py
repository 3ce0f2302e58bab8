"""Two processes that resize the network they train together, against one that sees all data."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import fxsvd
from fxsvd.passes import Prune, Widen

LAST = 8
PASSES = {
    2: (Widen(ratio=0.5, init="split"),),
    4: (Prune(0.25, only="0"),),
    5: (Prune(0.9),),  # costs too much
    6: (Widen(to={"0": 14}),),
}


def batch(step: int, share: slice) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    return x[share], (x[share].sum(1) > 0).long()


def trained(share: slice, wrap: Any) -> fxsvd.Evolver:
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
    model = wrap(evolver.model)
    for step in range(1, LAST + 1):
        x, y = batch(step, share)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if evolver.step(step):
            model = wrap(evolver.model)
    return evolver


def work(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    evolver = trained(slice(rank, None, 2), DistributedDataParallel)
    torch.save(evolver.state_dict(), f"{out}{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_resize_and_train_as_one(tmp_path: Path) -> None:
    context = mp.spawn(work, (str(tmp_path / "store"), str(tmp_path / "out")), nprocs=2, join=False)
    start = time.monotonic()
    while not context.join(timeout=5):
        if time.monotonic() - start > 300:
            for process in context.processes:
                process.kill()
            pytest.fail("two processes did not agree in five minutes")
    one = trained(slice(None), lambda model: model).state_dict()
    for rank in range(2):
        state = torch.load(tmp_path / f"out{rank}.pt", weights_only=True)
        for ours, theirs in zip(state["events"], one["events"], strict=True):
            for key in ("step", "plan", "parameters", "undone"):
                assert ours[key] == theirs[key]
        assert [e["undone"] for e in state["events"]] == [False, False, True, False]
        for name, value in one["model"].items():
            assert torch.allclose(state["model"][name], value, rtol=1e-9, atol=1e-11), name
