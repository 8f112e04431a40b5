"""`arithmetic` against eager on a GPU, bit for bit: its kernels take numbers in other precisions than a CPU's."""

from __future__ import annotations

import math

import pytest
import torch

from tests.passes.steps import check, rewritten
from tests.passes.test_arithmetic import BINARY, DTYPES, FLOATING, ROUNDED_TWICE, Body, fits, step_of

NUMBERS = (0.1, 1 / 3, -2.7, 3.0, 1e-3, 12.0)
DIVISIONS = ("floordiv", "mod", "divide down", "fmod")
"""Whole numbers divided by zero have no result on a GPU."""


def values(dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(1024, generator=torch.Generator().manual_seed(0)) * 9
    x[:4] = torch.tensor([0.0, -0.0, math.inf, math.nan]) if dtype.is_floating_point else 1.0
    return x.abs().to(dtype) if dtype == torch.uint8 else x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of", [*FLOATING[:2], torch.int64], ids=str)
@pytest.mark.parametrize("name", BINARY)
def test_an_operator_rounds_and_promotes_as_with_the_number(
    name: str, of: torch.dtype, dtype: torch.dtype, device: torch.device
) -> None:
    body: Body = BINARY[name]
    step, x = step_of(lambda x, u: body(x, u).to(x.device)), values(dtype).to(device)
    numbers = [torch.tensor(number).to(of).to(device) for number in NUMBERS]
    numbers = [t for t in numbers if fits(t.item(), dtype) and (t.item() or name not in DIVISIONS)]
    try:
        step(x.clone(), numbers[0])
    except (RuntimeError, TypeError, NotImplementedError):
        pytest.skip("eager does not take these dtypes")
    if name in ROUNDED_TWICE and dtype == torch.float64:
        pytest.skip("the sum is rounded twice in float64")
    if dtype == torch.bool and of != torch.int64:
        pytest.skip("torch asks for the number itself when it makes a flag of it")
    graph = rewritten(step, x, numbers[0])
    for number in numbers:
        check(graph, step, x, number, may_break=dtype == torch.bool)
