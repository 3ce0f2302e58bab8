"""ONNX out: exported with a dynamic batch, then compared with PyTorch in ONNX Runtime."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree  # the order in which torch.export flattens its arguments

from fxsvd.capture import normalize_inputs
from fxsvd.cost import bytes_of, evaluating
from fxsvd.errors import FxsvdError

TOLERANCE = 1e-4
"""Accepted difference over the output's largest value: float32 sums taken in another order."""

EXPORT_BATCH = 2  # torch.export would take a batch of 1 for a constant
CHECKED_BATCHES = (1, 3)
ONE_FILE_BYTES = 1_800_000_000  # a protobuf message ends at 2 GiB


class ExportError(FxsvdError):
    """The network cannot be exported, or the exported file computes something else."""


def export_onnx(
    module: nn.Module, path: str | Path, example_inputs: Any, *, check: bool = True
) -> float | None:
    """Writes a network in eval mode to an ONNX file that takes any batch size.

    Args:
        module: Any module that ``torch.export`` can trace; left as it was, its mode included.
        path: The file to write. Weights above 1.8 GB go beside it, to ``<path>.data``.
        example_inputs: A tensor, a tuple (args) or a dict (kwargs). The first axis of the first
            tensor is the batch, and so is that of every tensor of the same length.
        check: Whether to run the file in ONNX Runtime at two batch sizes, against the module.

    Returns:
        The largest difference found, as a fraction of the largest value in that output; None where
        nothing was checked.

    Raises:
        ExportError: A package is missing, the module cannot be exported, or the file computes
            something else than the module; the file is then deleted.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     difference = export_onnx(nn.Linear(3, 2), Path(folder, "net.onnx"), torch.ones(1, 3))
    >>> difference < 1e-6
    True
    """
    _require("onnx", "onnxscript", *(["onnxruntime"] if check else []))
    path = Path(path)
    with evaluating(module), torch.no_grad():
        _write(module, path, _resize(example_inputs, EXPORT_BATCH))
        return _check(module, path, example_inputs) if check else None


def _require(*packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ExportError(f"ONNX export needs {', '.join(missing)}: pip install 'fxsvd[onnx]'")


def _write(module: nn.Module, path: Path, inputs: Any) -> None:
    args, kwargs = normalize_inputs(inputs)
    try:
        with _quiet():
            torch.onnx.export(
                module,
                args,
                path,
                kwargs=kwargs,
                dynamo=True,
                dynamic_shapes=_dynamic_shapes(kwargs or args),
                external_data=bytes_of(module) > ONE_FILE_BYTES,
                verbose=False,
            )
    except Exception as error:
        # What torch.onnx itself says is advice on reporting bugs; its cause says what went wrong.
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise ExportError(f"torch.onnx cannot export this network: {reason}") from error


def _check(module: nn.Module, path: Path, example_inputs: Any) -> float:
    try:
        return max(
            _difference(module, path, _resize(example_inputs, batch)) for batch in CHECKED_BATCHES
        )
    except ExportError:
        path.unlink()
        path.with_name(f"{path.name}.data").unlink(missing_ok=True)
        raise


def _difference(module: nn.Module, path: Path, inputs: Any) -> float:
    """The largest relative difference between module and file; raises above the tolerance."""
    actual = _run(path, _arrays(inputs))
    args, kwargs = normalize_inputs(inputs)
    expected = _arrays(module(*args, **kwargs))
    if [got.shape for got in actual] != [want.shape for want in expected]:
        shapes = [[array.shape for array in arrays] for arrays in (actual, expected)]
        raise ExportError(f"the ONNX file returns shapes {shapes[0]}, the network {shapes[1]}")
    worst = 0.0
    for index, (got, want) in enumerate(zip(actual, expected, strict=True)):
        difference = _relative_difference(got, want)
        if not difference <= _tolerance(want):
            raise ExportError(
                f"the ONNX file computes something else than the network: output {index} differs "
                f"by {difference:.2g} of its largest value in ONNX Runtime"
            )
        worst = max(worst, difference)
    return worst


def _run(path: Path, arrays: list[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised, no need to print them
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [node.name for node in session.get_inputs()]
        return list(session.run(None, dict(zip(names, arrays, strict=True))))
    except Exception as error:
        raise ExportError(f"ONNX Runtime cannot run the exported file: {error}") from error


def _relative_difference(got: npt.NDArray[Any], want: npt.NDArray[Any]) -> float:
    """Largest difference over largest value; what is infinite or no number must be equal."""
    finite = np.isfinite(want)
    if not np.array_equal(got[~finite], want[~finite], equal_nan=True):
        return np.inf
    got, want = got[finite].astype(np.float64), want[finite].astype(np.float64)
    scale = max(np.abs(want).max(initial=0), np.finfo(np.float32).tiny)
    return float(np.abs(got - want).max(initial=0) / scale)


def _tolerance(array: npt.NDArray[Any]) -> float:
    if not np.issubdtype(array.dtype, np.floating):
        return 0
    return max(TOLERANCE, 16 * float(np.finfo(array.dtype).eps))  # the second for half precision


def _arrays(value: Any) -> list[npt.NDArray[Any]]:
    return [tensor.cpu().numpy().copy() for tensor in _tensors(value)]


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _dynamic_shapes(inputs: Any) -> Any:
    """``torch.export``'s description of inputs: axis 0 of batched tensors is dynamic."""
    batch = _batch_of(inputs)

    def describe(leaf: Any) -> dict[int, Any] | None:
        return {0: torch.export.Dim.DYNAMIC} if _is_batched(leaf, batch) else None

    return pytree.tree_map(describe, inputs)


def _resize(inputs: Any, batch: int) -> Any:
    """A copy of example inputs with another batch size; repeated rows are scaled to be distinct."""
    given = _batch_of(inputs)

    def resize(tensor: Tensor) -> Tensor:
        if not _is_batched(tensor, given):
            return tensor.clone()
        steps = range(-(-batch // len(tensor)))
        scales = [1 + step / 10 if tensor.is_floating_point() else 1 for step in steps]
        return torch.cat([tensor * scale for scale in scales])[:batch]

    return pytree.tree_map_only(Tensor, resize, inputs)


def _batch_of(inputs: Any) -> int | None:
    return next((len(tensor) for tensor in _tensors(inputs) if tensor.dim()), None)


def _is_batched(leaf: Any, batch: int | None) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == batch


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences what torch.onnx and onnxscript print, log and warn about their own internals."""
    disabled, sink = logging.root.manager.disable, StringIO()
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(sink), redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
