"""``graphs::expert_linear`` and heads that share keys on a device: numbers, launches, and compiled steps that use them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import graphs
from graphs.observation.launches import count_launches

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.gpu
Tensor = torch.Tensor
linear = torch.ops.graphs.expert_linear
TOLERANCE = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    with torch.no_grad():
        yield
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("rows", "experts", "n", "k"), [(1, 1, 16, 64), (24, 32, 1024, 4096), (24, 8, 4096, 512), (5, 3, 7, 100)]
)
def test_products_agree_with_float64(
    rows: int, experts: int, n: int, k: int, turned: bool, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(rows, k, device=device).to(dtype), torch.randn(experts, n, k, device=device).to(dtype)
    held = weights.transpose(1, 2).contiguous().transpose(1, 2) if turned else weights
    chosen = torch.randint(-experts, experts, (rows,), device=device)
    made = linear(x, held, chosen)
    exact = torch.bmm(weights[chosen].double(), x.double().unsqueeze(-1)).squeeze(-1)
    assert (made.double() - exact).abs().max() <= TOLERANCE[dtype] * exact.abs().max()
    assert count_launches(lambda: linear(x, held, chosen), device) == 1


def test_an_expert_that_there_is_not_gives_nan(device: torch.device) -> None:
    x, weights = torch.randn(2, 64, device=device).bfloat16(), torch.randn(3, 32, 64, device=device).bfloat16()
    made = linear(x, weights, torch.tensor([0, 3], device=device))
    assert made[1].isnan().all() and made[0].isfinite().all()


class Experts(nn.Module):
    """A routed layer behind attention whose heads share keys, as models write both."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.up = nn.Linear(256, 8, bias=False), nn.Parameter(torch.randn(8, 512, 256) / 16)
        self.down = nn.Parameter(torch.randn(8, 256, 512) / 16)

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        """``x [B, 256]``, ``keys [B, 1, S, 64]``: four heads read the same keys, which are the values too."""
        query = x.view(-1, 4, 1, 64)
        shared = keys[:, :, None].expand(-1, -1, 4, -1, -1).reshape(len(x), 4, -1, 64)
        weights = torch.softmax(torch.matmul(query, shared.transpose(2, 3)) / 8, -1)
        x = torch.matmul(weights, shared).reshape(len(x), 256)
        scores, chosen = self.router(x).float().softmax(-1).topk(2, -1)
        rows, experts = x.repeat_interleave(2, 0), chosen.reshape(-1)
        hidden = torch.bmm(self.up[experts], rows.unsqueeze(-1)).squeeze(-1).relu()
        made = torch.bmm(self.down[experts], hidden.unsqueeze(-1)).squeeze(-1)
        return (made * scores.reshape(-1, 1).to(x.dtype)).view(len(x), 2, 256).sum(1)


def test_a_compiled_step_reads_experts_and_keys_where_they_are(device: torch.device) -> None:
    torch.manual_seed(0)
    model = Experts().to(device, torch.bfloat16)
    step = graphs.capture(model, compiler="inductor", compiler_options={"force_disable_caches": True})
    for _ in range(3):
        x, keys = torch.randn(4, 256, device=device).bfloat16(), torch.randn(4, 1, 96, 64, device=device).bfloat16()
        torch.testing.assert_close(step(x, keys), model(x, keys), rtol=4e-2, atol=4e-2)
    (key,) = step.report().keys
    assert key.compiler == "inductor" and (key.rewrites["expert_products"], key.rewrites["repeated_heads"]) == (2, 2)
