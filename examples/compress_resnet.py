"""Compress a ResNet: plan, compile, fine-tune, export, and make the same network again elsewhere.

Needs torchvision and the onnx extra: pip install 'fxsvd[onnx,torchvision]'
"""

from pathlib import Path

import torch
import torchvision
from torch.nn import functional as F

import fxsvd
from fxsvd.passes import Prune


def main() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None)  # weights="DEFAULT" downloads trained ones
    images = torch.randn(2, 3, 64, 64)

    # Late stages lose more than early ones; what no pattern matches keeps its width.
    ratio = {"layer1": 0.25, "layer2": 0.5, "layer3": 0.5, "layer4": 0.75}
    small = fxsvd.compile(
        model, images, passes=[Prune(ratio=ratio, criterion="l1")], round_to=8, progress=print
    )
    print(small.report)

    # The result is an ordinary module: it trains, and its parameters have their old names.
    optimizer = torch.optim.SGD(small.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(small(images), torch.tensor([1, 2])).backward()
        optimizer.step()

    difference = fxsvd.export_onnx(small, "resnet18-small.onnx", images)
    print(f"the ONNX file equals the network to {difference:.0e}")

    # A plan and a state dict are all that another process needs.
    Path("plan.json").write_text(small.report.plan.to_json())
    torch.save(small.state_dict(), "weights.pt")
    plan = fxsvd.Plan.from_json(Path("plan.json").read_text())
    again = fxsvd.apply(torchvision.models.resnet18(weights=None), plan)
    again.load_state_dict(torch.load("weights.pt", weights_only=True))
    print("made again, equal:", torch.equal(again.eval()(images), small.eval()(images)))


if __name__ == "__main__":
    main()
