"""The ground capture runs on: fake tensors (shapes without data) whose batch size is a symbol."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from fxsvd.capture.batch import BATCH_HINT
from fxsvd.capture.memo import Memo, alias
from fxsvd.capture.shortcuts import SHORTCUTS
from fxsvd.errors import CaptureError

_PROBES = (2, 3, 4, 5, 7, 8, 16, 31, 64)
"""Batch sizes at which the conditions that a model asked for must hold."""


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
        self.mode.cache_enabled = False  # the memo remembers more, for less
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
        self._memo = Memo(self.mode)

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
            self._memo.forget_arguments()
            return self._run(func, args, kwargs)
        return self._memo.call(self._run, func, args, kwargs)

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
            shortcut = SHORTCUTS.get(func) if args else None
            known = shortcut(*args, **kwargs) if shortcut else None
            if known is None:
                return func(*args, **kwargs)
            return alias(self.mode, known) if known is args[0] else known
        finally:
            self._guards_seen = len(self._env.guards)

    def _note_restrictions(self) -> None:
        self.restrictions += self._env.guards[self._guards_seen :]
        self._guards_seen = len(self._env.guards)


def _is_channels_last(tensor: Tensor) -> bool:
    return (
        tensor.dim() == 4
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=torch.channels_last)
    )
