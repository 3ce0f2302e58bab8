"""What capturing, analysing and planning a network of a billion parameters adds to the process.

The networks stand on the meta device: they have shapes and no numbers. Each is measured in a
process of its own, from the resident memory after `import torch` to the highest resident memory
when the plan is made (so the imports of fxsvd count). The plan draws channels at random: a
criterion that measures weights has none to measure, and says so.

    python examples/reproduce/memory.py [--networks decoder convolutions]
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

LIMIT_MB = 300
NETWORKS = ("decoder", "convolutions")


# ---------------------------------------------------------------- networks


def decoder() -> tuple[nn.Module, Tensor]:
    """A language model: rotary positions, grouped queries, SwiGLU, RMS norms; 1.1 G parameters."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    width, heads, shared, head, inner, vocabulary, length = 2048, 32, 8, 64, 8192, 32000, 128

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(width, heads * head, bias=False)
            self.k = nn.Linear(width, shared * head, bias=False)
            self.v = nn.Linear(width, shared * head, bias=False)
            self.out = nn.Linear(heads * head, width, bias=False)
            self.register_buffer("cos", torch.ones(length, head))
            self.register_buffer("sin", torch.zeros(length, head))

        def rotated(self, x: Tensor) -> Tensor:
            left, right = x.chunk(2, dim=-1)
            return x * self.cos + torch.cat([-right, left], dim=-1) * self.sin

        def forward(self, x: Tensor) -> Tensor:
            batch = x.shape[0]
            q = self.rotated(self.q(x).view(batch, length, heads, head).transpose(1, 2))
            k = self.rotated(self.k(x).view(batch, length, shared, head).transpose(1, 2))
            v = self.v(x).view(batch, length, shared, head).transpose(1, 2)
            k, v = (t.repeat_interleave(heads // shared, dim=1) for t in (k, v))
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.out(seen.transpose(1, 2).reshape(batch, length, -1))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
            self.attention = Attention()
            self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
            self.down = nn.Linear(inner, width, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(self.norm1(x))
            y = self.norm2(x)
            return x + self.down(F.silu(self.gate(y)) * self.up(y))

    with torch.device("meta"):
        body = [Block() for _ in range(16)]
        head_of_words = nn.Linear(width, vocabulary, bias=False)
        net = nn.Sequential(
            nn.Embedding(vocabulary, width), *body, nn.RMSNorm(width), head_of_words
        )
        return net.eval(), torch.zeros(1, length, dtype=torch.int64)


def convolutions() -> tuple[nn.Module, Tensor]:
    """A wide residual network; 1.1 G parameters."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    width = 2048

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
            self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))

    with torch.device("meta"):
        body = [Block() for _ in range(14)]
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000)]
        net = nn.Sequential(nn.Conv2d(3, width, 7, stride=4), *body, *head)
        return net.eval(), torch.zeros(1, 3, 224, 224)


# ---------------------------------------------------------------- measuring


def resident_mb(field: str) -> float:
    """``VmRSS`` (now) or ``VmHWM`` (the highest so far) of this process, in MB."""
    status = Path("/proc/self/status")
    if not status.exists():  # no Linux: only the highest so far is to be had
        scale = 1e-6 if sys.platform == "darwin" else 1e-3
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    lines = status.read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(field))


def measure(name: str) -> str:
    """A line of the table, measured in this process."""
    import torch

    torch.set_num_threads(1)
    before = resident_mb("VmRSS")
    import fxsvd
    from fxsvd.dependency import analyze
    from fxsvd.passes import Prune

    imported = resident_mb("VmHWM")
    model, example = globals()[name]()
    graph = fxsvd.capture(model, example)
    captured = resident_mb("VmHWM")
    deps = analyze(graph)
    plan = Prune(ratio=0.5, criterion="random").propose(deps)
    peak = resident_mb("VmHWM")
    try:
        Prune(ratio=0.5, criterion="l2").propose(deps)
    except fxsvd.PlanError as error:
        print(f"l2: {error}", file=sys.stderr)
    parameters = sum(p.numel() for p in model.parameters())
    nodes, edits = len(graph.graph.nodes), len(plan.edits)
    parts = (imported, captured, peak)
    columns = (
        f"{parameters / 1e9:.2f} G",
        nodes,
        edits,
        *(f"{part - before:.0f}" for part in parts),
    )
    return f"| {name} | {' | '.join(map(str, columns))} |"


def main() -> None:
    """Measures each network in a process of its own; fails above the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--here", choices=NETWORKS, help="measure in this process")
    options = parser.parse_args()
    if options.here:
        print(measure(options.here))
        return
    print("MB added since `import torch`, highest so far\n")
    print("| network | parameters | nodes | narrowed spaces | imports | + capture | + plan |")
    print(f"|---|{'---:|' * 6}")
    worst = 0.0
    for name in options.networks:
        command = [sys.executable, __file__, "--here", name]
        line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
        print(line, flush=True)
        worst = max(worst, float(line.split("|")[-2]))
    if worst > LIMIT_MB:
        raise SystemExit(f"{worst:.0f} MB is more than {LIMIT_MB} MB")


if __name__ == "__main__":
    main()
