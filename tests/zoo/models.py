"""The zoo's list of models, built by code, and the inputs each one takes.

Names are ``torchvision:NAME`` and ``timm:NAME``; weights are random, nothing is downloaded.
"""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

SIZES = (96, 128, 160, 192, 224, 256)
"""Image sizes to try, smallest first. At 64 pixels most networks end in a 1 × 1 map, over which
batch norm in train mode has as many values as there are samples."""

BATCH = 2


def installed() -> bool:
    """Whether both collections of models can be imported."""
    return find_spec("timm") is not None and find_spec("torchvision") is not None


def load() -> None:
    """Import both collections, for the processes that are forked afterwards."""
    for collection in ("timm", "torchvision"):
        import_module(collection)


def names(pattern: str = "*", progress: Callable[[str], None] | None = None) -> list[str]:
    """All models of the zoo that match a glob pattern (anywhere in the name)."""
    wanted = [*torchvision_names(), *timm_names(pattern, progress)]
    return [name for name in wanted if matches(name, pattern)]


def matches(name: str, pattern: str) -> bool:
    """Whether a name matches any of several glob patterns, separated by commas."""
    return any(fnmatch.fnmatch(name, f"*{part}*") for part in pattern.split(","))


def torchvision_names() -> list[str]:
    """All classification and segmentation models of torchvision."""
    from torchvision import models

    homes = (models, models.segmentation)
    return [f"torchvision:{name}" for home in homes for name in models.list_models(module=home)]


def timm_names(pattern: str = "*", progress: Callable[[str], None] | None = None) -> Iterator[str]:
    """The smallest variant of every model file of timm (of those with a name that matches)."""
    from timm.models._registry import _module_to_models

    for file in sorted(_module_to_models):
        variants = sorted(_module_to_models[file])
        if any(matches(f"timm:{name}", pattern) for name in variants):
            if progress is not None:
                progress(f"the smallest variant in timm/models/{file}.py")
            smallest = min(variants, key=lambda name: (_parameters(name), len(name), name))
            yield f"timm:{smallest}"


def _parameters(name: str) -> float:
    """A timm model's number of parameters, measured on the meta device."""
    try:
        with torch.device("meta"):
            model = _timm(name)
    except Exception:  # a variant that needs a download or another package is not the smallest
        return float("inf")
    return sum(p.numel() for p in model.parameters())


def _timm(name: str, **options: Any) -> nn.Module:
    import timm

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return timm.create_model(name, pretrained=False, **options)


def build(name: str, device: str = "cpu", size: int | None = None) -> nn.Module:
    """A model with seeded random weights, in eval mode.

    Args:
        name: ``torchvision:NAME`` or ``timm:NAME``.
        device: where its parameters live.
        size: the image size, for models that have to know it.
    """
    source, _, short = name.partition(":")
    torch.manual_seed(0)
    with torch.device(device):
        if source == "torchvision":
            return _torchvision(short, size).eval()
        try:
            return _timm(short, **({} if size is None else {"img_size": size})).eval()
        except TypeError:  # it takes any size
            return _timm(short).eval()


def _torchvision(name: str, size: int | None) -> nn.Module:
    from torchvision import models

    options: dict[str, Any] = {"weights": None}
    if name in models.list_models(module=models.segmentation):
        options["weights_backbone"] = None
    elif name.startswith("vit") and size is not None:
        options["image_size"] = size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return models.get_model(name, **options)


def model_and_input(name: str) -> tuple[nn.Module, Tensor]:
    """A model and a batch of images of the smallest size it takes."""
    size = next((size for size in SIZES if _fits(name, size)), None)
    model = build(name, size=size)
    channels, default = 3, size or 224
    if size is None and hasattr(model, "pretrained_cfg"):
        channels, default, _ = model.pretrained_cfg["input_size"]
    generator = torch.Generator().manual_seed(0)
    return model, torch.randn(BATCH, channels, default, default, generator=generator)


def _fits(name: str, size: int) -> bool:
    """Whether the model takes images of that size in both modes (without computing anything)."""
    try:
        model = _skeleton(name, size)
        image = torch.empty(BATCH, 3, size, size, device="meta")
        tensors = dict(_on_meta([*model.named_parameters(), *model.named_buffers()]))
        for mode in (False, True):
            functional_call(model.train(mode), tensors, (image,))
    except Exception:  # whatever a model says to a size it does not take
        return False
    return True


def _skeleton(name: str, size: int) -> nn.Module:
    """The model without numbers, where it can be built so."""
    try:
        return build(name, "meta", size)
    except (NotImplementedError, RuntimeError):  # its constructor reads numbers
        return build(name, size=size)


def _on_meta(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, value in tensors:
        yield name, value.detach().to("meta")
