"""Compares a graph with its model, in numbers, at a batch size that capture has not seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxsvd.capture.inputs import batch_size, is_batched, map_tensors, tensors
from fxsvd.capture.module import CapturedModule
from fxsvd.capture.untouched import untouched
from fxsvd.errors import CaptureError

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def check_graph(model: nn.Module, captured: CapturedModule, args: Any, kwargs: Any) -> None:
    """Compares the graph with the model at a batch size that capture has not seen.

    Raises:
        CaptureError: If their results differ.
    """
    held = [*model.parameters(), *model.buffers(), *tensors((args, kwargs))]
    if any(tensor.device.type == "meta" for tensor in held):
        captured.meta["check"] = "skipped: no data on the meta device"
        return
    batch = batch_size((args, kwargs))
    size = 2 if batch == 3 else 3
    inputs = map_tensors(lambda t: _resize(t, size) if is_batched(t, batch) else t, (args, kwargs))
    with untouched(model, training=False), untouched(captured, training=False):
        expected = _run(model, inputs, seed=0)
        difference = _difference(_run(captured, inputs, seed=0), expected)
        if difference and _difference(_run(model, inputs, seed=1), expected):
            captured.meta["check"] = "skipped: the model is random in eval mode"
        elif difference:
            raise CaptureError(
                f"the graph differs from {type(model).__name__} at batch size {size}: "
                f"{difference}. Its forward does something that a graph cannot hold, such as "
                "fixing the batch size, or computing with NumPy."
            )


def _resize(tensor: Tensor, size: int) -> Tensor:
    repeats = -(-size // tensor.shape[0])
    return torch.cat([tensor] * repeats)[:size]


def _run(model: nn.Module, inputs: Any, seed: int) -> Any:
    """Runs a model without a trace: buffers, the random state and the inputs do not change."""
    args, kwargs = map_tensors(torch.clone, inputs)
    buffers = [(buffer, buffer.clone(), buffer._version) for buffer in model.buffers()]
    cuda = {tensor.device.index for tensor in tensors(inputs) if tensor.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=cuda), torch.no_grad():
            torch.manual_seed(seed)
            return model(*args, **kwargs)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} raised {type(error).__name__} at another batch size than that "
            f"of the example inputs: {error}"
        ) from error
    finally:
        with torch.no_grad():
            for buffer, content, version in buffers:
                if buffer._version != version:
                    buffer.copy_(content)


def _difference(actual: Any, expected: Any) -> str:
    """Says how two results differ, "" if they do not but for rounding."""
    ours, theirs = tensors(actual), tensors(expected)
    if len(ours) != len(theirs):
        return f"{len(ours)} tensors instead of {len(theirs)}"
    for left, right in zip(ours, theirs, strict=True):
        if left.shape != right.shape or left.dtype != right.dtype:
            return f"{left.dtype} {list(left.shape)} instead of {right.dtype} {list(right.shape)}"
        if not left.is_floating_point():
            if not torch.equal(left, right):
                return "integers differ"
            continue
        # The largest finite value; networks with random weights may well overflow.
        finite = right[right.isfinite()]
        scale = finite.abs().max().clamp_min(1e-12) if finite.numel() else 1.0
        tolerance = _TOLERANCE.get(right.dtype, 2e-2)
        if not torch.allclose(left / scale, right / scale, rtol=0, atol=tolerance, equal_nan=True):
            return f"up to {((left - right).abs().max() / scale).item():.2g} of the largest value"
    return ""
