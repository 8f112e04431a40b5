"""Steps that ask which object an argument is: a replay has copies of arguments, so such a step runs eagerly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import graphs

Tensor = torch.Tensor
contexts = pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])


class Remembering(nn.Module):
    """Counts how often its argument is another object than in the step before."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Any = None
        self.changes = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.last is not x:
            self.last = x
            self.changes += 1
        return x * 2


class RememberingTheNumber(Remembering):
    def forward(self, x: Tensor) -> Tensor:
        if self.last != id(x):
            self.last = id(x)
            self.changes += 1
        return x * 2


class Table(Remembering):
    def forward(self, x: Tensor) -> Tensor:
        if self.last is None:
            self.last = {}
        if id(x) not in self.last:
            self.last[id(x)] = x
            self.changes += 1
        return x * 2


@contexts
@pytest.mark.parametrize("kind", [Remembering, RememberingTheNumber, Table], ids=lambda kind: kind.__name__)
@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
def test_a_step_knows_its_argument_again(kind: Callable[[], Any], context: Any) -> None:
    model = kind()
    step, first, second = graphs.capture(model), torch.ones(3), torch.ones(3)
    changes = []
    for call in range(8):
        with context():
            step(first if call < 5 else second)
        changes.append(model.changes)
    assert changes == [1] * 5 + [2] * 3
    assert any("which object" in refusal.detail for refusal in step.report().refusals)


class Own(torch.nn.Module):
    """Makes both results, and returns one by which tensor it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.b = torch.full((4, 3), 2.0)

    def forward(self, x: Tensor) -> Tensor:
        y, z = x * 2, x * 3
        return y if x is self.b else z


def test_a_tensor_of_the_models_own_is_known_again_at_the_first_call() -> None:
    model = Own()
    step = graphs.capture(model)
    with torch.no_grad():
        for x in (model.b, model.b, torch.ones(4, 3), torch.ones(4, 3), model.b, model.b.clone()):
            assert torch.equal(step(x), model(x))
    assert step.report().replays > 2
