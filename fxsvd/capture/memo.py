"""Remembers what operations on fake tensors return, by the metadata of their arguments.

Running an operation on fake tensors costs up to a few milliseconds, because shapes are computed
symbolically; but networks repeat themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

from fxsvd.capture.batch import SYMBOLIC

_PLAIN = frozenset(
    {int, float, bool, str, type(None), type(...)}
    | {torch.dtype, torch.device, torch.layout, torch.memory_format}
)


class _NotMemoizable(Exception):  # noqa: N818 (a signal inside this file, not an error)
    """An argument whose metadata does not determine what an operation returns."""


class Memo:
    """What operations returned for arguments of the same metadata.

    Args:
        mode: The fake tensor mode that new fakes belong to.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._fingerprints: dict[int, tuple[Tensor, Hashable]] = {}
        self._results: dict[Hashable, Any] = {}

    def forget_arguments(self) -> None:
        """To be called when an operation may change the shapes of its arguments."""
        self._fingerprints.clear()

    def call(
        self,
        run: Callable[..., Any],
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Returns what a function returned for arguments like these, or runs it.

        Args:
            run: Called with the other arguments, runs the function.
            func: A torch function.
            args: Its arguments, with fakes in the place of tensors.
            kwargs: Its keyword arguments, likewise.
        """
        inputs: list[Tensor] = []
        try:
            dtype = torch.get_default_dtype()
            key = (func, dtype, self._key(args, inputs), self._key(kwargs, inputs))
        except _NotMemoizable:
            return run(func, args, kwargs)
        if key not in self._results:
            result = run(func, args, kwargs)
            with suppress(_NotMemoizable):
                self._results[key] = self._freeze(result, inputs)
            return result
        return self._thaw(self._results[key], inputs)

    def _key(self, value: Any, inputs: list[Tensor]) -> Hashable:
        kind = type(value)
        if kind in _PLAIN:
            return kind, value
        if isinstance(value, Tensor):
            inputs.append(value)
            return self._fingerprint(value)
        if isinstance(value, (tuple, list)):
            return kind, tuple(self._key(item, inputs) for item in value)
        if kind is slice:
            return kind, self._key((value.start, value.stop, value.step), inputs)
        if kind is dict:
            return tuple((name, self._key(item, inputs)) for name, item in value.items())
        if isinstance(value, SYMBOLIC):
            return kind, value.node.expr
        raise _NotMemoizable

    def _fingerprint(self, tensor: Tensor) -> Hashable:
        known = self._fingerprints.get(id(tensor))
        if known is not None:
            return known[1]
        if not is_simple(tensor):
            raise _NotMemoizable
        sizes = tuple(_expression(size) for size in tensor.shape)
        strides = tuple(_expression(stride) for stride in tensor.stride())
        fingerprint = (sizes, strides, tensor.dtype, tensor.device)
        self._fingerprints[id(tensor)] = (tensor, fingerprint)
        return fingerprint

    def _freeze(self, result: Any, inputs: list[Tensor]) -> Any:
        """Describes a result such that it can be made again: which are inputs, which are new.

        A call without tensors in its result may be made for its effect, like setting the grad mode.
        """
        if isinstance(result, Tensor):
            for position, tensor in enumerate(inputs):
                if tensor is result:
                    return position
            if not is_simple(result):
                raise _NotMemoizable
            return alias(self._mode, result)
        if isinstance(result, (tuple, list)):
            return type(result), [self._freeze(item, inputs) for item in result]
        raise _NotMemoizable

    def _thaw(self, frozen: Any, inputs: list[Tensor]) -> Any:
        if isinstance(frozen, Tensor):
            return alias(self._mode, frozen)
        if isinstance(frozen, int):
            return inputs[frozen]
        kind, items = frozen
        thawed = [self._thaw(item, inputs) for item in items]
        return kind(*thawed) if hasattr(kind, "_fields") else kind(thawed)


def is_simple(tensor: Tensor) -> bool:
    """Whether size, stride, dtype and device say all that operations on the fake depend on."""
    return (
        type(tensor) is FakeTensor
        and tensor.constant is None
        and tensor.layout is torch.strided
        and not tensor.dtype.is_complex
    )


def alias(mode: FakeTensorMode, fake: Tensor) -> Tensor:
    """Makes another fake with the same metadata."""
    # Ten times cheaper than torch.empty_strided, as no symbolic size is computed anew.
    with in_kernel_invocation_manager(mode):
        return FakeTensor(mode, fake, fake.fake_device)  # type: ignore[attr-defined]


def _expression(size: Any) -> Any:
    return size if type(size) is int else size.node.expr
