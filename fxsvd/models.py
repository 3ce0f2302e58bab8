"""Models by name: ``timm:NAME``, ``torchvision:NAME`` or ``package.module:factory``."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fxsvd.errors import FxsvdError

Size = tuple[int, ...]


@dataclass(frozen=True)
class Found:
    """A model, with what is known about its inputs.

    Attributes:
        module: the model.
        size: the shape of one sample, where the model's configuration says it.
        inputs: example inputs, where a factory returned them.
    """

    module: nn.Module
    size: Size | None = None
    inputs: Any = None


def load(
    name: str,
    *,
    pretrained: bool = False,
    weights: Path | None = None,
    size: Size | None = None,
    batch: int = 1,
) -> tuple[nn.Module, Any]:
    """A model and example inputs for it; random weights and inputs are the same in every run.

    Args:
        name: ``timm:NAME``, ``torchvision:NAME``, or ``package.module:factory``, a callable without
            arguments that returns a module, or a module and example inputs.
        pretrained: whether to fetch the weights that timm or torchvision publish.
        weights: a state dict to load, ``.safetensors`` or a file that ``torch.save`` wrote.
        size: the shape of one sample; by default what the model's configuration says.
        batch: how many samples the example inputs have.

    Raises:
        FxsvdError: there is no such model, its weights cannot be had, or nothing says its input.

    >>> model, inputs = load("torch.nn:Identity", size=(3, 32, 32), batch=2)
    >>> inputs.shape
    torch.Size([2, 3, 32, 32])
    """
    home, _, rest = name.partition(":")
    if not home or not rest:
        raise FxsvdError(
            f"{name!r} names no model: write timm:NAME, torchvision:NAME or package.module:factory"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = _find(home, rest, pretrained)
        if weights is not None:
            _load_weights(found.module, weights)
        return found.module, _inputs(name, found, size, batch)


def _find(home: str, rest: str, pretrained: bool) -> Found:
    if home == "timm":
        return _from_timm(rest, pretrained)
    if home == "torchvision":
        return _from_torchvision(rest, pretrained)
    if pretrained:
        raise FxsvdError("pretrained weights are for timm: and torchvision: models; use --weights")
    return _from_factory(home, rest)


def _inputs(name: str, found: Found, size: Size | None, batch: int) -> Any:
    if size is None and found.inputs is not None:
        return found.inputs
    size = size or found.size
    if size is None:
        raise FxsvdError(f"nothing says what {name} takes: give --input-size, such as 3,224,224")
    return torch.randn(batch, *size)


# ---------------------------------------------------------------- where models come from


def _from_timm(name: str, pretrained: bool) -> Found:
    timm = _library("timm")
    if ":" not in name and not timm.is_model(name):  # hf-hub:… and local-dir:… are names to timm
        raise _unknown("timm", name, timm.list_models())
    model = _with_weights(f"timm:{name}", pretrained, lambda: timm.create_model(name, pretrained))
    return Found(model, tuple(timm.data.resolve_model_data_config(model)["input_size"]))


def _from_torchvision(name: str, pretrained: bool) -> Found:
    models = _library("torchvision").models
    if name not in models.list_models():
        raise _unknown("torchvision", name, models.list_models())
    options: dict[str, Any] = {"weights": "DEFAULT" if pretrained else None}
    if "weights_backbone" in signature(models.get_model_builder(name)).parameters:
        options["weights_backbone"] = None  # else a download, also without `weights`
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about how random weights are drawn
        model = _with_weights(
            f"torchvision:{name}", pretrained, lambda: models.get_model(name, **options)
        )
    return Found(model, _torchvision_size(models.get_model_weights(name).DEFAULT))


def _torchvision_size(weights: Any) -> Size | None:
    """The crop (or, for segmentation, the size) that the published weights were evaluated at."""
    options = getattr(weights.transforms, "keywords", {})
    side = options.get("crop_size", options.get("resize_size"))
    return (3, side, side) if isinstance(side, int) else None  # video: the length is up to the user


def _from_factory(module_name: str, factory_name: str) -> Found:
    module = _import(module_name)
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        near = get_close_matches(factory_name, dir(module), 3)
        raise FxsvdError(f"{module_name} has no callable {factory_name!r}{_hint(near)}")
    made = factory()
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise FxsvdError(f"{module_name}:{factory_name} returns a {kind}, not an nn.Module")
    return Found(model, inputs=inputs)


def _import(name: str) -> ModuleType:
    if (here := str(Path.cwd())) not in sys.path:  # an installed command does not look there
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise FxsvdError(f"cannot import {name}: {error}") from error


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise FxsvdError(f"{name}: models need {name}: pip install 'fxsvd[{name}]'") from error


def _unknown(home: str, name: str, names: list[str]) -> FxsvdError:
    return FxsvdError(f"{home} has no model {name!r}{_hint(get_close_matches(name, names, 3))}")


def _hint(near: list[str]) -> str:
    return f"; did you mean {', '.join(near)}?" if near else ""


# ---------------------------------------------------------------- weights


def _with_weights(name: str, pretrained: bool, create: Callable[[], nn.Module]) -> nn.Module:
    if not pretrained:
        return create()
    try:
        return create()
    except Exception as error:  # the hubs raise whatever their network stack does
        reason = str(error).partition("\n")[0]
        raise FxsvdError(
            f"cannot get the pretrained weights of {name}: {reason} "
            "(without a connection, download them elsewhere and give --weights FILE)"
        ) from error


def _load_weights(model: nn.Module, path: Path) -> None:
    try:
        state = _read(path)
    except FxsvdError:
        raise
    except Exception as error:  # a broken file raises anything from KeyError to UnpicklingError
        reason = str(error).partition("\n")[0]
        raise FxsvdError(f"cannot read weights from {path}: {reason}") from error
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # its message lists every name that is missing or left over
        raise FxsvdError(f"{path} does not hold this model's weights. {error}") from error


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        state: Any = _library("safetensors.torch").load_file(path)
        return dict(state)
    state = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model"):  # as training scripts wrap it
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise FxsvdError(f"{path} holds a {type(state).__name__}, not a state dict")
    return state
