"""Puts a captured module together: the model's tree of modules, with the graph as forward."""

from __future__ import annotations

import copy

from torch import fx, nn

from fxsvd.capture.idioms import name_shuffles
from fxsvd.capture.leaves import is_leaf
from fxsvd.capture.module import TRAIN_GRAPH, CapturedModule
from fxsvd.capture.record import Recorder
from fxsvd.capture.switch import Switch


def assemble(
    model: nn.Module, recorder: Recorder, switches: dict[str, Switch], reason: str | None
) -> CapturedModule:
    """Builds the result: the model's tree of modules, with the graph as its forward."""
    captured = CapturedModule(nn.Module(), fx.Graph(), type(model).__name__)
    frozen = reason is not None and any(module.training for module in model.modules())
    shells = _Shells(eval_mode=frozen)
    shells.fill(captured, model)
    for name, constant in recorder.constants.items():
        captured.register_buffer(name, constant.detach(), persistent=False)
    for name, added in {**recorder.functions, **switches}.items():
        added.training = captured.training
        captured._modules[name] = added
    if reason is not None:
        captured.meta[TRAIN_GRAPH] = reason
    name_shuffles(recorder.graph)
    captured.graph = recorder.graph
    return captured


class _Shells:
    """Mirrors a tree of modules: leaves are the originals, all else plain modules with the same."""

    def __init__(self, *, eval_mode: bool) -> None:
        self._eval_mode = eval_mode
        self._made: dict[int, nn.Module] = {}

    def fill(self, shell: nn.Module, module: nn.Module) -> None:
        """Gives a shell the parameters, buffers, children and mode of a module."""
        shell._parameters.update(module._parameters)
        shell._buffers.update(module._buffers)
        shell._non_persistent_buffers_set |= module._non_persistent_buffers_set
        shell.training = module.training and not self._eval_mode
        for name, child in module._modules.items():
            shell._modules[name] = None if child is None else self._mirror(child)

    def _mirror(self, module: nn.Module) -> nn.Module:
        if id(module) not in self._made:
            if not is_leaf(module):
                shell = self._made[id(module)] = nn.Module()
                self.fill(shell, module)
            elif self._eval_mode:
                self._made[id(module)] = self._leaf_in_eval_mode(module)
            else:
                self._made[id(module)] = module
        return self._made[id(module)]

    def _leaf_in_eval_mode(self, module: nn.Module) -> nn.Module:
        # The model is in a mode its graph cannot follow, and must not be changed: the graph gets
        # leaves of its own, with the same parameters.
        leaf = copy.copy(module)
        for name in ("_parameters", "_buffers", "_modules"):
            vars(leaf)[name] = dict(vars(leaf)[name])
        leaf._modules = {
            name: child and self._mirror(child) for name, child in leaf._modules.items()
        }
        leaf.training = False
        return leaf
