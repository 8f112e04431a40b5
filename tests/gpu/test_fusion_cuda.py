"""Operators that `passes.optimize.fuse_exact` calls exact give the same bits when Inductor compiles them for the GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from graphs.compile.fused_region import CompiledRegion

aten = torch.ops.aten
ROWS = 2048
SPECIAL = (0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, -1e-40, 3.0e38, 65504.0, 1 / 3)

WHOLE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sums and products": lambda a, b: a * b + a - b * 3,
    "division with rest": lambda a, b: aten.floor_divide(a, b + (b == 0)) * 7 + aten.remainder(a, b + (b == 0)),
    "division by a number": lambda a, b: aten.floor_divide(a, 3) - aten.remainder(b, 5),
    "limits": lambda a, b: a.clamp(-5, 9).maximum(b.clamp_min(2)).minimum(a.abs()),
    "conditions": lambda a, b: ((a < b).logical_and(a.ne(3)).logical_or(b >= 0).logical_not()).sum(),
    "places": lambda a, b: a.index_select(0, b.remainder(ROWS)) + a[aten.clamp(b, 0, ROWS - 1)],
    "counts": lambda a, b: torch.zeros_like(a).scatter_add(0, a.remainder(ROWS), b),
    "pairs": lambda a, b: (a[:64, None] <= b[None, :64]).sum(1),
}
CHOICES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "a product": lambda x, y, m: torch.where(m, x * y, y),
    "a sum": lambda x, y, m: (x + y).masked_fill(m, -float("inf")),
    "a difference": lambda x, y, m: torch.where(m, y, x - y),
    "comparisons": lambda x, y, m: torch.where((x > y).logical_and(m), x, y),
    "places": lambda x, y, m: torch.where(m, x.index_select(0, m.to(torch.int64)), y),
    "wider": lambda x, y, m: torch.where(m, x.to(torch.float64), y.to(torch.float64)),
}


def compiled(function: Callable[..., Tensor], *inputs: Tensor) -> CompiledRegion:
    return CompiledRegion(make_fx(lambda *given: (function(*given),))(*inputs))


def same_bits(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape
    if a.is_floating_point():
        assert torch.equal(a.isnan(), b.isnan())  # which of the many NaNs it is, nobody promises
        kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        a, b = a.nan_to_num(0.0).view(kind), b.nan_to_num(0.0).view(kind)
    assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers(name: str, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(0)
    if dtype == torch.int32 and name in ("places", "counts"):
        pytest.skip("torch takes indices of these operators as int64 only")
    a, b = (torch.randint(-9, 10, (ROWS,), generator=generator, device=device, dtype=dtype) for _ in range(2))
    wide = (torch.randint(-(1 << 30), 1 << 30, (ROWS,), generator=generator, device=device, dtype=dtype) for _ in range(2))
    region = compiled(WHOLE[name], a, b)
    for pair in ((a, b), tuple(wide)):
        same_bits(region(*pair)[0], WHOLE[name](*pair))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CHOICES)
def test_floats_are_rounded_once(name: str, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(0)
    x, y = (
        torch.randn(ROWS, generator=generator, device=device) * 10 ** torch.randint(-6, 6, (ROWS,), device=device) for _ in "xy"
    )
    special = torch.tensor(SPECIAL, device=device)
    x[: len(SPECIAL) ** 2] = special.repeat_interleave(len(SPECIAL))
    y[: len(SPECIAL) ** 2] = special.repeat(len(SPECIAL))
    x, y, mask = x.to(dtype), y.to(dtype), torch.rand(ROWS, generator=generator, device=device) < 0.5
    same_bits(compiled(CHOICES[name], x, y, mask)(x, y, mask)[0], CHOICES[name](x, y, mask))
