"""Teach fxsvd a layer and an operator that it cannot look into.

Modules written in PyTorch need none of this: fxsvd sees the torch functions that they call. What
it needs to be told is how a custom operator (C++, CUDA, Triton) carries axes, and which attributes
of your own layers repeat a width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxsvd
from fxsvd.passes import Prune


@torch.library.custom_op("fxsvd_example::swish", mutates_args=())
def swish(x: Tensor, beta: Tensor) -> Tensor:
    """`x · sigmoid(beta · x)` for features `[B, C]` and one `beta` per feature."""
    return x * torch.sigmoid(beta * x)


@swish.register_fake
def _(x: Tensor, beta: Tensor) -> Tensor:
    return torch.empty_like(x)


class ChannelScale(nn.Module):
    """A factor per channel of images `[B, C, H, W]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.factor = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor[:, None, None]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.scale = ChannelScale(16)
        self.hidden = nn.Linear(16, 32)
        self.beta = nn.Parameter(torch.rand(32))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = self.scale(self.conv(x)).mean((2, 3))
        return self.head(swish(self.hidden(features), self.beta))


def main() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 16, 16)

    # Nothing is guessed: without a rule the channels stay, and the analysis says why.
    print(fxsvd.analyze(fxsvd.capture(Net(), images)))

    # A rule is given the operator's arguments, tensors replaced by their types. This one is
    # elementwise, and zero wherever one of its operands is.
    @fxsvd.register_rule(torch.ops.fxsvd_example.swish.default)
    def swish_rule(call, x, beta):
        return call.combine(x, beta, product=True)

    # A registered layer stays whole in the graph. Its row names a function that carries axes
    # likewise (as in `prelu`, the parameter has an entry per channel of dimension 1); `resize` is
    # given the shapes of input and output afterwards, and sets what repeats the width.
    def resize(layer, before, after):
        layer.width = after[1]

    fxsvd.register_layer(ChannelScale, op=F.prelu, operands=("factor",), resize=resize)

    small = fxsvd.compile(Net(), images, passes=[Prune(ratio=0.5)])
    print(small.report)
    print(f"scale: {small.scale.width} channels, beta: {len(small.beta)} features")


if __name__ == "__main__":
    main()
