"""What narrowing costs: CPU seconds of fxsvd and of torch-pruning on the same models, in one run.

Both prune every model by half, by the L2 norm over coupled tensors, at 224 pixels, on one thread.
fxsvd: capture (without its numerical check), analysis, plan and rewrite. torch-pruning: building
the pruner, which traces the dependency graph, and one step. Neither is charged for making the model
or for the deep copy that torch-pruning's changes in place ask for. The two take turns, so that a
busy machine slows both.

    pip install "fxsvd[timm,torchvision]" torch-pruning
    python examples/reproduce/cost.py [--models resnet50 densenet121] [--runs 5]
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import fxsvd
from fxsvd.dependency import analyze
from fxsvd.passes import Prune
from fxsvd.rewrite import rewrite

MODELS = {
    "resnet50": "torchvision:resnet50",
    "mobilenet_v3_large": "torchvision:mobilenet_v3_large",
    "densenet121": "torchvision:densenet121",
    "efficientnet_b0": "torchvision:efficientnet_b0",
    "convnext_tiny": "torchvision:convnext_tiny",
    "vit_base_patch16_224": "timm:vit_base_patch16_224",
    "swin_tiny": "timm:swin_tiny_patch4_window7_224",
}
STAGES = ("capture", "analyse", "plan", "rewrite")
Seconds = dict[str, float]


def build(name: str) -> nn.Module:
    """The model with random weights, in eval mode."""
    library, _, entry = MODELS[name].partition(":")
    torch.manual_seed(0)
    if library == "timm":
        import timm

        return timm.create_model(entry, pretrained=False).eval()
    import torchvision

    return torchvision.models.get_model(entry, weights=None).eval()


@contextmanager
def spent(into: Seconds, stage: str) -> Iterator[None]:
    """Adds the CPU seconds of the block, over all threads, under a stage's name."""
    gc.collect()
    start = time.process_time()
    yield
    into[stage] = into.get(stage, 0.0) + time.process_time() - start


def cost_of_fxsvd(model: nn.Module, image: Tensor) -> tuple[Seconds, nn.Module]:
    """CPU seconds by stage, and the result."""
    seconds: Seconds = {}
    with spent(seconds, "capture"):
        graph = fxsvd.capture(model, image, check=False)
    with spent(seconds, "analyse"):
        deps = analyze(graph)
    with spent(seconds, "plan"):
        plan = Prune(ratio=0.5).propose(deps)
    with spent(seconds, "rewrite"):
        small = rewrite(deps, plan)
    return seconds, small


# ---------------------------------------------------------------- torch-pruning


def heads_of(model: nn.Module) -> dict[nn.Module, int]:
    """What torch-pruning asks to be told: the number of heads of every packed qkv layer."""
    return {
        m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")
    }


def classifier_of(model: nn.Module) -> nn.Module:
    """The layer that makes the outputs: nobody narrows it."""
    return [m for m in model.modules() if isinstance(m, nn.Linear)][-1]


def follow_heads(model: nn.Module, heads: dict[nn.Module, int]) -> None:
    """What torch-pruning leaves to its user: the sizes that attention layers keep as attributes."""
    for m in model.modules():
        if hasattr(m, "qkv") and m.qkv in heads:
            m.num_heads = heads[m.qkv]
            width = m.qkv.out_features // 3
            m.head_dim = width // m.num_heads
            if hasattr(m, "attn_dim"):
                m.attn_dim = width


def cost_of_torch_pruning(tp: Any, model: nn.Module, image: Tensor) -> tuple[Seconds, nn.Module]:
    """CPU seconds by stage, and the model, pruned in place."""
    seconds: Seconds = {}
    with spent(seconds, "build"):
        pruner = tp.pruner.BasePruner(
            model,
            image,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=[classifier_of(model)],
            num_heads=heads_of(model),
            in_channel_groups={},  # its defaults are shared between all pruners of a process
            out_channel_groups={},
            prune_head_dims=True,
        )
    with spent(seconds, "prune"):
        pruner.step()
        follow_heads(model, pruner.num_heads)
    return seconds, model


# ---------------------------------------------------------------- measuring


def measured(
    run: Callable[[nn.Module, Tensor], tuple[Seconds, nn.Module]], model: nn.Module, image: Tensor
) -> tuple[Seconds, float, str]:
    """CPU seconds, the fraction of the parameters left, and what is wrong with the result."""
    fresh = copy.deepcopy(model)
    before = sum(p.numel() for p in fresh.parameters())
    try:
        seconds, small = run(fresh, image)
    except Exception as error:
        return {}, 1.0, f"fails: {_first_line(error)}"
    left = sum(p.numel() for p in small.parameters()) / before
    try:
        with torch.no_grad():
            small.eval()(image)
    except Exception as error:
        return seconds, left, f"the result does not run: {_first_line(error)}"
    return seconds, left, ""


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


class Series:
    """Repeated measurements of one tool on one model."""

    def __init__(self) -> None:
        self.runs: list[Seconds] = []
        self.left = 1.0
        self.problem = ""

    def add(self, seconds: Seconds, left: float, problem: str) -> None:
        self.runs.append(seconds)
        self.left, self.problem = left, problem

    def total(self, reduce: Callable[[list[float]], float]) -> float:
        return reduce([sum(run.values()) for run in self.runs])

    def stage(self, name: str) -> float:
        return min(run.get(name, 0.0) for run in self.runs)


def compare(name: str, runs: int, tp: Any) -> tuple[Series, Series]:
    """The two tools in turn, each on fresh copies of one model."""
    model, image = build(name), torch.randn(1, 3, 224, 224)
    ours, theirs = Series(), Series()
    for done in range(runs):
        print(f"\r{name}: run {done + 1} of {runs} ", end="", file=sys.stderr, flush=True)
        ours.add(*measured(cost_of_fxsvd, model, image))
        if tp is not None:
            theirs.add(*measured(lambda m, x: cost_of_torch_pruning(tp, m, x), model, image))
    print(file=sys.stderr)
    return ours, theirs


def row(name: str, ours: Series, theirs: Series) -> tuple[str, tuple[float, float] | None]:
    """A line of the table, and the two ratios (of minima, of medians) where both tools succeed."""
    stages = " | ".join(f"{ours.stage(stage):.2f}" for stage in STAGES)
    low, middle = ours.total(min), ours.total(statistics.median)
    line = f"| {name} | {stages} | {low:.2f} / {middle:.2f} | {ours.left:.2f} |"
    if not theirs.runs:
        return f"{line} | | |", None
    if theirs.problem:
        return f"{line} {theirs.problem[:120]} | | |", None
    other_low, other_middle = theirs.total(min), theirs.total(statistics.median)
    ratios = low / other_low, middle / other_middle
    times = f"{other_low:.2f} / {other_middle:.2f} | {theirs.left:.2f}"
    return f"{line} {times} | {ratios[0]:.2f} / {ratios[1]:.2f} |", ratios


HEADER = (
    f"| model | {' | '.join(STAGES)} | fxsvd | left | torch-pruning | left | ratio |\n"
    f"|---|{'---:|' * (len(STAGES) + 5)}"
)


def torch_pruning() -> Any:
    """The rival, or None with a word on how to get it."""
    try:
        import torch_pruning
    except ImportError:
        print("torch-pruning is not installed (pip install torch-pruning): fxsvd alone is measured")
        return None
    return torch_pruning


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tp = torch_pruning()
    print("CPU seconds on one thread, minimum / median of", options.runs, "runs; stages: minimum")
    print(HEADER)
    ratios = []
    for name in options.models:
        line, pair = row(name, *compare(name, options.runs, tp))
        print(line, flush=True)
        ratios += [pair] if pair else []
    if ratios:
        lows, middles = zip(*ratios, strict=True)
        means = statistics.geometric_mean(lows), statistics.geometric_mean(middles)
        print(f"\ngeometric mean of {len(ratios)} ratios: {means[0]:.2f} / {means[1]:.2f}")


if __name__ == "__main__":
    main()
