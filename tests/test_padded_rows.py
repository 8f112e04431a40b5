"""What a step makes of its number of rows: proved for each number that comes, or recorded at exact sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphs

Tensor = torch.Tensor
pytestmark = pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
contexts = pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])


class Counting(nn.Module):
    """Writes only where there are few rows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] < 4:
            self.count.add_(1)
        return x * 2 + self.count


STEPS: dict[str, tuple[Callable[[], Callable[[Tensor], Tensor]], bool]] = {
    "threshold": (lambda: lambda x: x * 2 if x.shape[0] > 6 else x * 3, False),
    "threshold at a bucket": (lambda: lambda x: x * 2 if x.shape[0] > 4 else x * 3, True),
    "one number": (lambda: lambda x: x * 2 if x.shape[0] == 3 else x * 3, False),
    "a single row": (lambda: lambda x: x.squeeze(0) * 2, False),
    "cut": (lambda: lambda x: x[:3] * 2, False),
    "a row that may not be there": (lambda: lambda x: x[2] * 2, False),
    "chunks": (lambda: lambda x: x.chunk(2)[0] * 2, False),
    "mean": (lambda: lambda x: x - x.mean(0), False),
    "random numbers": (lambda: lambda x: x + torch.rand(x.shape[0], 1), False),
    "dropout": (lambda: lambda x: F.dropout(x, 0.5), False),
    "draws of rows": (lambda: lambda x: torch.multinomial(x.abs().softmax(-1), 1), False),
    "writes": (Counting, False),
    "by rows": (lambda: lambda x: x.softmax(-1) * 2 + 1, True),
}


@contexts
@pytest.mark.parametrize("declared", [True, False], ids=["declared", "inferred"])
@pytest.mark.parametrize("name", STEPS)
def test_each_number_of_rows_is_what_eager_makes_of_it(name: str, declared: bool, context: Any) -> None:
    make, padded = STEPS[name]
    model, twin = make(), make()
    step = graphs.capture(model, buckets=[4, 8], batch_dims={"x": 0} if declared else None)
    with context():
        for call, rows in enumerate((8, 7, 5, 4, 3, 2, 1, 3, 6, 7, 2, 1)):
            x, seen = torch.full((rows, 4), 1.0 + call).cumsum(-1), []
            for fn in (twin, step):
                torch.manual_seed(call)
                try:
                    seen.append([fn(x), torch.rand(1)])
                except IndexError:
                    seen.append([torch.zeros(0), torch.rand(1)])
            torch.testing.assert_close(seen[1], seen[0], rtol=1e-6, atol=0, msg=f"{rows} rows")
    keys = len(step.report().keys)
    assert keys <= 3 if padded else keys > 3 or step.report().refusals


@pytest.mark.parametrize("verify", ["capture", "off"])
def test_each_number_is_compared_once_unless_verification_is_off(verify: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []
    monkeypatch.setattr(graphs.dispatch.key_recorder, "compare_padded", lambda step, entry, rows: compared.append(rows))
    captured = graphs.capture(lambda x: x * 2, buckets=[8], batch_dims={"x": 0}, verify=verify)
    with torch.no_grad():
        for rows in (8, 3, 5, 3, 5, 8):
            captured(torch.ones(rows, 2))
    assert compared == ([3, 5] if verify == "capture" else [])
