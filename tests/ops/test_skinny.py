"""``graphs::skinny_linear`` without a GPU: its meaning, its errors, its kernel in Triton's interpreter."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

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


NORMS = {
    "rms": lambda x, gain, shift: functional.rms_norm(x, x.shape[-1:], gain, 1e-5),
    "layer": lambda x, gain, shift: functional.layer_norm(x, x.shape[-1:], gain, shift, 1e-5),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("wide", [False, True])
def test_a_norm_is_of_the_rows_and_rounded_once(norm: str, wide: bool) -> None:
    x, weights = operands()
    gain, shift = torch.randn(2, 32).to(torch.float32 if wide else x.dtype)
    around = {"norm": norm, "gain": gain, "shift": shift if norm == "layer" else None, "eps": 1e-5}
    rows = NORMS[norm](x.float(), gain.float(), shift.float()).to(x.dtype)
    for made, weight in zip(linear(x, weights, **around), weights, strict=True):
        torch.testing.assert_close(made, functional.linear(rows, weight), rtol=2**-7, atol=2**-7)
    torch.library.opcheck(linear.default, (x, weights), around)


@pytest.mark.parametrize("activation", operator.ACTIVATIONS)
def test_an_activation_is_of_the_first_product(activation: str) -> None:
    x, weights = operands(sizes=(16, 16))
    first, second = linear(x, weights)
    active = operator.ACTIVATIONS[activation](first.float()).bfloat16()
    assert [len(linear(x, some, activation=activation)) for some in (weights[:1], weights)] == [1, 1]
    assert torch.equal(linear(x, weights[:1], activation=activation)[0], active)
    assert torch.equal(linear(x, weights, activation=activation)[0], active * second)
    torch.library.opcheck(linear.default, (x, weights), {"activation": activation})


def test_a_residual_is_added_to_the_rounded_product() -> None:
    x, weights = operands(sizes=(16,))
    residual = torch.randn(3, 16).bfloat16()
    (made,) = linear(x, weights, residual=residual)
    assert torch.equal(made, linear(x, weights)[0] + residual)
    torch.library.opcheck(linear.default, (x, weights), {"residual": residual})


GAIN, RESIDUAL = torch.ones(32).bfloat16(), torch.ones(3, 16).bfloat16()


@pytest.mark.parametrize(
    ("sizes", "around", "message"),
    [
        ((16,), {"norm": "group"}, "norm is 'group'; legal are 'none', 'rms', 'layer'"),
        ((16,), {"norm": "rms"}, "got norm 'rms' without a gain and without a shift"),
        ((16,), {"norm": "rms", "gain": GAIN, "shift": GAIN}, "got norm 'rms' with a gain and with a shift"),
        ((16,), {"gain": GAIN}, "got norm 'none' with a gain"),
        (
            (16,),
            {"norm": "rms", "gain": GAIN[1:]},
            r"the gain has shape \(31,\) .*legal is \(32,\), torch.bfloat16 or",
        ),
        ((16,), {"norm": "rms", "gain": GAIN.half()}, "the gain has shape .* is torch.float16"),
        ((16,), {"activation": "tanh"}, "activation is 'tanh'; legal are 'none', 'silu'"),
        ((16, 16, 16), {"activation": "silu"}, r"weights of \[16, 16, 16\] rows; with an activation"),
        ((16, 8), {"activation": "silu"}, r"weights of \[16, 8\] rows"),
        ((16,), {"activation": "silu", "residual": RESIDUAL}, "and a residual; with an activation"),
        ((16, 16), {"residual": RESIDUAL}, "2 weights and a residual; legal is one"),
        ((16,), {"residual": RESIDUAL[:1]}, r"the residual has shape \(1, 16\) .*legal is \(3, 16\)"),
        ((16,), {"residual": RESIDUAL.float()}, "the residual has shape .* is torch.float32"),
    ],
)
def test_what_is_around_the_products_has_to_fit(sizes: tuple[int, ...], around: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightError, match=message):
        linear(*operands(sizes=sizes), **around)


@pytest.mark.parametrize(("m", "n", "k"), [(0, 16, 256), (17, 16, 256), (4, 0, 256), (4, 16, 0), (4, 16, 128), (4, 16, 300)])
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


class Launches:
    """In the place of the kernel's module: what it is given."""

    WEIGHTS = 3

    def __init__(self) -> None:
        self.given: list[dict[str, Any]] = []

    def launch_skinny(self, x: Any, weights: Any, ys: Any, tile: Any, k: Any, biases: Any, around: Any, *, turned: bool) -> None:
        self.given.append({"weights": weights, "biases": biases, "turned": turned})


def test_the_kernel_is_given_dense_biases_and_one_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias may be a column of something, and a transposed weight of one row is dense either way."""
    launches = Launches()
    monkeypatch.setattr(operator, "skinny_kernel", lambda: launches)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    x = torch.randn(2, 256).bfloat16()
    weights = [torch.randn(256, n).bfloat16().t() for n in (16, 16, 16, 1, 16)]
    biases = [torch.randn(16, 2).bfloat16()[:, 0], torch.ones(1).bfloat16().expand(16), None, None, torch.ones(16).bfloat16()]
    operator._cuda(x, weights, biases)
    assert [one["turned"] for one in launches.given] == [True, True]
    dense = [bias for one in launches.given for bias in one["biases"] if bias is not None]
    assert len(dense) == 3 and all(bias.is_contiguous() for bias in dense)


def test_autocast_changes_nothing() -> None:
    x, weights = operands()
    given = x.half(), [weight.half() for weight in weights]
    with torch.autocast("cpu", torch.bfloat16):
        made = linear(*given)
    for one, other in zip(made, linear(*given), strict=True):
        assert one.dtype is torch.float16 and torch.equal(one, other)


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    return interpreted(SCRIPT)


def test_the_interpreted_kernel_agrees_with_float64(errors: dict[str, float]) -> None:
    plain = {case: error for case, error in errors.items() if not case.startswith("torch.")}
    assert len(plain) == 10
    assert max(plain.values()) < 1e-5, plain


def test_the_interpreted_kernel_norms_its_rows_and_works_on_its_sums(errors: dict[str, float]) -> None:
    around = {case: error for case, error in errors.items() if case.startswith("torch.")}
    assert len(around) == 3 * 12 + 12
    limits = {"torch.float16": 2e-3, "torch.bfloat16": 2e-2}  # twice what is rounded, truncated by the interpreter
    assert all(error < limits[case.split()[0]] for case, error in around.items()), around


def test_it_lowers_to_mlir() -> None:
    pytest.importorskip("torch_mlir", reason="torch-mlir is not installed")
    x, weights = torch.randn(3, 32), [torch.randn(16, 32), torch.randn(8, 32)]
    made = passes.run_mlir(lambda x, *weights: linear(x, list(weights)), x, *weights)
    for found, weight in zip(made, weights, strict=True):
        torch.testing.assert_close(found, x @ weight.t(), rtol=1e-5, atol=1e-5)
