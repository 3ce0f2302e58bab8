"""Compress a transformer: embeddings, attention heads and feed-forward layers together.

The width of the residual stream is one space: the embedding, the positions, every projection and
norm that touches it lose the same channels. Each head keeps as many features as the others, chosen
head by head.
"""

import torch
from torch import Tensor, nn

import fxsvd
from fxsvd.passes import Prune

VOCABULARY, LENGTH, WIDTH = 100, 16, 64


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(torch.randn(LENGTH, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, nhead=4, dim_feedforward=256, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(tokens) + self.positions).mean(1))


def main() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (2, LENGTH))
    small = fxsvd.compile(Classifier(), tokens, passes=[Prune(ratio=0.5)])
    print(small.report)

    # The feed-forward layers alone: the residual stream keeps its width.
    plan = fxsvd.plan(Classifier(), tokens, passes=[Prune(ratio=0.75, only=("*.linear1",))])
    print(plan)
    thinner = fxsvd.apply(Classifier(), plan)
    print("logits of another batch:", tuple(thinner(torch.randint(VOCABULARY, (7, LENGTH))).shape))


if __name__ == "__main__":
    main()
