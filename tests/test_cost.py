"""Costs against PyTorch's own counters: its FLOP counter, and its allocator under the profiler."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from fxsvd import cost
from fxsvd.capture import capture

IMAGE = (3, 224, 224)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(
            32, 4, batch_first=True, kdim=16, vdim=24, add_bias_kv=True, add_zero_attn=True
        )

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        return self.attend(query, key, value)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 7, 2, bidirectional=True, batch_first=True, proj_size=3)
        self.gru = nn.GRU(6, 4, batch_first=True)
        self.cell = nn.RNNCell(4, 9)

    def forward(self, x: Tensor) -> Tensor:
        sequence: Tensor = self.gru(self.lstm(x)[0])[0]
        return self.cell(sequence[:, -1])


class Products(nn.Module):
    """Every way to write a product of matrices."""

    def forward(self, x: Tensor) -> Tensor:
        turned = x.transpose(1, 2)
        square = torch.einsum("bij,bkj->bik", x, x) + x @ turned + x.bmm(turned)
        square = torch.baddbmm(square, x, turned) + square.baddbmm(x, turned)
        square = square + torch.matmul(input=x, other=turned)
        mixed = F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None, :, :3])
        tall = torch.addmm(mixed.flatten(0, 2), x.flatten(0, 1), x.new_ones(5, 3))
        return F.linear(square @ tall.unflatten(0, (-1, 6)), x.new_ones(2, 3))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(8, 12, 3, groups=4, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(12, 6, 4, stride=2, groups=3, output_padding=1)
        self.wide = nn.Conv1d(6, 5, 3, dilation=2)
        self.solid = nn.ConvTranspose3d(1, 2, 2)
        self.weight = nn.Parameter(torch.randn(4, 8, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        up = self.up(self.grouped(x))
        return self.wide(up.flatten(2)), self.solid(up[:, None]), F.conv2d(x, self.weight)


SMALL: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]]]] = {
    "attention": (Attention, [(6, 32), (9, 16), (9, 24)]),
    "recurrent": (Recurrent, [(6, 5)]),
    "products": (Products, [(6, 5)]),
    "convolutions": (Convolutions, [(8, 7, 9)]),
    "encoder": (lambda: nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), [(5, 16)]),
}
TORCHVISION = (
    "resnet50",
    "vit_b_16",
    "swin_t",
    "convnext_tiny",
    "efficientnet_b0",
    "densenet121",
    "deeplabv3_resnet50",
)


def meta(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False).to("meta")


def zeros(shapes: list[tuple[int, ...]], batch: int) -> tuple[Tensor, ...]:
    return tuple(torch.zeros(batch, *shape, device="meta") for shape in shapes)


def counted_by_torch(module: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    with FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops() / 2


def assert_agrees(module: nn.Module, shapes: list[tuple[int, ...]]) -> None:
    graph = capture(module, zeros(shapes, 2))
    for batch in (1, 3):
        assert cost.macs(graph, batch) == counted_by_torch(module, zeros(shapes, batch)) > 0


@pytest.mark.parametrize("name", SMALL)
def test_macs_equal_the_flop_counter(name: str) -> None:
    build, shapes = SMALL[name]
    assert_agrees(meta(build()), shapes)


@pytest.mark.parametrize("name", TORCHVISION)
def test_macs_equal_the_flop_counter_on_torchvision(name: str) -> None:
    torchvision = pytest.importorskip("torchvision", reason="needs the torchvision extra")
    offline = {"weights_backbone": None} if "deeplab" in name else {}
    assert_agrees(meta(torchvision.models.get_model(name, weights=None, **offline)), [IMAGE])


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "beit_base_patch16_224", "levit_128"])
def test_macs_equal_the_flop_counter_on_timm(name: str) -> None:
    pytest.importorskip("torchvision", reason="timm needs torchvision")
    timm = pytest.importorskip("timm", reason="needs the timm extra")
    assert_agrees(meta(timm.create_model(name)), [IMAGE])


def test_macs_by_node_names_the_layers_that_cost() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 5))
    by_node = cost.macs_by_node(capture(net, torch.zeros(2, 1, 4, 4)))
    assert {node.target: count for node, count in by_node.items()} == {"0": 72, "3": 40}


def test_parameters_and_bytes_count_shared_tensors_once() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)).double()
    net[1].weight = net[0].weight
    assert cost.parameters(net) == 16 + 4 + 4 + 8
    assert cost.bytes_of(net) == 8 * (32 + 8) + 8


def test_cost_reads_as_one_line() -> None:
    line = str(cost.Cost(25_557_032, 4_089_184_256, 102_441_480, 9_633_792))
    assert line == "25.6 M parameters · 4.09 G MACs · 102 MB weights · 9.63 MB activations"


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 512), nn.Linear(512, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


class Views(nn.Module):
    """Views keep their base alive; results in place need no memory."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.repeat(1, 8)
        left, right = wide.view(-1, 8, 64).chunk(2, dim=1)
        total = left.exp().sqrt_().neg_()
        total += right
        return total.transpose(1, 2).reshape(-1, 256)


MEMORY: dict[str, Callable[[], nn.Module]] = {
    "chain": lambda: nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 32), nn.Tanh()),
    "in place": lambda: nn.Sequential(nn.Linear(64, 256), nn.ReLU(inplace=True), nn.Tanh()),
    "residual": Residual,
    "views": Views,
}


def allocated_peak(graph: fx.GraphModule, x: Tensor) -> int:
    """The most bytes that PyTorch's allocator had given out during a forward pass."""
    with torch.no_grad():
        graph(x)
        with profile(profile_memory=True) as profiled:
            output = graph(x)
    events = profiled.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    assert output.numel()  # alive until here
    return max(accumulate(changes))


@pytest.mark.parametrize("name", MEMORY)
def test_peak_activations_equal_what_the_allocator_gives_out(name: str) -> None:
    x = torch.randn(48, 64)
    graph = capture(MEMORY[name]().eval(), x)
    measured = allocated_peak(graph, x) + x.nbytes
    assert cost.peak_activation_bytes(graph, batch=48) == measured


def test_peak_activations_leave_weights_out_and_the_mode_alone() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(1000, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table.view(4, 1000)[:, 0]

    graph = capture(nn.Sequential(Positions(), nn.Dropout()).train(), torch.zeros(2, 4))
    assert cost.peak_activation_bytes(graph) == 2 * 16  # x and the sum
    assert all(module.training for module in graph.modules())


def test_latency_tells_a_wide_layer_from_a_narrow_one_and_restores_the_mode() -> None:
    wide, narrow = nn.Linear(1024, 4096), nn.Linear(1024, 4)
    slow, fast = cost.latencies([wide, narrow], torch.zeros(64, 1024), runs=9)
    assert slow > 2 * fast > 0
    assert wide.training
    assert narrow.training


def test_latency_takes_tuples_and_dicts_without_touching_batch_norm() -> None:
    net = nn.BatchNorm1d(3)
    assert cost.latency(net, (torch.randn(8, 3),), runs=2) > 0
    assert cost.latency(net, {"input": torch.randn(8, 3)}, runs=2) > 0
    assert net.num_batches_tracked == 0
