"""``graphs::skinny_linear`` without a GPU: its meaning, its errors, its kernel in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import passes
from graphs.errors import WeightError
from graphs.ops.skinny import operator
from graphs.ops.wo_a import tiles
from tests.ops.interpreted import interpreted

SCRIPT = Path(__file__).with_name("interpret_skinny.py")
linear = torch.ops.graphs.skinny_linear


def operands(m: int = 3, k: int = 32, sizes: tuple[int, ...] = (16, 8)) -> tuple[torch.Tensor, list[torch.Tensor]]:
    return torch.randn(m, k).bfloat16(), [torch.randn(n, k).bfloat16() for n in sizes]


def test_it_is_a_product_with_each_transposed_weight() -> None:
    x, weights = operands()
    for made, weight in zip(linear(x, weights), weights, strict=True):
        assert torch.equal(made, torch.nn.functional.linear(x, weight))


def test_it_passes_opcheck() -> None:
    torch.library.opcheck(linear.default, operands())


@pytest.mark.parametrize(
    ("x", "weights", "message"),
    [
        (torch.ones(3, 32), [torch.ones(16, 31)], r"\(16, 31\); legal are \[M, K\] and \[N, K\]"),
        (torch.ones(3, 2, 32), [torch.ones(16, 32)], r"x has shape \(3, 2, 32\)"),
        (torch.ones(3, 32), [], r"legal are \[M, K\]"),
        (torch.ones(3, 32), [torch.ones(16, 32).bfloat16()], "must be torch.float32 on cpu"),
    ],
)
def test_operands_that_do_not_fit_are_named(x: torch.Tensor, weights: list[torch.Tensor], message: str) -> None:
    with pytest.raises(WeightError, match=message):
        linear(x, weights)


@pytest.mark.parametrize("layout", ["as it is", "turned"])
def test_biases_are_added_before_rounding(layout: str) -> None:
    x, weights = operands()
    held = [weight.t().contiguous().t() for weight in weights] if layout == "turned" else weights
    biases = [torch.randn(16).bfloat16(), None]
    made = linear(x, held, biases)
    for found, weight, bias in zip(made, weights, biases, strict=True):
        assert torch.equal(found, torch.nn.functional.linear(x, weight, bias))
    torch.library.opcheck(linear.default, (x, held, biases))


@pytest.mark.parametrize(
    ("biases", "message"),
    [
        ([None], "1 biases for 2 weights"),
        ([torch.ones(15).bfloat16(), None], r"shape \(15,\) and is torch.bfloat16 on cpu; legal is \(16,\)"),
        ([None, torch.ones(8)], "is torch.float32 on cpu; legal is"),
    ],
)
def test_biases_that_do_not_fit_are_named(biases: list[torch.Tensor | None], message: str) -> None:
    with pytest.raises(WeightError, match=message):
        linear(*operands(), biases)


@pytest.mark.parametrize(("m", "n", "k"), [(0, 16, 256), (17, 16, 256), (4, 0, 256), (4, 16, 128), (4, 16, 300)])
def test_a_library_multiplies_what_no_tile_fits(m: int, n: int, k: int) -> None:
    assert tiles.skinny(m, n, k) is None


@pytest.mark.parametrize("m", [1, 8, 9, 16])
@pytest.mark.parametrize("n", [16, 3072, 32000])
@pytest.mark.parametrize("k", [256, 512, 768, 2048, 11008])
def test_a_tile_divides_the_problem(m: int, n: int, k: int) -> None:
    found = tiles.skinny(m, n, k)
    assert found is not None
    tile, block_k = found
    assert tile.block_m >= m and k % (tile.num_warps * block_k) == 0


def test_it_is_used_on_the_devices_it_was_measured_on_only() -> None:
    assert not operator.pays_on(torch.device("cpu"))


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    return interpreted(SCRIPT)


def test_the_interpreted_kernel_agrees_with_float64(errors: dict[str, float]) -> None:
    assert len(errors) == 10
    assert max(errors.values()) < 1e-5, errors


def test_it_lowers_to_mlir() -> None:
    pytest.importorskip("torch_mlir", reason="torch-mlir is not installed")
    x, weights = torch.randn(3, 32), [torch.randn(16, 32), torch.randn(8, 32)]
    made = passes.run_mlir(lambda x, *weights: linear(x, list(weights)), x, *weights)
    for found, weight in zip(made, weights, strict=True):
        torch.testing.assert_close(found, x @ weight.t(), rtol=1e-5, atol=1e-5)
