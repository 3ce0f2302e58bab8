"""Train on several processes a network that shrinks while it trains; stop at any time and go on.

    torchrun --nproc-per-node 2 examples/evolve_torchrun.py --checkpoint evolved.pt

Trains on scikit-learn's handwritten digits in half a minute, on CPUs (gloo) or with a GPU for each
process (nccl). Needs: pip install 'fxsvd[demo]'
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import fxsvd
from fxsvd import demo
from fxsvd.passes import Select

HELD_OUT, BATCH = 200, 32


def network() -> nn.Module:
    torch.manual_seed(0)  # the same on every rank
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )


def policy(graph: nn.Module, epoch: int) -> list[Select]:
    """A quarter of all channels goes after every second epoch, as long as that costs little."""
    return [Select(ratio=0.25)] if epoch % 2 == 0 else []


def train(model: nn.Module, optimizer: torch.optim.Optimizer, share: list, epoch: int) -> None:
    """One epoch over this rank's share, in an order that depends on the epoch alone."""
    images, labels = share
    model.train()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
    for index in order.split(BATCH):
        optimizer.zero_grad()
        F.cross_entropy(model(images[index]), labels[index]).backward()
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="saved after every epoch, resumed from")
    parser.add_argument("--epochs", type=int, default=12)
    options = parser.parse_args()

    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)

    # Every rank trains on a share, and judges a resize on a share of what is held out.
    digits = demo.digits()
    data = [part.to(device) for part in (digits.images, digits.labels)]
    count = (len(data[0]) - HELD_OUT) // ranks * ranks  # equally many everywhere
    share = [part[rank:count:ranks] for part in data]
    images, labels = (part[-HELD_OUT:][rank::ranks] for part in data)

    net = network().to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    evolver = fxsvd.Evolver(
        net,
        images[:4],
        optimizer,
        policy=policy,
        data=list(share[0].split(100)),  # what Select sees is added up over the ranks
        loss=lambda graph: F.cross_entropy(graph(images), labels),
        max_loss_increase=0.5,  # a resize that costs more is undone
    )

    done = 0
    if options.checkpoint is not None and options.checkpoint.exists():
        saved = torch.load(options.checkpoint, map_location=device, weights_only=True)
        evolver.load_state_dict(saved["evolver"])
        done = saved["epoch"]
        if rank == 0:
            print(f"resumed after epoch {done}")

    for epoch in range(done + 1, options.epochs + 1):
        model = DistributedDataParallel(evolver.model)  # anew: the parameters may be others
        train(model, optimizer, share, epoch)
        evolver.step(epoch)
        if rank == 0 and options.checkpoint is not None:
            new = options.checkpoint.with_suffix(".new")
            torch.save({"epoch": epoch, "evolver": evolver.state_dict()}, new)
            new.replace(options.checkpoint)  # at no time is there half a checkpoint

    if rank == 0:
        print(evolver.history.table())
        right = demo.accuracy(evolver.model.cpu(), digits)
        parameters = sum(p.numel() for p in evolver.model.parameters())
        print(f"{right:.1%} right after {options.epochs} epochs, {parameters} parameters")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
