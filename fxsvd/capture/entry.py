"""The capture function: two runs, merged into one graph, assembled and checked."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from fxsvd.capture.assemble import assemble
from fxsvd.capture.check import check_graph
from fxsvd.capture.fakes import Fakes
from fxsvd.capture.inputs import device_of, normalize_inputs
from fxsvd.capture.modes import merge_train_mode
from fxsvd.capture.run import trace
from fxsvd.capture.switch import Switch


def capture(model: nn.Module, example_inputs: Any, *, check: bool = True) -> fx.GraphModule:
    """Captures a model as a graph of its layers and torch calls.

    The model is run on fake tensors: no memory is used, and nothing of the model is changed.
    Layers and parameters are shared with the model, not copied. Each node has `meta["val"]`, the
    fake result (the batch size being a symbol, see `concrete`), and `meta["scope"]`, the dotted
    path of the module it was called in.

    Where train mode only changes constants (a functional dropout), `Switch` modules select them.
    Where it changes the structure, the graph holds eval mode, `meta["train_graph"]` of the result
    says why, and `train()` raises.

    Args:
        model: Any module; its parameters may be on the meta device.
        example_inputs: A tensor, a tuple or list (arguments) or a mapping (keyword arguments).
            Dimension 0 of the first tensor is the batch, and so is that of each tensor of the same
            size there; all else is fixed. Inputs that are not tensors are fixed at the value given.
        check: Whether to compare the graph with the model at another batch size.

    Returns:
        The graph module, in the mode of the model where it can be.

    Raises:
        CaptureError: If the model cannot be captured, or differs from its graph.

    Example:
        >>> import torch
        >>> graph = capture(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.ones(2, 3))
        >>> [node.name for node in graph.graph.nodes]
        ['input_1', '_0', '_1', 'output']
    """
    args, kwargs = normalize_inputs(example_inputs)
    device = device_of(model, (args, kwargs))
    fakes = Fakes(device)
    evaluated = trace(model, fakes, args, kwargs, training=False)
    fakes.ensure_dynamic()
    switches: dict[str, Switch] = {}
    reason = None
    if evaluated.reads_training:
        reason, switches = merge_train_mode(model, fakes, args, kwargs, evaluated.graph)
    captured = assemble(model, evaluated, switches, reason)
    if check:
        check_graph(model, captured, args, kwargs)
    return captured
