"""All ranks resize alike, or none does.

What is done (which channels stay, what is replaced) has to be the same everywhere: ranks of other
shapes could not exchange another gradient. The numbers that come with it are those of the first
rank, since machines round differently. So are buffers: every rank's batch norms see its own share
of the data, and ``DistributedDataParallel`` likewise gives those of the first rank to all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fxsvd.data import ranks
from fxsvd.edits import Plan
from fxsvd.errors import FxsvdError


@torch.no_grad()
def share_buffers(network: nn.Module) -> None:
    """Give every rank the first one's running statistics.

    >>> share_buffers(nn.BatchNorm1d(2))
    """
    if ranks.alone():
        return
    buffers = list(network.buffers())
    for buffer, value in zip(buffers, ranks.of_first(buffers), strict=True):
        buffer.copy_(value)


def agreed_on(passes: Sequence[Any]) -> Sequence[Any]:
    """The passes that a policy asks for, once every rank asks for as many of the same kinds.

    Raises:
        FxsvdError: some rank asks for others; on every rank.

    >>> agreed_on(())
    ()
    """
    kinds = ", ".join(type(options).__name__ for options in passes)
    if not ranks.alike(kinds):
        raise FxsvdError(
            f"ranks disagree: this one's policy asks for {kinds or 'nothing'}, another's does not; "
            "a policy may depend on the network and the step, not on the rank, its data or a clock"
        )
    return passes


def agreed_plan(plan: Plan, options: Any) -> Plan:
    """A plan that every rank proposes, with the numbers of the first.

    Args:
        plan: what this rank proposes.
        options: the pass that it is of.

    Raises:
        FxsvdError: some rank proposes to do something else; on every rank.

    >>> plan = Plan()
    >>> agreed_plan(plan, None) is plan
    True
    """
    if ranks.alone():
        return plan
    if not ranks.alike(_done_by(plan)):
        raise FxsvdError(
            f"ranks disagree: this one's {type(options).__name__} proposes\n{plan}\nand another's "
            "does not; give all the same options and seed, and let a pass that looks at data "
            "add up what it sees over the ranks (as fxsvd.calibrate does)"
        )
    shared = iter(ranks.of_first(_numbers(plan)))
    values = tuple(replace(value, value=next(shared)) for value in plan.values)
    substitutes = tuple(
        replace(
            edit,
            parts=tuple(
                replace(part, tensors={name: next(shared) for name in part.tensors})
                for part in edit.parts
            ),
        )
        for edit in plan.substitutes
    )
    return replace(plan, values=values, substitutes=substitutes)


def _numbers(plan: Plan) -> Iterator[Tensor]:
    yield from (value.value for value in plan.values)
    for edit in plan.substitutes:
        for part in edit.parts:
            yield from part.tensors.values()


def _done_by(plan: Plan) -> str:
    """All of a plan but its numbers and its words."""
    shapes = [(tuple(t.shape), t.dtype) for t in _numbers(plan)]
    parts = [
        (edit.layer, [(part.kind, part.options, tuple(part.tensors)) for part in edit.parts])
        for edit in plan.substitutes
    ]
    return repr((plan.edits, [v.parameter for v in plan.values], parts, shapes, plan.exact))
