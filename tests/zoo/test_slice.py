"""A slice of the zoo that covers every op family; ``tests.zoo.sweep`` is the whole."""

import pytest

from tests.zoo import models

pytestmark = pytest.mark.skipif(
    not models.installed(),
    reason="needs timm and torchvision: pip install 'fxsvd[timm,torchvision]'",
)

OUTPUT = "it is the network's output"

# What a network has that the others have not.
SLICE = {
    "torchvision:squeezenet1_1": "fire modules: cat of two branches; a convolution as classifier",
    "torchvision:resnet18": "residual stages with downsampling",
    "torchvision:shufflenet_v2_x0_5": "channel split and shuffle",
    "torchvision:mobilenet_v3_small": "inverted residuals, squeeze-and-excite, hard activations",
    "torchvision:regnet_x_400mf": "grouped convolutions",
    "torchvision:lraspp_mobilenet_v3_large": "segmentation: two scales, interpolation, a dict out",
    "timm:test_byobnet": "blocks of many kinds",
    "timm:test_resnet": "a deep stem, average pooling in the shortcut",
    "timm:test_efficientnet": "expansion with full convolutions",
    "timm:test_nfnet": "scaled weight standardisation through batch_norm, raw gains",
    "timm:test_convnext": "layer norm over channels-first, layer scale",
    "timm:test_mambaout": "gated convolutions: split and multiply",
    "timm:test_vit": "packed qkv, class token, position embedding",
    "timm:test_vit_relpos": "relative position bias from a small network",
    "timm:test_coatnet": "convolutions and windowed attention",
    "timm:starnet_s050": "products of two branches",
    "timm:dla46x_c": "aggregation trees",
    "timm:edgenext_xx_small": "cross-covariance attention, split by scale, a Fourier position code",
    "timm:mobilevit_xxs": "unfolding into patches and back",
    "timm:ese_vovnet19b_slim_dw": "cat of all layers of a stage",
    "timm:cs3darknet_focus_s": "space to depth, cross-stage partial blocks",
    "timm:dpn48b": "dual paths: slices, sums and cats",
    "timm:gmlp_ti16_224": "gates over positions",
    "timm:pit_ti_224": "depthwise convolutions with two outputs each, pooled class tokens",
    "timm:deit_tiny_patch16_224": "fused attention",
    "timm:poolformerv2_s12": "group norm over everything, StarReLU",
    "timm:efficientvit_b0": "linear attention in float32",
    "timm:hgnetv2_b0": "learnable affine blocks",
}

# Networks of which more than 0.40 of the parameters stay, and why.
EXCEPTIONS = {
    "torchvision:shufflenet_v2_x0_5": (0.45, OUTPUT),  # 1000 classes are 75 % of the parameters
    "timm:test_efficientnet": (0.44, OUTPUT),
    "timm:test_mambaout": (0.41, OUTPUT),
}


@pytest.mark.parametrize("name", SLICE)
def test_a_model_of_the_zoo_is_halved_and_verified(name: str) -> None:
    from tests.zoo.sweep import RATIO, examine

    row = examine(name)

    assert row.status in ("pruned", "accounted"), row.message
    assert row.error < 1e-8
    assert row.batches == "ok"
    limit, reason = EXCEPTIONS.get(name, (RATIO, ""))
    assert row.ratio <= limit, row.reasons
    assert reason in row.reasons
