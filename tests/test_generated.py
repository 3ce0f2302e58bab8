"""Five hundred generated networks through prune and verify: never wrong, never pruned too much."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import fx, nn

import fxsvd
from fxsvd.dependency import Dependencies
from fxsvd.passes import Prune
from tests.helpers.generated import ANY, ATTENTIVE, CONVOLUTIONAL, MOVING, Maker, networks

FIXED = settings(
    max_examples=125,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
RATIOS = st.sampled_from([0.25, 0.3, 0.5, 0.7, 0.9])
OPTIONS = st.fixed_dictionaries(
    {
        "ratio": RATIOS,
        "criterion": st.sampled_from(["l1", "l2", "bn", "random"]),
        "round_to": st.sampled_from([1, 1, 2, 4]),
        "scope": st.sampled_from(["local", "local", "global"]),
    }
)


def inputs() -> torch.Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def check(network: nn.Module, options: dict[str, Any]) -> None:
    """Compile (which verifies), and look at the result from outside."""
    network.train()
    before = copy.deepcopy(network.state_dict())
    small = fxsvd.compile(network, inputs(), passes=[Prune(**options)])
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert_survivors_are_untouched(small, before)
    deps = fxsvd.analyze(fxsvd.capture(network, inputs()))
    widths = {row.name: (row.before, row.after) for row in small.report.spaces}
    assert widths.keys() == {space.name for space in deps.spaces}
    assert all(row.why for row in small.report.spaces if row.before == row.after)
    if options["scope"] == "local":
        assert_loses_its_ratio(deps, widths, options)
    assert small(inputs()[:1].repeat(5, 1, 1, 1)).shape == (5, 3)


def assert_survivors_are_untouched(small: fx.GraphModule, before: dict[str, torch.Tensor]) -> None:
    """Under its name each tensor holds some of its values, in their order."""
    after = small.state_dict()
    assert after.keys() == before.keys()
    for name, value in after.items():
        if not value.is_floating_point():
            continue  # index buffers are renumbered
        old, new = before[name].numpy().ravel(), value.numpy().ravel()
        assert np.isin(new, old).all()
        if len(old) > 1:
            order = np.argsort(old)
            places = order[np.searchsorted(old[order], new)]
            assert (np.diff(places) > 0).all()


def assert_loses_its_ratio(
    deps: Dependencies, widths: dict[str, tuple[int, int]], options: dict[str, Any]
) -> None:
    """To half a step of its group; frozen spaces nothing; rounded ones up to a multiple."""
    ratio, multiple = options["ratio"], options["round_to"]
    step = {int(deps.space_of[c]): g.steps for g in deps.groups for c in g.channels.tolist()}
    for number, space in enumerate(deps.spaces):
        width, left = widths[space.name]
        lost = (width - left) / width
        if space.frozen:
            assert left == width
        elif multiple > 1:
            assert left == width or left % multiple == 0
            assert lost <= ratio + 0.5 / step[number]
        else:
            most = (step[number] - 1) / step[number]
            assert abs(lost - min(ratio, most)) <= 0.5 / step[number] + 1e-9


FAMILIES: dict[str, Sequence[Maker]] = {
    "convolutional": CONVOLUTIONAL,
    "moving": MOVING,
    "attentive": ATTENTIVE,
    "any": ANY,
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_generated_networks(family: str) -> None:
    @FIXED
    @given(networks(FAMILIES[family]), OPTIONS)
    def run(network: nn.Module, options: dict[str, Any]) -> None:
        check(network, options)

    run()
