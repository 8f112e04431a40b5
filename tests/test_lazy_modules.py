"""Modules whose parameters get their shapes in the first call: that one is an ordinary call, and the next is recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import graphs
from graphs.dispatch.call_log import NotReplayed

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.LazyLinear(4), (2, 3)),
    "norm": (lambda: nn.LazyBatchNorm1d().eval(), (4, 3)),
    "inside": (lambda: nn.Sequential(nn.LazyConv1d(4, 1), nn.ReLU(), nn.LazyLinear(2)), (2, 3, 5)),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("name", MODELS)
def test_the_call_that_initialises_is_eager_and_the_next_one_recorded(name: str, grad: Any, strict: bool) -> None:
    make, shape = MODELS[name]
    model = make()
    step = graphs.capture(model, strict=strict)
    with grad():
        for _ in range(3):
            x = torch.randn(*shape)
            assert torch.allclose(step(x), model(x))
    report = step.report()
    assert (report.recordings, report.replays, report.eager_calls) == (1, 2, 1)
    (refusal,) = report.refusals
    assert refusal.reason == "changing-value" and refusal.operator.endswith("weight") and refusal.count == 1


def test_a_lazy_module_that_a_function_closes_over() -> None:
    layer = nn.LazyLinear(4)
    step = graphs.capture(lambda x: layer(x) * 2)
    with torch.no_grad(), pytest.warns(NotReplayed, match="unwatchable"):
        for _ in range(3):
            x = torch.randn(2, 3)
            assert torch.equal(step(x), layer(x) * 2)
    assert (step.report().replays, step.report().eager_calls) == (2, 1)
