"""One run of the model in one mode, written down."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

from fxsvd.capture.explain import explain
from fxsvd.capture.fakes import Fakes
from fxsvd.capture.inputs import PLAIN_TYPES, batch_size, is_batched, map_tensors, require_plain
from fxsvd.capture.intercept import intercepted
from fxsvd.capture.record import Recorder
from fxsvd.capture.untouched import untouched
from fxsvd.errors import CaptureError


def trace(model: nn.Module, fakes: Fakes, args: Any, kwargs: Any, *, training: bool) -> Recorder:
    """Runs the model once in one mode, and restores all that the run changed."""
    bound = _bind(model, args, kwargs)
    batch = batch_size((args, kwargs))
    recorder = Recorder(model, fakes)
    defaults = _defaults(inspect.signature(model.forward), bound.arguments)
    for name, value in bound.arguments.items():
        require_plain(name, value)
        fake = map_tensors(lambda t: fakes.input(t, batched=is_batched(t, batch)), value)
        bound.arguments[name] = fake
        recorder.placeholder(*defaults[name], fake)
    with untouched(model, training=training):
        try:
            with intercepted(recorder), fakes.running(), recorder:
                result = model(*bound.args, **bound.kwargs)
                recorder.output(result)
        except Exception as error:
            raise explain(error, model, recorder, str(fakes.symbol)) from error
    return recorder


def _bind(model: nn.Module, args: Any, kwargs: Any) -> inspect.BoundArguments:
    try:
        return inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise CaptureError(
            f"the example inputs do not fit {type(model).__name__}.forward: {error}"
        ) from error


def _defaults(
    signature: inspect.Signature, names: Iterable[str]
) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Returns what to call each input node, with stars, and in a tuple its default if any."""
    stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}
    found: dict[str, tuple[str, tuple[Any, ...]]] = {}
    for name in names:
        parameter = signature.parameters[name]
        default: tuple[Any, ...] = ()
        if parameter.default is not parameter.empty:
            is_literal = isinstance(parameter.default, PLAIN_TYPES)
            default = (parameter.default if is_literal else None,)
        found[name] = stars.get(parameter.kind.name, "") + name, default
    return found
