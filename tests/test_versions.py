"""Replays tell autograd of what they write: a gradient is refused where eager refuses it, never made of other values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import graphs

Tensor = torch.Tensor
pytestmark = pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
contexts = pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])


class Adds(nn.Module):
    """Adds to a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.ones(3))

    def forward(self, x: Tensor, n: Tensor, given: Tensor) -> Tensor:
        self.state.add_(x)
        return x * 2


class AddsToAView(Adds):
    def forward(self, x: Tensor, n: Tensor, given: Tensor) -> Tensor:
        self.state[1:].add_(x[1:])
        return x * 2


class WritesAtAPlace(Adds):
    def forward(self, x: Tensor, n: Tensor, given: Tensor) -> Tensor:
        self.state[n.item()] = x[0]
        return x * 2


class WritesAnArgument(Adds):
    def forward(self, x: Tensor, n: Tensor, given: Tensor) -> Tensor:
        given.add_(x)
        return x * 2


@contexts
@pytest.mark.parametrize("kind", [Adds, AddsToAView, WritesAtAPlace, WritesAnArgument], ids=lambda kind: kind.__name__)
def test_a_gradient_of_what_was_overwritten_is_refused(kind: Callable[[], Any], context: Any) -> None:
    model = kind()
    step, given = graphs.capture(model), torch.ones(3)
    for call in range(5):
        w = torch.ones(3, requires_grad=True)
        loss = (w * (given if kind is WritesAnArgument else model.state)).sum()  # autograd keeps what is written below
        with context():
            step(torch.ones(3), torch.tensor(call % 3), given)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()  # type: ignore[no-untyped-call]
    assert step.report().replays >= 3


def test_what_is_only_read_can_be_used_by_autograd() -> None:
    model = nn.Linear(3, 3)
    step = graphs.capture(model)
    for _ in range(4):
        loss = model(torch.ones(1, 3)).sum()
        with torch.no_grad():
            step(torch.ones(1, 3))
        loss.backward()
