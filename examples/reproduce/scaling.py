"""How the cost of narrowing grows with the network: CPU seconds for 10, 100 and 1000 blocks.

Two networks of small layers, so that the number of graph nodes is what counts: residual blocks of
convolutions, and transformer blocks. For every stage the table gives CPU microseconds per graph
node, and the exponent p of seconds ∝ nodes^p between the two largest sizes (1 is linear).

    python examples/reproduce/scaling.py [--blocks 10 100 1000] [--runs 2]
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxsvd
from fxsvd.dependency import analyze
from fxsvd.passes import Prune
from fxsvd.rewrite import rewrite

Build = Callable[[int], tuple[nn.Module, Tensor]]
Result = TypeVar("Result")
STAGES = ("capture", "analyse", "plan", "rewrite")
LIMIT = 1.1


class Residual(nn.Module):
    """conv, norm, relu, conv, norm, and a skip around them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        inside = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(inside)))


class Transformer(nn.Module):
    """Attention over packed heads and a two-layer perceptron, each behind a norm and in a skip."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        packed = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.proj(seen.reshape(batch, length, -1))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def residual(blocks: int) -> tuple[nn.Module, Tensor]:
    """A network of residual blocks, and an input."""
    body = [Residual(8) for _ in range(blocks)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    return nn.Sequential(nn.Conv2d(3, 8, 3), *body, *head).eval(), torch.zeros(1, 3, 16, 16)


def transformer(blocks: int) -> tuple[nn.Module, Tensor]:
    """A network of transformer blocks, and an input."""
    body = [Transformer(8) for _ in range(blocks)]
    return nn.Sequential(nn.Linear(4, 8), *body, nn.Linear(8, 4)).eval(), torch.zeros(1, 5, 4)


NETWORKS: dict[str, Build] = {"residual": residual, "transformer": transformer}


def seconds_of(model: nn.Module, example: Tensor) -> tuple[dict[str, float], int]:
    """CPU seconds by stage, and the number of graph nodes."""
    spent: dict[str, float] = {}
    graph = _timed(spent, "capture", lambda: fxsvd.capture(model, example, check=False))
    deps = _timed(spent, "analyse", lambda: analyze(graph))
    plan = _timed(spent, "plan", lambda: Prune(ratio=0.5).propose(deps))
    small = _timed(spent, "rewrite", lambda: rewrite(deps, plan))
    _require_narrowed(graph, small)
    return spent, len(graph.graph.nodes)


def _timed(spent: dict[str, float], stage: str, work: Callable[[], Result]) -> Result:
    gc.collect()
    start = time.process_time()
    result = work()
    spent[stage] = time.process_time() - start
    return result


def _require_narrowed(graph: fx.GraphModule, small: fx.GraphModule) -> None:
    before, after = (sum(p.numel() for p in m.parameters()) for m in (graph, small))
    assert after < 0.5 * before, "half of every space should be gone"


def measure(build: Build, blocks: int, runs: int) -> list[float]:
    """Nodes, then the least CPU seconds of every stage."""
    model, example = build(blocks)
    found = []
    for done in range(runs):
        print(f"\r{blocks} blocks: run {done + 1} of {runs} ", end="", file=sys.stderr, flush=True)
        found.append(seconds_of(model, example))
    print(file=sys.stderr)
    return [found[0][1], *(min(seconds[stage] for seconds, _ in found) for stage in STAGES)]


def exponents(small: list[float], large: list[float]) -> list[float]:
    """The p in seconds ∝ nodes^p between two sizes: of every stage, and of the sum."""
    ratio = math.log(large[0] / small[0])
    pairs = [*zip(small[1:], large[1:], strict=True), (sum(small[1:]), sum(large[1:]))]
    return [math.log(after / before) / ratio for before, after in pairs]


def table(name: str, sizes: list[int], runs: int) -> bool:
    """Prints one network's table; whether growth stays below the limit."""
    print(f"\n{name}: CPU µs per node\n\n| blocks | nodes | {' | '.join(STAGES)} | all | seconds |")
    print(f"|---:|---:|{'---:|' * (len(STAGES) + 2)}")
    rows = []
    for blocks in sizes:
        nodes, *spent = row = measure(NETWORKS[name], blocks, runs)
        rows.append(row)
        each = " | ".join(f"{1e6 * s / nodes:.0f}" for s in (*spent, sum(spent)))
        print(f"| {blocks} | {nodes:.0f} | {each} | {sum(spent):.2f} |", flush=True)
    if len(rows) < 2:
        return True
    powers = exponents(*rows[-2:])
    print(f"| exponent | | {' | '.join(f'{p:.2f}' for p in powers)} | |")
    return powers[-1] <= LIMIT


def main() -> None:
    """Measures and prints; fails where growth is not linear."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--runs", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seconds_of(*residual(1))  # imports and caches of the first use
    linear = [table(name, sorted(options.blocks), options.runs) for name in options.networks]
    if not all(linear):
        raise SystemExit(f"the sum grows faster than nodes^{LIMIT}")


if __name__ == "__main__":
    main()
