"""The ground capture runs on: fake tensors (shapes without data) whose batch size is a symbol.

Running an operation on fake tensors costs up to a few milliseconds, because shapes are computed
symbolically. Networks repeat themselves, so `Fakes.call` remembers each operation by the metadata
of its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from fxsvd.errors import CaptureError

BATCH_HINT = 13
"""The size that stands for the batch wherever one integer is needed: a prime rare in networks."""

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_PLAIN = frozenset(
    {int, float, bool, str, type(None), type(...)}
    | {torch.dtype, torch.device, torch.layout, torch.memory_format}
)
_PROBES = (2, 3, 4, 5, 7, 8, 16, 31, 64)
"""Batch sizes at which the conditions that a model asked for must hold."""


class _NotMemoizable(Exception):  # noqa: N818 (a signal inside this file, not an error)
    """An argument whose metadata does not determine what an operation returns."""


def concrete(value: int | torch.SymInt) -> int:
    """Turns a size into an integer, the symbolic batch counting as `BATCH_HINT`.

    Args:
        value: A size or any integer computed from sizes, as found in `node.meta["val"]`.

    Example:
        >>> concrete(7)
        7
    """
    if isinstance(value, int):
        return value
    node: Any = value.node
    return int(node.hint)


class Fakes:
    """Fake tensors that share one symbolic batch size, and a memory of what operations return.

    Args:
        device: Where parameters on the meta device pretend to be.

    Attributes:
        mode: The fake tensor mode; operations must run inside `running()`.
        device: Where parameters on the meta device pretend to be.
        batch: The batch size, a SymInt whose hint is `BATCH_HINT`.
        symbol: The same as a sympy symbol.
        restrictions: Conditions on the batch size that the model's own code has asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self._env = ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
        self.mode = FakeTensorMode(shape_env=self._env, allow_non_fake_inputs=True)
        self.mode.cache_enabled = False  # `call` remembers more, for less
        context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        pattern = torch.empty(BATCH_HINT, device="meta")
        source = ConstantSource("batch")
        with self.mode:
            fake: Any = self.mode.from_tensor(pattern, symbolic_context=context, source=source)
        self.batch = fake.shape[0]
        self.symbol = self.batch.node._expr
        self.restrictions: list[Any] = []
        self.device = device
        self._guards_seen = 0
        self._fake_of: dict[int, Tensor] = {}
        self._real_of: dict[int, Tensor] = {}
        self._fingerprints: dict[int, tuple[Tensor, Hashable]] = {}
        self._memo: dict[Hashable, Any] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Makes every operation inside work on fakes, with batch sizes kept symbolic."""
        # Without the Python dispatcher some kernels (pad, lstm) fix the batch size silently.
        # Gradients are on, so that a no_grad() of the model's own shows; no fake requires one.
        with torch.enable_grad(), enable_python_dispatcher(), self.mode:
            yield
        self._note_restrictions()

    def input(self, example: Tensor, *, batched: bool) -> Tensor:
        """Makes the fake that stands for an input; the first size of a batched one is symbolic."""
        shape = (self.batch, *example.shape[1:]) if batched else tuple(example.shape)
        with self.mode:
            fake = torch.empty(shape, dtype=example.dtype, device=self._place(example))
            if _is_channels_last(example):
                fake = fake.to(memory_format=torch.channels_last)
        return fake

    def of(self, real: Tensor) -> Tensor:
        """Returns the one fake that stands for a parameter, buffer or constant."""
        fake = self._fake_of.get(id(real))
        if fake is None:
            with self.mode:
                if type(real) in (Tensor, torch.nn.Parameter) and real.layout is torch.strided:
                    place = self._place(real)
                    fake = torch.empty_strided(
                        real.shape, real.stride(), dtype=real.dtype, device=place
                    )
                else:
                    fake = self.mode.from_tensor(real)
            self._fake_of[id(real)] = fake
            self._real_of[id(fake)] = real
        return fake

    def real(self, fake: Tensor) -> Tensor | None:
        """Returns the tensor outside the trace that a fake stands for, None if it was computed."""
        return self._real_of.get(id(fake))

    def call(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        mutates: bool,
    ) -> Any:
        """Runs one operation on fakes, or returns what it returned for arguments like these.

        Args:
            func: A torch function.
            args: Its arguments, with fakes in the place of tensors.
            kwargs: Its keyword arguments, likewise.
            mutates: Whether it may write to its arguments; such calls always run.
        """
        if mutates or "out" in kwargs:
            self._fingerprints.clear()  # the call may change shapes
            return self._run(func, args, kwargs)
        inputs: list[Tensor] = []
        try:
            dtype = torch.get_default_dtype()
            key = (func, dtype, self._key(args, inputs), self._key(kwargs, inputs))
        except _NotMemoizable:
            return self._run(func, args, kwargs)
        if key not in self._memo:
            result = self._run(func, args, kwargs)
            with suppress(_NotMemoizable):
                self._memo[key] = self._freeze(result, inputs)
            return result
        return self._thaw(self._memo[key], inputs)

    def ensure_dynamic(self) -> None:
        """Raises if the model fixed its batch size, or branched on it.

        Raises:
            CaptureError: With the condition that was met.
        """
        if self.symbol in self._env.replacements:
            raise CaptureError(
                "the model works for one batch size only: the batch size was turned into a fixed "
                "integer, or had to equal one. Derive sizes from x.shape inside forward, without "
                "int(x.shape[0]) and len(x), and do not fix the batch size in buffers."
            )
        for guard in self.restrictions:
            if not all(bool(guard.expr.subs(self.symbol, size)) for size in _PROBES):
                condition = str(guard.expr).replace(str(self.symbol), "batch")
                raise CaptureError(
                    f"the model branches on its batch size ({condition}) at {guard.sloc}. Only one "
                    "branch can be captured: make the forward independent of the batch size."
                )

    def _place(self, tensor: Tensor) -> torch.device:
        return self.device if tensor.device.type == "meta" else tensor.device

    def _run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Conditions met inside torch's kernels concern memory formats and the like: the recorded
        # call is right for any batch size. Those that appear between calls came from the model.
        self._note_restrictions()
        try:
            shortcut = _SHORTCUTS.get(func) if args else None
            known = shortcut(*args, **kwargs) if shortcut else None
            if known is None:
                return func(*args, **kwargs)
            return self.alias(known) if known is args[0] else known
        finally:
            self._guards_seen = len(self._env.guards)

    def _note_restrictions(self) -> None:
        self.restrictions += self._env.guards[self._guards_seen :]
        self._guards_seen = len(self._env.guards)

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
        if isinstance(value, _SYMBOLIC):
            return kind, value.node.expr
        raise _NotMemoizable

    def _fingerprint(self, tensor: Tensor) -> Hashable:
        known = self._fingerprints.get(id(tensor))
        if known is not None:
            return known[1]
        if not _is_simple(tensor):
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
            if not _is_simple(result):
                raise _NotMemoizable
            return self.alias(result)
        if isinstance(result, (tuple, list)):
            return type(result), [self._freeze(item, inputs) for item in result]
        raise _NotMemoizable

    def _thaw(self, frozen: Any, inputs: list[Tensor]) -> Any:
        if isinstance(frozen, Tensor):
            return self.alias(frozen)
        if isinstance(frozen, int):
            return inputs[frozen]
        kind, items = frozen
        thawed = [self._thaw(item, inputs) for item in items]
        return kind(*thawed) if hasattr(kind, "_fields") else kind(thawed)

    def alias(self, fake: Tensor) -> Tensor:
        """Makes another fake with the same metadata."""
        # Ten times cheaper than torch.empty_strided, as no symbolic size is computed anew.
        with in_kernel_invocation_manager(self.mode):
            return FakeTensor(self.mode, fake, fake.fake_device)  # type: ignore[attr-defined]


def _is_simple(tensor: Tensor) -> bool:
    """Whether size, stride, dtype and device say all that operations on the fake depend on."""
    return (
        type(tensor) is FakeTensor
        and tensor.constant is None
        and tensor.layout is torch.strided
        and not tensor.dtype.is_complex
    )


def _is_channels_last(tensor: Tensor) -> bool:
    return (
        tensor.dim() == 4
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def _expression(size: Any) -> Any:
    return size if type(size) is int else size.node.expr


def _linear(source: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    if weight.dim() != 2 or source.shape[-1] != weight.shape[1] or not _is_plain(source, weight):
        return None
    shape = (*source.shape[:-1], weight.shape[0])
    return torch.empty(shape, dtype=source.dtype, device=source.device)


def _layer_norm(
    source: Tensor, shape: Any, weight: Tensor | None = None, *_: Any, **__: Any
) -> Tensor | None:
    if weight is None or not tuple(source.shape[-weight.dim() :]) == tuple(shape) == weight.shape:
        return None
    return source if _is_plain(source, weight) else None


def _batch_norm(source: Tensor, mean: Tensor | None, *_: Any, **__: Any) -> Tensor | None:
    if mean is None or source.dim() < 2 or source.shape[1] != mean.shape[0]:
        return None
    return source if _is_plain(source, mean) else None


def _is_plain(source: Tensor, weight: Tensor) -> bool:
    """Whether a layer's result is contiguous, and of the dtype and device of its input."""
    return (
        source.dtype == weight.dtype
        and source.device == weight.device
        and not torch.is_autocast_enabled(source.device.type)
        and _is_simple(source)
        and source.is_contiguous()
    )


_SHORTCUTS: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    F.linear: _linear,
    F.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
}
"""The commonest layers, whose symbolic shapes are slow to compute: the result or its likeness."""
