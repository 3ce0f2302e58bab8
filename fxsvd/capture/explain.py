"""Errors inside a model, explained: what went wrong, in which module, what to do."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch
from torch import nn

from fxsvd.capture.record import Recorder
from fxsvd.errors import CaptureError

_DATA_DEPENDENT = {
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "GuardOnDataDependentSymNode",
}
_UNSUPPORTED = {
    "UnsupportedOperatorException",
    "UnsupportedFakeTensorException",
    "UnsupportedMutationAliasingException",
}
_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


def explain(error: Exception, model: nn.Module, recorder: Recorder, symbol: str) -> CaptureError:
    """Says what went wrong, in which module, at which line, and what to do."""
    module = recorder.failed_in or model
    path = recorder.path_of(module)
    where = f"{path or 'the root module'} ({type(module).__name__})"
    line = _user_line(error)
    at = f" at {line}" if line else ""
    if isinstance(error, CaptureError):
        return CaptureError(f"in {where}{at}: {error}")
    kind, message = type(error).__name__, str(error).replace(symbol, "batch")
    if kind in _DATA_DEPENDENT:
        return CaptureError(
            f"in {where}{at}: the code depends on the values of a tensor (a branch, .item(), or a "
            f"shape made from data), which a graph cannot hold. Compute it without branching "
            "(torch.where), move it out of forward, or keep this module whole: "
            f"fxsvd.register_layer({type(module).__name__}, ...)."
        )
    if kind in _UNSUPPORTED:
        return CaptureError(
            f"in {where}{at}: an operation cannot run without data: {message}. Keep this module "
            f"whole: fxsvd.register_layer({type(module).__name__}, ...)."
        )
    return CaptureError(
        f"in {where}{at}: the model raised {kind}: {message}. Do the example inputs fit the model?"
    )


def _user_line(error: BaseException) -> str:
    """The innermost line of the stack that belongs neither to torch nor to this package."""
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        if not frame.filename.startswith(_LIBRARIES):
            return f"{frame.filename}:{frame.lineno}"
    return ""
