"""How much a channel matters: one number per channel, summed over all coupled tensors.

Every parameter axis knows its atoms (``fxsvd.analysis``), so a criterion only has to say what one
entry of a parameter contributes; entries are summed per channel over all tensors of its space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from fxsvd.analysis import Parameter
from fxsvd.dependency import Dependencies
from fxsvd.errors import PlanError

Scores = npt.NDArray[np.float64]
Entry = Callable[[Parameter], tuple[Tensor, ...]]


def magnitude(deps: Dependencies, power: int) -> Scores:
    """L1 (``power`` 1) or L2 norm over all entries of a channel's coupled tensors.

    Raises:
        PlanError: a weight is not a finite number.
    """

    def entry(known: Parameter) -> tuple[Tensor, ...]:
        if not _learned(known):
            return ()
        value = known.value.detach()
        return (value.abs(),) if power == 1 else (value, value)

    total = _summed(deps, entry)
    return total if power == 1 else np.sqrt(total)


def norm_scale(deps: Dependencies) -> Scores:
    """Scales of the norms in the space, absolute; a space without a norm counts by its L2 norm."""
    layers = {name for name, _ in _norms(deps.analysis.graph)}

    def entry(known: Parameter) -> tuple[Tensor, ...]:
        return (known.value.detach().abs(),) if known.names[0] in layers else ()

    scale, size = _summed(deps, entry), magnitude(deps, 2)
    normed = {int(s) for s in np.unique(deps.space_of[scale > 0])}
    use = np.isin(deps.space_of, list(normed))
    return np.where(use, scale, size)


def _norms(graph: fx.GraphModule) -> Iterable[tuple[str, Tensor]]:
    for path, module in graph.named_modules():
        if "Norm" in type(module).__name__ and isinstance(getattr(module, "weight", None), Tensor):
            yield f"{path}.weight", module.weight


def taylor(deps: Dependencies, gradients: Mapping[int, Tensor]) -> Scores:
    """First-order Taylor: |Σ w ∂L/∂w| per channel.

    P. Molchanov et al., *Importance Estimation for Neural Network Pruning*, 2019, eq. 8.

    Args:
        deps: what ``fxsvd.analyze`` found.
        gradients: of a loss over data, by the ``id`` of a parameter.
    """

    def entry(known: Parameter) -> tuple[Tensor, ...]:
        gradient = gradients.get(id(known.value))
        return () if gradient is None else (known.value.detach(), gradient)

    out: Scores = np.abs(_summed(deps, entry))
    return out


def random(deps: Dependencies, seed: int) -> Scores:
    """Uniform numbers from a seed."""
    return np.random.default_rng(seed).random(deps.channels.count)


def _learned(known: Parameter) -> bool:
    return isinstance(known.value, torch.nn.Parameter)


def require_numbers(deps: Dependencies) -> None:
    """Raise where there is nothing to measure.

    Raises:
        PlanError: a parameter is on the meta device.
    """
    for known in deps.analysis.parameters.values():
        if known.value.is_meta:
            raise PlanError(
                f"{known.names[0]} is on the meta device and has no numbers: load its weights, or "
                "use criterion='random', which needs none"
            )


def _summed(deps: Dependencies, entry: Entry) -> Scores:
    """Sum an entry-wise contribution, the product of its factors, over every channel's tensors."""
    out = np.zeros(deps.channels.count)
    for known in deps.analysis.parameters.values():
        factors = entry(known) if known.type.blocks else ()
        if factors:
            _add(out, deps, known, [_array(factor) for factor in factors])
    return out


def _array(value: Tensor) -> npt.NDArray[Any]:
    single = value if value.dtype in (torch.float32, torch.float64) else value.float()
    return single.cpu().numpy()


def _add(
    out: Scores, deps: Dependencies, known: Parameter, factors: list[npt.NDArray[Any]]
) -> None:
    """Sum over all dimensions but a block's, without an intermediate as large as the parameter."""
    every = range(factors[0].ndim)
    operands = [part for factor in factors for part in (factor, every)]
    channels = [(block.dims, deps.channels.of[block.atoms]) for block in known.type.blocks]
    in_spaces = [(dims, of) for dims, of in channels if (deps.space_of[of] >= 0).any()]
    for dims, of in in_spaces or channels[:1]:  # one at least, so that every number is looked at
        numbers = np.einsum(*operands, dims).astype(np.float64)
        if not np.isfinite(numbers).all():
            raise PlanError(f"{known.names[0]} holds numbers that are not finite")
        np.add.at(out, of, numbers)
