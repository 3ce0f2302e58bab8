"""The processes of ``torch.distributed``, where it runs: sums, votes and shares of batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def alone() -> bool:
    """Whether there is one process only.

    >>> alone()
    True
    """
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def numbered(batch: int) -> int:
    """The number of this rank's batch among all, where they are dealt out in turns.

    >>> numbered(3)
    3
    """
    return batch if alone() else batch * dist.get_world_size() + dist.get_rank()


def gathered(values: Sequence[float]) -> Tensor:
    """Numbers of every rank, float64 ``[ranks, values]``.

    >>> gathered([1.0, 2.0]).tolist()
    [[1.0, 2.0]]
    """
    own = torch.tensor(values, dtype=torch.float64)
    if alone():
        return own.unsqueeze(0)
    own = own.to(_device())
    out = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(out, own)
    return torch.stack(out).cpu()


def summed(value: Tensor) -> Tensor:
    """The sum over all ranks of a tensor, which is used up.

    >>> summed(torch.ones(2)).tolist()
    [1.0, 1.0]
    """
    if alone():
        return value
    out = value.to(_device()).contiguous()
    dist.all_reduce(out)
    return out.to(value.device)


def agreed(vote: bool) -> bool:
    """Whether every rank votes for it.

    >>> agreed(True), agreed(False)
    (True, False)
    """
    return bool(gathered([float(vote)]).all())


def alike(said: str) -> bool:
    """Whether every rank says the same.

    >>> alike("prune")
    True
    """
    digest = hashlib.sha256(said.encode()).digest()
    table = gathered([float(int.from_bytes(digest[i : i + 6], "big")) for i in (0, 6)])
    return bool((table == table[0]).all())


def of_first(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What the first rank has in place of these tensors, bit by bit.

    Args:
        tensors: equally many of the same shapes and types on every rank; they are not changed.

    >>> of_first([torch.ones(2)])
    [tensor([1., 1.])]
    """
    own = [tensor.detach() for tensor in tensors]
    if alone() or not own:
        return own
    raw = [t.to(_device()).contiguous().reshape(-1).view(torch.uint8) for t in own]  # any type
    both = torch.cat(raw)
    dist.broadcast(both, src=0)
    parts = both.split([len(part) for part in raw])
    return [
        part.clone().view(t.dtype).reshape(t.shape).to(t.device)
        for part, t in zip(parts, own, strict=True)
    ]


def _device() -> torch.device:
    """Where tensors have to be for ranks to exchange them."""
    if "nccl" not in dist.get_backend():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
