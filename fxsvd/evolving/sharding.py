"""A network that is sharded over processes (FSDP2) from one resize to the next, and whole for it.

A shard is a slice of some rows of a parameter; which rows it holds changes with every width. So
parameters and what the optimizer remembers of them are gathered, resized on every rank alike, and
sharded anew.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn
from torch.optim import Optimizer

from fxsvd.errors import FxsvdError

Shard = Callable[[fx.GraphModule], Any]


def require_whole(network: nn.Module) -> None:
    """Raise where parameters are sharded.

    Raises:
        FxsvdError: a parameter is a ``DTensor``; the message says what to do.

    >>> require_whole(nn.Linear(2, 3))
    """
    for name, parameter in network.named_parameters():
        if _is_sharded(parameter):
            raise FxsvdError(
                f"{name} is sharded: give Evolver the network as it was before `fully_shard`, and "
                "shard it by sharded = fxsvd.Sharded(evolver.model, optimizer, fully_shard); then "
                "train sharded.model, and resize inside `with sharded.whole():`"
            )


class Sharded:
    """Shards an evolver's network, and puts it together again for a resize.

    ::

        evolver = fxsvd.Evolver(net, images, optimizer, policy=policy)  # net is not sharded
        sharded = fxsvd.Sharded(evolver.model, optimizer, fully_shard)
        for epoch in range(1, 91):
            train(sharded.model, optimizer)
            with sharded.whole():
                evolver.step(epoch)

    In a resize every rank holds all parameters and optimizer states, and those of the resized
    network beside them; between two resizes only its shards. Gradients outlive neither.

    Args:
        network: a captured graph, such as ``evolver.model``. While it is sharded its parameters are
            on the meta device.
        optimizer: of its parameters; it trains the shards.
        shard: shards a graph in place: ``torch.distributed.fsdp.fully_shard``, or a function that
            first applies it to layers. A captured graph calls only layers of ``torch.nn`` and those
            it keeps whole: shard those, or lists of them, and at last the graph itself.

    Attributes:
        model: the graph to train; another one after each ``whole``.

    Raises:
        FxsvdError: the network is sharded already.

    >>> net = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 3)))
    >>> from torch.optim import SGD
    >>> optimizer = SGD(net.parameters(), lr=0.1)
    >>> sharded = Sharded(net, optimizer, lambda graph: None)  # fully_shard, on several ranks
    >>> with sharded.whole():
    ...     print(net.get_parameter("0.weight").shape)  # here evolver.step(epoch)
    torch.Size([3, 2])
    """

    def __init__(self, network: fx.GraphModule, optimizer: Optimizer, shard: Shard) -> None:
        require_whole(network)
        self.network, self.optimizer, self.shard = network, optimizer, shard
        self.model = self._sharded()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, the network and the optimizer are as if nothing was sharded.

        All ranks have to enter together. Resize here, save here, load here.
        """
        modules: Iterator[Any] = self.model.modules()
        for module in modules:
            if hasattr(module, "reshard"):  # after a forward pass alone they are whole
                module.reshard()
        parts = dict(self.model.named_parameters(remove_duplicate=False))
        full = {
            id(p): nn.Parameter(_whole(p.detach()), requires_grad=p.requires_grad)
            for p in parts.values()
        }
        _install(self.network, {name: full[id(p)] for name, p in parts.items()})
        _hand_over(self.optimizer, full, lambda value, _: _whole(value))
        self.network.train(self.model.training)
        try:
            yield
        finally:
            self.model = self._sharded()

    def _sharded(self) -> fx.GraphModule:
        """A copy of the network that took over its parameters and shares its buffers."""
        shared = (*self.network.parameters(), *self.network.buffers())
        twin: fx.GraphModule = copy.deepcopy(self.network, {id(t): t for t in shared})
        own = dict(self.network.named_parameters(remove_duplicate=False))
        self.shard(twin)
        parts = dict(twin.named_parameters(remove_duplicate=False))
        _hand_over(self.optimizer, {id(p): parts[name] for name, p in own.items()}, _laid_out)
        empty = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in own.values()}
        _install(self.network, {name: empty[id(p)] for name, p in own.items()})
        return twin


def _is_sharded(value: Tensor) -> bool:
    return hasattr(value, "full_tensor")  # DTensor, which not every build of torch has


def _whole(value: Any) -> Tensor:
    whole: Tensor = value.full_tensor() if _is_sharded(value) else value
    return whole


def _laid_out(value: Tensor, like: Any) -> Tensor:
    """A tensor that all ranks have, sharded as a parameter is."""
    if not _is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements
    return distribute_tensor(value, mesh, placements, src_data_rank=None)  # nothing is sent


def _install(network: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        owner, _, last = name.rpartition(".")
        setattr(network.get_submodule(owner), last, parameter)


def _hand_over(
    optimizer: Optimizer,
    successors: Mapping[int, nn.Parameter],
    changed: Callable[[Tensor, nn.Parameter], Tensor],
) -> None:
    """Let an optimizer go on with other parameters, and what it remembers of these."""
    for group in optimizer.param_groups:
        for i, old in enumerate(group["params"]):
            new = group["params"][i] = successors[id(old)]
            state = optimizer.state.pop(old, None)
            if state:
                optimizer.state[new] = {
                    key: changed(value, new)
                    if isinstance(value, Tensor) and value.shape == old.shape
                    else value
                    for key, value in state.items()
                }
