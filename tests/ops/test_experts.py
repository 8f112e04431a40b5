"""``graphs::expert_linear`` without a GPU: its meaning, its errors, its kernel in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch._dynamo.testing

import passes
from graphs.errors import WeightError
from graphs.ops.experts import operator
from tests.ops.interpreted import interpreted

SCRIPT = Path(__file__).with_name("interpret_experts.py")
linear = torch.ops.graphs.expert_linear


def operands(rows: int = 5, experts: int = 3, n: int = 16, k: int = 32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chosen = torch.arange(rows) % experts
    return torch.randn(rows, k).bfloat16(), torch.randn(experts, n, k).bfloat16(), chosen


def test_it_is_a_product_with_the_weight_of_each_rows_expert() -> None:
    x, weights, experts = operands()
    for row, made in enumerate(linear(x, weights, experts)):
        torch.testing.assert_close(made, weights[experts[row]] @ x[row], rtol=1e-2, atol=1e-2)


def test_it_passes_opcheck() -> None:
    torch.library.opcheck(linear.default, operands())


@pytest.mark.parametrize(
    ("x", "weights", "experts", "message"),
    [
        (torch.ones(3, 32), torch.ones(2, 16, 31), torch.zeros(3).long(), r"\(2, 16, 31\), experts \(3,\); legal are"),
        (torch.ones(3, 32), torch.ones(2, 16, 32), torch.zeros(2).long(), r"legal are \[P, K\], \[E, N, K\] and \[P\]"),
        (torch.ones(3, 32), torch.ones(16, 32), torch.zeros(3).long(), r"weights \(16, 32\)"),
        (
            torch.ones(3, 32),
            torch.ones(2, 16, 32),
            torch.zeros(3),
            "experts torch.float32; legal are torch.float32 and int32 or int64",
        ),
        (torch.ones(3, 32), torch.ones(2, 16, 32).bfloat16(), torch.zeros(3).long(), "weights are torch.bfloat16"),
    ],
)
def test_operands_that_do_not_fit_are_named(x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, message: str) -> None:
    with pytest.raises(WeightError, match=message):
        linear(x, weights, experts)


def test_no_features_give_zero_and_no_experts_are_refused() -> None:
    assert torch.equal(linear(*operands(k=0)), torch.zeros(5, 16).bfloat16())
    assert operator.expert_kernel().blocks(16, 0)[1] == 1
    with pytest.raises(WeightError, match="legal is one expert or more"):
        linear(torch.ones(5, 32), torch.ones(0, 16, 32), torch.zeros(5).long())


def test_autocast_changes_nothing() -> None:
    x, weights, experts = operands()
    with torch.autocast("cpu", torch.bfloat16):
        made = linear(x.half(), weights.half(), experts)
    assert made.dtype is torch.float16 and torch.equal(made, linear(x.half(), weights.half(), experts))


def test_a_number_of_rows_that_is_not_known_stays_so() -> None:
    x, weights, experts = operands()
    counted = torch._dynamo.testing.CompileCounter()
    step = torch.compile(lambda x, experts: linear(x * 1, weights, experts), backend=counted, dynamic=True)
    for rows in (5, 4, 2):
        given = x[:rows].clone(), experts[:rows].clone()
        assert torch.equal(step(*given), linear(given[0], weights, given[1]))
    assert counted.frame_count == 1


def test_an_expert_that_there_is_not_is_refused_on_the_host() -> None:
    x, weights, experts = operands()
    with pytest.raises(IndexError):
        linear(x, weights, experts + 3)


def test_the_kernel_in_the_interpreter_agrees_with_float64() -> None:
    errors = interpreted(SCRIPT)
    assert len(errors) == 8 and max(errors.values()) < 1e-5, errors


def test_the_tiles_cover_narrow_and_wide_experts() -> None:
    kernel = operator.expert_kernel()
    for n, k in ((1, 1), (16, 64), (1024, 4096), (4096, 512), (7, 100)):
        block_n, block_k = kernel.blocks(n, k)
        assert block_n & (block_n - 1) == 0 and block_k & (block_k - 1) == 0 and block_n * block_k <= kernel.ELEMENTS


def test_it_lowers_to_mlir() -> None:
    pytest.importorskip("torch_mlir", reason="torch-mlir is not installed")
    x, weights, experts = torch.randn(3, 32), torch.randn(2, 16, 32), torch.tensor([1, 0, 1])
    torch.testing.assert_close(passes.run_mlir(linear, x, weights, experts), linear(x, weights, experts), rtol=1e-5, atol=1e-5)
