"""Steps without tensor arguments: what they read of their state is taken out like anything else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import graphs

Tensor = torch.Tensor


class Feeding(nn.Module):
    """Advances its own state."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("values", torch.arange(8.0))


class Scaled(Feeding):
    def forward(self) -> Tensor:
        self.count.add_(1)
        count = int(self.count)
        return self.values * count + (1 if count % 2 else 0)


class Cut(Feeding):
    def forward(self) -> Tensor:
        self.count.add_(1).remainder_(8)
        return self.values[: int(self.count)].sum()


class Branching(Feeding):
    def forward(self, factor: float = 2.0) -> Tensor:
        self.count.add_(1)
        if self.count % 3 == 0:
            self.values.mul_(factor)
        return self.values + 1


class Selecting(Feeding):
    def forward(self) -> Tensor:
        self.count.add_(1)
        return self.values[self.values > self.count].sum()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("kind", [Scaled, Cut, Branching, Selecting])
def test_a_step_that_feeds_itself_is_recorded_without_its_host_reads(kind: Any, context: Any) -> None:
    with context():
        model, twin = kind(), kind()
        step = graphs.capture(model)
        for _ in range(10):
            assert torch.equal(step(), twin())
        assert torch.equal(model.count, twin.count) and torch.equal(model.values, twin.values)
    report = step.report()
    assert report.recordings == 1 and not report.refusals, str(report)
