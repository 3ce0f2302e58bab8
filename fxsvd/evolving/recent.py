"""The inputs that a network was trained on last: statistics that run along with training.

Moments that are added up step by step would be of weights that have changed since. So the inputs
are kept, and a pass that calibrates sees what today's weights make of them.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from fxsvd.capture.inputs import map_tensors
from fxsvd.data.batches import samples
from fxsvd.errors import PlanError

Inputs = Mapping[str, Any]


class Recent:
    """Batches that a graph saw last in train mode, for ``fxsvd.calibrate`` and passes.

    Args:
        graph: a captured graph; it is watched from now on, copies of it are not.
        count: how many samples to keep: whole batches, as few as hold that many.

    Raises:
        PlanError: the count is below 1.

    >>> import torch
    >>> from fxsvd.capture import capture
    >>> graph = capture(nn.Linear(2, 3), torch.zeros(2, 2)).train()
    >>> recent = Recent(graph, 10)
    >>> for number in range(9):
    ...     _ = graph(torch.full((4, 2), float(number)))
    >>> [float(batch["input"][0, 0]) for batch in recent]
    [6.0, 7.0, 8.0]
    """

    def __init__(self, graph: fx.GraphModule, count: int) -> None:
        if count < 1:
            raise PlanError(f"keep one sample or more; got {count}")
        self.count = count
        self._graph = weakref.ref(graph)
        self._kept: deque[Inputs] = deque()
        graph.register_forward_pre_hook(self, with_kwargs=True)

    def __iter__(self) -> Iterator[Inputs]:
        """The batches, oldest first, each a dictionary of the graph's inputs."""
        return iter(tuple(self._kept))

    def restore(self, kept: Iterable[Inputs]) -> None:
        """Go on with these batches."""
        self._kept = deque(kept)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at the inputs of a forward pass."""
        graph = self._graph()
        if graph is None or module is not graph or not graph.training:
            return
        names = [str(node.target) for node in graph.graph.nodes if node.op == "placeholder"]
        given = dict(zip(names, args, strict=False)) | kwargs
        if any(isinstance(t, FakeTensor) for t in pytree.tree_leaves(given)):
            return
        self._kept.append(map_tensors(lambda t: t.detach().clone(), given))
        held = [samples(((), dict(batch))) for batch in self._kept]
        while sum(held) - held[0] >= self.count:
            self._kept.popleft()
            held.pop(0)

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        """Copies of the graph have a hook that does nothing."""
        return (_of_copies, ())


def _of_copies() -> Callable[..., None]:
    return _unwatched


def _unwatched(*_: Any) -> None:
    return None
