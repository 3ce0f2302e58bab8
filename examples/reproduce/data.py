"""The data of the reproduction scripts, as plain tensors: images uint8 ``n×c×h×w``, labels int64.

Not a command; the scripts beside it take ``--data DIR`` (default: ``$FXSVD_DATA``) and
``--work DIR`` (default: ``~/.cache/fxsvd``, decoded images and trained weights). DIR holds

    MNIST/raw/*.gz, FashionMNIST/raw/*.gz    the original IDX files
    cifar10-jpg.tar.gz                       train|test/CLASS/NNNN.jpg, CIFAR-10 stored as JPEG
    imagenet-sample-500.tar                  …/WNID/NAME.JPEG, short side 256
    imagenet-classes.txt                     lines of WNID, index, name
    weights/*.safetensors                    see networks.py
"""

from __future__ import annotations

import argparse
import gzip
import io
import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Labelled = tuple[Tensor, Tensor]


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse, with ``--data`` and ``--work`` added; exits with what to pass where a folder lacks."""
    given, cache = os.environ.get("FXSVD_DATA"), Path.home() / ".cache" / "fxsvd"
    parser.add_argument("--data", type=Path, default=given, help="data folder (or $FXSVD_DATA)")
    parser.add_argument("--work", type=Path, default=cache, help="trained weights, decoded images")
    arguments = parser.parse_args(argv)
    if arguments.data is None:
        parser.error("pass --data DIR, the folder that data.py describes, or set FXSVD_DATA")
    if not arguments.data.is_dir():
        parser.error(f"--data {arguments.data} is not a folder: pass the one data.py describes")
    return arguments


def mnist(root: Path, train: bool) -> Labelled:
    """60,000 or 10,000 digits, ``n×1×28×28``."""
    return _idx_pair(root / "MNIST" / "raw", train)


def fashion_mnist(root: Path, train: bool) -> Labelled:
    """60,000 or 10,000 pieces of clothing, ``n×1×28×28``."""
    return _idx_pair(root / "FashionMNIST" / "raw", train)


def cifar10_jpeg(root: Path, work: Path, train: bool) -> Labelled:
    """50,000 or 10,000 images ``n×3×32×32``, class by class, in torchvision's ImageFolder order.

    The pixels went through JPEG (quality 75): accuracies do not compare with published ones.
    """
    split = "train" if train else "test"
    return _cached(work / f"cifar10-jpeg-{split}.pt", lambda: _cifar10_jpeg(root, split))


def imagenet_sample(root: Path, work: Path) -> Labelled:
    """500 images ``n×3×224×224`` (centre of the short side 256), one a class; labels 0 … 999.

    Probably training images: good for calibration and agreement, not for quoting accuracy.
    """
    return _cached(work / "imagenet-sample-500.pt", lambda: _imagenet_sample(root))


def load(dataset: str, root: Path, work: Path, train: bool) -> Labelled:
    """One of ``mnist``, ``fashion_mnist``, ``cifar10``, by name."""
    if dataset == "cifar10":
        return cifar10_jpeg(root, work, train)
    return {"mnist": mnist, "fashion_mnist": fashion_mnist}[dataset](root, train)


@dataclass(frozen=True)
class Prepare:
    """What a network expects in place of uint8 images: resized, normalised, turned by 180°."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int | None = None
    turned: bool = False

    def __call__(self, images: Tensor) -> Tensor:
        """Float32 images of shape ``n×c×h×w``, from uint8 ones."""
        out = images.float() / 255
        if self.size is not None:
            out = F.interpolate(out, size=self.size, mode="bilinear", align_corners=False)
        shape = (1, len(self.mean), 1, 1)
        out = (out - torch.tensor(self.mean).view(shape)) / torch.tensor(self.std).view(shape)
        return out.flip((2, 3)) if self.turned else out


MNIST = Prepare((0.1307,), (0.3081,))
MNIST_32 = Prepare((0.1307,), (0.3081,), size=32)
FASHION_MNIST = Prepare((0.2860,), (0.3530,))
CIFAR10 = Prepare((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# The kernels are stored turned by 180°, so that symmetric padding equals TensorFlow's "SAME".
MOBILENET_V2 = Prepare((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), turned=True)


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file whole or not at all: an interrupted run leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    write(partial)
    partial.replace(path)


def _cached(path: Path, decode: Callable[[], Labelled]) -> Labelled:
    if not path.exists():
        decoded = decode()
        replace_file(path, lambda partial: torch.save(decoded, partial))
    images, labels = torch.load(path, weights_only=True)
    return images, labels


def _idx_pair(folder: Path, train: bool) -> Labelled:
    stem = "train" if train else "t10k"
    images = _idx(folder / f"{stem}-images-idx3-ubyte.gz").unsqueeze(1)
    return images, _idx(folder / f"{stem}-labels-idx1-ubyte.gz").long()


def _idx(path: Path) -> Tensor:
    """An IDX file: two zeros, the type (8: bytes), the rank, big-endian sizes, the numbers."""
    raw = bytearray(gzip.decompress(path.read_bytes()))  # torch wants a buffer it may write to
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no IDX file of bytes: fetch it again")
    start = 4 + 4 * raw[3]
    sizes = [int.from_bytes(raw[at : at + 4], "big") for at in range(4, start, 4)]
    return torch.frombuffer(raw, dtype=torch.uint8, offset=start).reshape(sizes)


def _members(archive: Path) -> list[tuple[str, bytes]]:
    """The files of a tar with their names, in the order of their names."""
    found = []
    with tarfile.open(archive) as tar:
        for member in tar:
            content = tar.extractfile(member)
            if content is not None:
                found.append((member.name.removeprefix("./"), content.read()))
    return sorted(found)


def _cifar10_jpeg(root: Path, split: str) -> Labelled:
    from torchvision.transforms.functional import pil_to_tensor

    named = [(n, c) for n, c in _members(root / "cifar10-jpg.tar.gz") if n.startswith(f"{split}/")]
    folders = [name.split("/")[1] for name, _ in named]
    classes = sorted(set(folders))
    images = torch.stack([pil_to_tensor(_decoded(content)) for _, content in named])
    return images, torch.tensor([classes.index(folder) for folder in folders])


def _imagenet_sample(root: Path) -> Labelled:
    from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

    rows = (line.split() for line in (root / "imagenet-classes.txt").read_text().splitlines())
    label = {row[0]: int(row[1]) for row in rows}
    named = _members(root / "imagenet-sample-500.tar")
    crops = [center_crop(resize(_decoded(content), 256), [224, 224]) for _, content in named]
    images = torch.stack([pil_to_tensor(crop) for crop in crops])
    return images, torch.tensor([label[name.split("/")[-2]] for name, _ in named])


def _decoded(content: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(content)).convert("RGB")
