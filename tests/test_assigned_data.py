"""``y.data = x`` in a step whose host values are taken out: no operator says it, and a recording follows it or is not made."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import graphs


class Assigning(nn.Module):
    """Assigns ``data`` of a tensor by ``kind``; ``shift`` is 0 at first, so that a trace without the assignment looks right."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("factor", torch.tensor(3))
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("state", torch.zeros(4))
        self.weight = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        factor, y = int(self.factor), x * 1
        if self.kind == "its own":
            y.data = x * (1 + self.shift)
        elif self.kind == "of another shape":
            y.data = torch.cat([x, x + self.shift])
        elif self.kind == "of a view":
            part = y[:2]
            part.data = x[2:] * (1 + self.shift)
            return part * factor + y[:2]
        elif self.kind == "of a base":
            part = y[:2]
            y.data = x * (1 + self.shift)
            return part * factor + y[:2]
        elif self.kind == "written later":
            other = x * 2
            y.data = other
            other.add_(self.shift)
            y.mul_(2)
            return y * factor + other
        elif self.kind == "of another dtype":
            y.data = (x * (1 + self.shift)).double()
        elif self.kind == "a buffer's":
            self.state.data = self.state * 2 + x + self.shift
            return self.state * factor
        elif self.kind == "a parameter's":
            self.weight.data = self.weight + x + self.shift
            return self.weight * factor
        return y * factor


FOLLOWED = ("its own", "of another shape", "of a view", "of a base", "written later")


@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", [*FOLLOWED, "of another dtype", "a buffer's", "a parameter's"])
def test_assigned_data_is_followed_or_the_step_runs_eagerly(kind: str, mode: type[torch.no_grad]) -> None:
    model = Assigning(kind)
    twin = copy.deepcopy(model)
    step = graphs.capture(model)
    with mode():
        for turn in range(5):
            for one in (model, twin):
                one.shift.fill_(turn // 3)
            x = torch.randn(4, generator=torch.Generator().manual_seed(turn))
            made, wanted = step(x), twin(x)
            assert made.dtype == wanted.dtype and torch.equal(made, wanted)
            assert torch.equal(model.state, twin.state) and torch.equal(model.weight, twin.weight)
    assert (step.report().replays > 0) == (kind in FOLLOWED)
