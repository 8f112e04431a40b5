"""``graphs::one_query_attention`` without a GPU: its meaning, its errors, its kernels in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import passes
from graphs.errors import WeightError
from graphs.ops.attention import operator
from tests.ops.interpreted import interpreted

SCRIPT = Path(__file__).with_name("interpret_attention.py")
attention = torch.ops.graphs.one_query_attention


def operands(groups: int = 2, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    mask = torch.where(torch.arange(9) < 5, 0.0, -torch.inf).view(1, 1, 1, 9)
    return *(torch.randn(size, dtype=dtype) for size in ((2, 4, 1, 16), (2, groups, 9, 16), (2, groups, 9, 16))), mask


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("masked", [True, False])
def test_it_is_attention_of_one_query(groups: int, masked: bool) -> None:
    query, key, value, mask = operands(groups, torch.float32)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask if masked else None, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(attention(query, key, value, mask if masked else None, 0.3), expected)


def test_a_boolean_mask_is_what_its_bias_is() -> None:
    query, key, value, bias = operands()
    assert torch.equal(attention(query, key, value, bias == 0, 0.3), attention(query, key, value, bias, 0.3))
    torch.library.opcheck(attention.default, (query, key, value, bias == 0, 0.25))


def test_a_row_that_sees_nothing_is_zero() -> None:
    query, key, value, mask = operands()
    hidden = torch.full_like(mask, -torch.inf).expand(2, 1, 1, 9).clone()
    hidden[1] = 0
    made = attention(query, key, value, hidden, 1.0)
    assert not made[0].any() and made[1].abs().sum() > 0


def test_it_passes_opcheck() -> None:
    torch.library.opcheck(attention.default, (*operands(), 0.25))


QUERY, KEY, _, MASK = operands()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((QUERY, KEY, KEY[:, :, :8], None), r"legal are \[B, H, 1, D\] and twice \[B, G, S, D\]"),
        ((QUERY.expand(2, 4, 2, 16), KEY, KEY, None), r"query \(2, 4, 2, 16\)"),
        ((QUERY[:, :3], KEY, KEY, None), r"query \(2, 3, 1, 16\), key \(2, 2, 9, 16\)"),
        (
            (QUERY, KEY, KEY, MASK[..., :8]),
            r"mask \(1, 1, 1, 8\) torch.float32; legal is a bias or a boolean mask that fits \(2, 4, 1, 9\)",
        ),
        ((QUERY, KEY, KEY, MASK.nan_to_num(0).int()), "torch.int32; legal is a bias or a boolean mask"),
        ((QUERY, KEY.float(), KEY.float(), None), "must be torch.bfloat16 on cpu"),
    ],
)
def test_operands_that_do_not_fit_are_named(args: tuple[torch.Tensor, ...], message: str) -> None:
    with pytest.raises(WeightError, match=message):
        attention(*args, 1.0)


@pytest.mark.parametrize("sizes", [(2, 4, 2, 0), (0, 4, 2, 5)])
def test_nothing_is_attended_to_or_asked(sizes: tuple[int, int, int, int]) -> None:
    batch, heads, groups, length = sizes
    query, key = torch.randn(batch, heads, 1, 16).bfloat16(), torch.randn(batch, groups, length, 16).bfloat16()
    assert torch.equal(attention(query, key, key, None, 1.0), torch.zeros_like(query))
    torch.library.opcheck(attention.default, (query, key, key, None, 1.0))
    assert not operator.fits(tuple(query.shape), tuple(key.shape)) or batch == 0


def test_autocast_changes_nothing() -> None:
    query, key, value = torch.randn(1, 4, 1, 16).half(), *torch.randn(2, 1, 2, 5, 16).half()
    with torch.autocast("cpu", torch.bfloat16):
        made = attention(query, key, value, None, 1.0)
    assert made.dtype is torch.float16 and torch.equal(made, attention(query, key, value, None, 1.0))


def test_what_the_kernel_takes() -> None:
    assert operator.fits((2, 32, 1, 128), (2, 8, 100, 128)) and operator.fits((1, 12, 1, 64), (1, 12, 1, 64))
    assert not operator.fits((1, 8, 1, 80), (1, 8, 9, 80)), "a width that is no power of two"
    assert not operator.fits((1, 64, 1, 64), (1, 1, 9, 64)), "more heads than a product has rows"
    assert not operator.fits((1, 8, 2, 64), (1, 8, 9, 64)), "two queries"


def test_the_kernels_in_the_interpreter_agree_with_float64() -> None:
    errors = interpreted(SCRIPT)
    assert len(errors) == 12 and max(errors.values()) < 1e-5, errors


def test_it_lowers_to_mlir() -> None:
    pytest.importorskip("torch_mlir", reason="torch-mlir is not installed")
    args = operands(dtype=torch.float32)
    made = passes.run_mlir(lambda *tensors: attention(*tensors, 0.5), *args)
    torch.testing.assert_close(made, attention(*args, 0.5), rtol=1e-5, atol=1e-5)
