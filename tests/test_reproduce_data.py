"""Data, networks and training of examples/reproduce: made-up files, real ones by FXSVD_DATA."""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import importlib
import io
import os
import re
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("safetensors", reason="the scripts keep weights in safetensors files")
pytest.importorskip("torchvision", reason="the scripts take VGG-11 and MobileNetV2 from there")
image = pytest.importorskip("PIL.Image", reason="the scripts decode JPEG files with PIL")

REPRODUCE = Path(__file__).resolve().parent.parent / "examples" / "reproduce"


def script(name: str) -> ModuleType:
    sys.path.insert(0, str(REPRODUCE))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(REPRODUCE))


data, networks, train = (script(name) for name in ("data", "networks", "train"))


def idx(values: Tensor) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return gzip.compress(b"\0\0\x08" + bytes([values.dim()]) + sizes + bytes(values.flatten()))


def tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def jpeg(color: tuple[int, int, int] | int, size: tuple[int, int]) -> bytes:
    out = io.BytesIO()
    mode = "L" if isinstance(color, int) else "RGB"
    image.new(mode, size, color).save(out, "JPEG", quality=100)
    return out.getvalue()


@pytest.mark.parametrize("folder", ["MNIST", "FashionMNIST"])
@pytest.mark.parametrize("stem", ["train", "t10k"])
def test_idx_files_come_back_as_they_were_written(folder: str, stem: str, tmp_path: Path) -> None:
    images = torch.randint(256, (5, 28, 28), dtype=torch.uint8)
    labels = torch.tensor([3, 1, 4, 1, 9], dtype=torch.uint8)
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    (raw / f"{stem}-images-idx3-ubyte.gz").write_bytes(idx(images))
    (raw / f"{stem}-labels-idx1-ubyte.gz").write_bytes(idx(labels))
    name = {"MNIST": "mnist", "FashionMNIST": "fashion_mnist"}[folder]
    found_images, found_labels = data.load(name, tmp_path, tmp_path, stem == "train")
    assert torch.equal(found_images, images.unsqueeze(1))
    assert torch.equal(found_labels, labels.long())


def test_a_file_that_is_not_idx_is_refused(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"<html>moved</html>"))
    with pytest.raises(ValueError, match="no IDX file of bytes: fetch it again"):
        data.mnist(tmp_path, train=True)


def test_cifar_labels_follow_the_sorted_class_names_whatever_the_order_of_the_tar(
    tmp_path: Path,
) -> None:
    red, blue = jpeg((250, 0, 0), (32, 32)), jpeg((0, 0, 250), (32, 32))
    files = {"train/truck/0.jpg": blue, "test/cat/0.jpg": blue, "train/cat/1.jpg": red}
    tar(tmp_path / "cifar10-jpg.tar.gz", {**files, "train/cat/0.jpg": red})
    images, labels = data.load("cifar10", tmp_path, tmp_path / "work", True)
    assert images.shape == (3, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert labels.tolist() == [0, 0, 1]
    assert images.float().mean((2, 3)).argmax(1).tolist() == [0, 0, 2]


def test_decoded_images_are_kept_and_found_again(tmp_path: Path) -> None:
    archive, work = tmp_path / "cifar10-jpg.tar.gz", tmp_path / "work"
    tar(archive, {"test/cat/0.jpg": jpeg((1, 2, 3), (32, 32))})
    first = data.cifar10_jpeg(tmp_path, work, train=False)
    archive.unlink()
    again = data.cifar10_jpeg(tmp_path, work, train=False)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert [path.name for path in work.iterdir()] == ["cifar10-jpeg-test.pt"]


def test_imagenet_labels_come_from_the_class_list_and_grey_images_get_three_channels(
    tmp_path: Path,
) -> None:
    (tmp_path / "imagenet-classes.txt").write_text("n1\t7\ta name\nn2\t5\tanother\n")
    files = {"s/n2/x.JPEG": jpeg((0, 250, 0), (256, 300)), "s/n1/y.JPEG": jpeg(99, (400, 256))}
    tar(tmp_path / "imagenet-sample-500.tar", files)
    images, labels = data.imagenet_sample(tmp_path, tmp_path / "work")
    assert images.shape == (2, 3, 224, 224)
    assert labels.tolist() == [7, 5]
    assert (images[0] == 99).all()


def test_prepare_normalises_each_channel() -> None:
    images = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    found = data.Prepare((0.0, 0.2, 0.4), (0.5, 1.0, 2.0))(images)
    for channel, (mean, std) in enumerate([(0.0, 0.5), (0.2, 1.0), (0.4, 2.0)]):
        expected = (images[:, channel] / 255 - mean) / std
        torch.testing.assert_close(found[:, channel], expected, rtol=0, atol=1e-6)


def test_mobilenet_input_is_turned_and_between_minus_one_and_one() -> None:
    images = torch.randint(256, (2, 3, 6, 5), dtype=torch.uint8)
    expected = torch.flip(images / 127.5 - 1, (2, 3))
    torch.testing.assert_close(data.MOBILENET_V2(images), expected, rtol=0, atol=1e-6)


def test_vgg_digits_are_resized_to_32() -> None:
    white = data.MNIST_32(torch.full((2, 1, 28, 28), 255, dtype=torch.uint8))
    torch.testing.assert_close(white, torch.full((2, 1, 32, 32), (1 - 0.1307) / 0.3081))


@pytest.mark.parametrize(
    ("given", "message"), [([], "pass --data DIR"), (["--data", "none"], "none is not a folder")]
)
def test_a_missing_data_folder_is_answered_with_what_to_pass_or_set(
    given: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv("FXSVD_DATA", raising=False)
    with pytest.raises(SystemExit):
        data.parse(argparse.ArgumentParser(), given)
    assert message in capsys.readouterr().err
    monkeypatch.setenv("FXSVD_DATA", str(REPRODUCE))
    assert data.parse(argparse.ArgumentParser(), []).data == REPRODUCE


@pytest.mark.parametrize(
    ("model", "shape", "published"),
    [
        (networks.lenet_300_100(), (1, 28, 28), 266_610),
        (networks.lenet_5_caffe(), (1, 28, 28), 431_080),
        (networks.cifar_resnet(20), (3, 32, 32), 269_722),
        (networks.cifar_resnet(56), (3, 32, 32), 853_018),
    ],
)
def test_a_network_has_its_published_size_and_ten_outputs(
    model: nn.Module, shape: tuple[int, ...], published: int
) -> None:
    assert sum(parameter.numel() for parameter in model.parameters()) == published
    assert model(torch.zeros(2, *shape)).shape == (2, 10)


def test_a_depth_that_no_cifar_resnet_has_is_refused() -> None:
    with pytest.raises(ValueError, match="6n \\+ 2 layers, as 20 or 56, not 18"):
        networks.cifar_resnet(18)


@pytest.mark.parametrize("channels_in", [1, 3])
def test_the_classifier_of_vgg11_has_its_published_size(channels_in: int) -> None:
    with torch.device("meta"):  # half a gigabyte otherwise
        model = networks.vgg11(channels_in)
    assert sum(p.numel() for p in model.classifier.parameters()) == 119_586_826
    assert model(torch.empty(2, channels_in, 32, 32, device="meta")).shape == (2, 10)


def test_an_untrained_network_is_answered_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape("train.py lenet_5-mnist --work")):
        networks.load_trained(tmp_path, "lenet_5-mnist")


def test_accuracy_and_agreement_count_every_image_once_and_keep_the_mode() -> None:
    model, other = nn.Sequential(nn.Flatten(), nn.Dropout(0.9)), nn.Flatten()
    images = torch.eye(4)[[0, 1, 2, 3, 3]]
    labels = torch.tensor([0, 1, 2, 0, 0])
    assert networks.accuracy(model, images, labels, batch=2) == 3 / 5
    assert networks.agreement(model, other, images, batch=3) == 1
    assert model.training


TINY = train.Recipe("mnist", data.MNIST, 3, 16, 1e-2, 0.5, 1e-4, flip=True, bfloat16=False)


def trained(recipe: object, checkpoint: Path, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.Dropout(), nn.Linear(8, 10))
    images = (torch.arange(40 * 784) * 7919 % 256).byte().view(40, 1, 28, 28)
    train.fit(model, recipe, images, torch.arange(40) % 10, checkpoint)
    return model.state_dict()


def test_an_interrupted_training_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole = trained(TINY, tmp_path / "whole.pt", seed=0)
    trained(dataclasses.replace(TINY, epochs=1), tmp_path / "parts.pt", seed=0)
    resumed = trained(TINY, tmp_path / "parts.pt", seed=1)  # starts elsewhere: reads the checkpoint
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_every_trained_network_has_a_recipe() -> None:
    assert train.RECIPES.keys() == networks.TRAINED.keys()


def real_data() -> Path:
    folder = os.environ.get("FXSVD_DATA")
    if folder is None:
        pytest.skip("FXSVD_DATA does not name the data folder of examples/reproduce/data.py")
    return Path(folder)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_the_real_images_have_the_mean_and_deviation_they_are_prepared_with(name: str) -> None:
    images, labels = data.load(name, real_data(), Path(), True)
    found = images.double() / 255
    prepare = {"mnist": data.MNIST, "fashion_mnist": data.FASHION_MNIST}[name]
    assert round(found.mean().item(), 4) == prepare.mean[0]
    assert round(found.std().item(), 4) == prepare.std[0]
    assert labels.bincount().numel() == 10


# Decoders and matrix products differ in the last bit: a few undecided images may change sides.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "right"), [("resnet20", 8103), ("resnet56", 8320), ("resnet56_jpeg", 8981)]
)
def test_the_cifar_resnets_keep_their_accuracy(name: str, right: int, tmp_path: Path) -> None:
    images, labels = data.cifar10_jpeg(real_data(), tmp_path, train=False)
    model = networks.load_cifar_resnet(real_data(), name)
    assert abs(networks.accuracy(model, data.CIFAR10(images), labels) * 10_000 - right) < 5


@pytest.mark.slow
def test_mobilenet_v2_recognises_447_of_the_500_imagenet_images(tmp_path: Path) -> None:
    images, labels = data.imagenet_sample(real_data(), tmp_path)
    assert labels.unique().numel() == len(images) == 500
    model = networks.load_mobilenet_v2(real_data())
    assert abs(networks.accuracy(model, data.MOBILENET_V2(images), labels, 50) * 500 - 447) < 3
