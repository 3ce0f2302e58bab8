"""Routes what no torch function mode sees through a recorder: modules, flags, own gradients."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fxsvd.capture.record import Recorder


class _TrainingSpy:
    """Stands for `training` on nn.Module during a trace, and tells the recorder who looks at it."""

    def __init__(self, recorder: Recorder, thread: int) -> None:
        self._recorder = recorder
        self._thread = thread

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> Any:
        if module is None:
            return self
        if not self._recorder.inside_leaf and threading.get_ident() == self._thread:
            self._recorder.reads_training = True
        try:
            return module.__dict__["training"]
        except KeyError:
            raise AttributeError("training") from None

    def __set__(self, module: nn.Module, value: bool) -> None:
        module.__dict__["training"] = value


@contextmanager
def intercepted(recorder: Recorder) -> Iterator[None]:
    """Routes module calls and reads of training flags in this thread through a recorder."""
    original, original_from_numpy = nn.Module.__call__, torch.from_numpy
    found = next(k for k in torch.autograd.Function.__mro__ if "apply" in vars(k))
    original_apply = vars(found)["apply"].__get__
    own = vars(torch.autograd.Function).get("apply")
    thread = threading.get_ident()

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return original(module, *args, **kwargs)
        return recorder.call_module(original, module, args, kwargs)

    def apply(function: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread or recorder.inside_leaf:
            return original_apply(None, function)(*args, **kwargs)
        return recorder.call_function(original_apply(None, function), function, args, kwargs)

    def from_numpy(ndarray: Any) -> Tensor:
        with unset_fake_temporarily():
            return original_from_numpy(ndarray)

    try:
        # No torch function mode sees it, and it cannot run in a fake tensor mode.
        torch.from_numpy = from_numpy
        torch.autograd.Function.apply = classmethod(apply)
        nn.Module.__call__ = call  # type: ignore[method-assign]
        nn.Module.training = _TrainingSpy(recorder, thread)  # type: ignore[assignment]
        yield
    finally:
        torch.from_numpy = original_from_numpy
        del torch.autograd.Function.apply
        if own is not None:
            torch.autograd.Function.apply = own
        nn.Module.__call__ = original  # type: ignore[method-assign]
        del nn.Module.training
