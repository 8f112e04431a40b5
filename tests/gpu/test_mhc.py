"""``graphs::mhc_*`` on a device: numbers, launches, the same bits every time, and recorded steps that use them."""

from __future__ import annotations

import pytest
import torch

import graphs
from graphs.observation.launches import count_launches
from graphs.ops.mhc import operator, reference, tiles
from tests.models.hyper_connections import Blocks

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.gpu
Tensor = torch.Tensor
ops = torch.ops.graphs
NUMBERS = (1e-6, 1e-6, 20)
ROUNDING = {torch.bfloat16: 2**-8, torch.float32: 1e-5}


def operands(
    rows: int, hc: int, width: int, dtype: torch.dtype, weights: torch.dtype, device: torch.device
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    torch.manual_seed(0)
    out, streams = torch.randn(rows, width, device=device).to(dtype), torch.randn(rows, hc, width, device=device).to(dtype)
    behind = out, streams, torch.rand(rows, hc, device=device), torch.rand(rows, hc, hc, device=device)
    outputs = (2 + hc) * hc
    fn = torch.randn(outputs, hc * width, device=device) / (hc * width) ** 0.5
    return behind, tuple(one.to(weights) for one in (fn, torch.randn(outputs, device=device), torch.randn(3, device=device)))


def exact(streams: Tensor, layer: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """What ``mhc_pre`` gives, in float64."""
    (fn, base, scale), (norm_eps, eps, iterations), hc = (one.double() for one in layer), NUMBERS, streams.shape[1]
    x = streams.double()
    flat = x.flatten(1)
    mixes = (flat / (flat.square().mean(1, keepdim=True) + norm_eps).sqrt()) @ fn.t()
    pre = torch.sigmoid(mixes[:, :hc] * scale[0] + base[:hc]) + eps
    post = 2 * torch.sigmoid(mixes[:, hc : 2 * hc] * scale[1] + base[hc : 2 * hc])
    logits = (mixes[:, 2 * hc :] * scale[2] + base[2 * hc :]).view(-1, hc, hc)
    comb = reference.sinkhorn(torch.softmax(logits, -1) + eps, eps, iterations)
    return torch.einsum("th,thd->td", pre, x), post, comb


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(
    ("rows", "hc", "width"), [(1, 4, 4096), (3, 4, 4096), (8, 4, 4096), (64, 4, 4096), (5, 2, 96), (5, 8, 160)]
)
def test_they_agree_with_float64(
    rows: int, hc: int, width: int, dtype: torch.dtype, weights: torch.dtype, device: torch.device
) -> None:
    behind, layer = operands(rows, hc, width, dtype, weights, device)
    assert tiles.few(rows, hc, width) is not None
    for name, made in (("pre", ops.mhc_pre(behind[1], *layer, *NUMBERS)), ("both", ops.mhc_post_pre(*behind, *layer, *NUMBERS))):
        streams = behind[1] if name == "pre" else made[0]
        for one, wanted, limit in zip(made[-3:], exact(streams, layer), (ROUNDING[dtype], 1e-5, 1e-5), strict=True):
            assert (one.double() - wanted).abs().max() <= limit * wanted.abs().max(), name
    torch.testing.assert_close(made[0], reference.post(*behind), rtol=2 * ROUNDING[dtype], atol=2 * ROUNDING[dtype])
    assert torch.equal(made[0], ops.mhc_post(*behind))


def test_they_launch_two_kernels_and_give_the_same_bits_every_time(device: torch.device) -> None:
    behind, layer = operands(4, 4, 4096, torch.bfloat16, torch.float32, device)
    assert count_launches(lambda: ops.mhc_post_pre(*behind, *layer, *NUMBERS), device) == 2
    assert count_launches(lambda: ops.mhc_pre(behind[1], *layer, *NUMBERS), device) == 2
    assert count_launches(lambda: ops.mhc_post(*behind), device) == 1
    first = ops.mhc_post_pre(*behind, *layer, *NUMBERS)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, ops.mhc_post_pre(*behind, *layer, *NUMBERS), strict=True))


def test_rows_that_no_tile_fits_are_the_references(device: torch.device) -> None:
    behind, layer = operands(65, 4, 256, torch.bfloat16, torch.float32, device)
    made = ops.mhc_pre(behind[1], *layer, *NUMBERS)
    for one, wanted in zip(made, reference.pre(behind[1], *layer, *NUMBERS), strict=True):
        assert torch.equal(one, wanted)


@pytest.mark.parametrize("compiler", ["none", "inductor"])
def test_recorded_steps_have_them(compiler: str, device: torch.device) -> None:
    torch.manual_seed(0)
    model = Blocks().to(device)
    options = {"hyper_connections": True, **({"force_disable_caches": True} if compiler == "inductor" else {})}
    step = graphs.capture(model, compiler=compiler, compiler_options=options, strict=True)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(2, 1, 4, 32, device=device).bfloat16()
            torch.testing.assert_close(step(x), model(x), rtol=2e-2, atol=2e-2)
    assert step.report().keys[0].rewrites == {"hyper_connections": 4}


def test_they_are_on_where_they_were_measured(device: torch.device) -> None:
    if not operator.pays_on(device):
        pytest.skip(f"compute capability {torch.cuda.get_device_capability(device)}, measured on {sorted(operator.MEASURED)}")
    step = graphs.capture(Blocks().to(device), strict=True)
    with torch.no_grad():
        step(torch.randn(2, 1, 4, 32, device=device).bfloat16())
    assert step.report().keys[0].rewrites == {"hyper_connections": 4}
