"""The networks of the reproduction scripts, their weights, and how they are judged.

Not a command. Weights come from two folders: ``DATA/weights`` holds those that others trained
(CIFAR ResNets, MobileNetV2), ``WORK`` those that train.py made.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F


class _Block(nn.Module):
    """Two convolutions and an option-A shortcut: every other pixel, new channels zero."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.new = (width - width_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.new:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.new, self.new))
        return F.relu(out + x)


class _CifarResNet(nn.Module):
    def __init__(self, blocks: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks)
        self.layer2 = _stage(16, 32, blocks)
        self.layer3 = _stage(32, 64, blocks)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def _stage(width_in: int, width: int, blocks: int) -> nn.Sequential:
    first = _Block(width_in, width, stride=width // width_in)
    return nn.Sequential(first, *(_Block(width, width, 1) for _ in range(blocks - 1)))


def cifar_resnet(depth: int, classes: int = 10) -> nn.Module:
    """The CIFAR ResNet of depth 6n + 2 (He et al. 2015, §4.2), input ``n×3×32×32``.

    State dicts are those of Y. Idelbayev's pytorch_resnet_cifar10.

    Raises:
        ValueError: the depth is not 6n + 2.
    """
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"a CIFAR ResNet has 6n + 2 layers, as 20 or 56, not {depth}")
    return _CifarResNet((depth - 2) // 6, classes)


def lenet_300_100() -> nn.Module:
    """Two hidden layers (LeCun et al. 1998): 266,610 parameters, input ``n×1×28×28``."""
    layers = OrderedDict[str, nn.Module](flatten=nn.Flatten())
    layers.update(fc1=nn.Linear(784, 300), relu1=nn.ReLU())
    layers.update(fc2=nn.Linear(300, 100), relu2=nn.ReLU(), fc3=nn.Linear(100, 10))
    return nn.Sequential(layers)


def lenet_5_caffe() -> nn.Module:
    """LeNet-5 as Caffe ships it: 431,080 parameters, input ``n×1×28×28``.

    There, the convolutions are followed by max-pooling alone: the only ReLU is after ``fc1``.
    """
    layers = OrderedDict[str, nn.Module](conv1=nn.Conv2d(1, 20, 5), pool1=nn.MaxPool2d(2))
    layers.update(conv2=nn.Conv2d(20, 50, 5), pool2=nn.MaxPool2d(2), flatten=nn.Flatten())
    layers.update(fc1=nn.Linear(800, 500), relu1=nn.ReLU(), fc2=nn.Linear(500, 10))
    return nn.Sequential(layers)


def vgg11(channels_in: int = 3, classes: int = 10) -> nn.Module:
    """VGG-11 as torchvision has it, not trained, for ``n×channels_in×32×32``; no batch norm."""
    from torchvision.models import vgg11 as torchvision_vgg11

    model = torchvision_vgg11(weights=None, num_classes=classes)
    if channels_in != 3:
        first = nn.Conv2d(channels_in, 64, 3, padding=1)
        nn.init.kaiming_normal_(first.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(first.bias)
        model.features[0] = first
    return model


TRAINED: dict[str, Callable[[], nn.Module]] = {
    "lenet_300_100-mnist": lenet_300_100,
    "lenet_5-mnist": lenet_5_caffe,
    "vgg11-mnist": lambda: vgg11(1),
    "vgg11-cifar10": lambda: vgg11(3),
}


def load_trained(work: Path, name: str) -> nn.Module:
    """A network that train.py trained, in eval mode; ``name`` is a key of ``TRAINED``.

    Raises:
        FileNotFoundError: it has not been trained yet.
    """
    path = work / f"{name}.safetensors"
    if not path.exists():
        command = f"python examples/reproduce/train.py {name} --work {work}"
        raise FileNotFoundError(f"{path} is missing: run {command}")
    return _loaded(TRAINED[name](), path)


def load_cifar_resnet(root: Path, name: str) -> nn.Module:
    """``resnet20``, ``resnet56`` or ``resnet56_jpeg`` from ``root/weights``, in eval mode."""
    depth = int(name.removeprefix("resnet").split("_")[0])
    return _loaded(cifar_resnet(depth), root / "weights" / f"{name}.safetensors")


def load_mobilenet_v2(root: Path) -> nn.Module:
    """ImageNet MobileNetV2 in eval mode; its input is ``data.MOBILENET_V2`` (turned by 180°)."""
    from torchvision.models import mobilenet_v2

    path = root / "weights" / "mobilenet_v2_imagenet_rot180.safetensors"
    return _loaded(mobilenet_v2(weights=None), path)


def _loaded(model: nn.Module, path: Path) -> nn.Module:
    model.load_state_dict(load_file(path))
    return model.eval()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 500) -> float:
    """The fraction of prepared images whose largest logit is their label's, in eval mode."""
    return (_choices(model, images, batch) == labels).double().mean().item()


def agreement(model: nn.Module, other: nn.Module, images: Tensor, batch: int = 500) -> float:
    """The fraction of prepared images on which two networks choose the same class."""
    same = _choices(model, images, batch) == _choices(other, images, batch)
    return same.double().mean().item()


@torch.no_grad()
def _choices(model: nn.Module, images: Tensor, batch: int) -> Tensor:
    training = model.training
    model.eval()
    try:
        return torch.cat([model(part).argmax(1) for part in images.split(batch)])
    finally:
        model.train(training)
