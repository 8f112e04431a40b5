"""The definitions themselves, against float64 and against each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphs.ops.wo_a import reference
from graphs.ops.wo_a.reference import AMAX_FLOOR, BLOCK, FP8_MAX

FORMATS = list(FP8_MAX)
E4M3 = torch.arange(256, dtype=torch.uint8)


def finite_values(dtype: torch.dtype) -> torch.Tensor:
    values = E4M3.view(dtype).double()
    return values[values.isfinite()].unique()


@pytest.mark.parametrize("dtype", FORMATS)
@given(x=st.floats(-1e6, 1e6, width=32))
@settings(max_examples=200, deadline=None)
def test_rounding_picks_a_nearest_value_and_saturates(dtype: torch.dtype, x: float) -> None:
    values = finite_values(dtype)
    q = float(reference.round_fp8(torch.tensor([x]), dtype).double())
    assert abs(q - x) == pytest.approx(float((values - x).abs().min()), rel=0, abs=0)


@pytest.mark.parametrize("dtype", FORMATS)
def test_every_representable_value_survives_rounding(dtype: torch.dtype) -> None:
    values = finite_values(dtype)
    assert torch.equal(reference.round_fp8(values, dtype).double(), values)


@pytest.mark.parametrize("dtype", FORMATS)
def test_nan_stays_nan_and_infinity_saturates_when_rounded(dtype: torch.dtype) -> None:
    q = reference.round_fp8(torch.tensor([float("nan"), float("inf"), float("-inf")]), dtype).float()
    assert q[0].isnan() and q[1:].tolist() == [FP8_MAX[dtype], -FP8_MAX[dtype]]


@given(exponent=st.integers(-100, 100), seed=st.integers(0, 2**16))
@settings(max_examples=40, deadline=None)
def test_activation_groups_keep_three_bits_at_any_magnitude(exponent: int, seed: int) -> None:
    """The error of an element is half a quantum: 2**-4 of itself, or half the smallest step of its group."""
    o = torch.randn(2, 1, 2 * BLOCK, generator=torch.Generator().manual_seed(seed)).double() * 2.0**exponent
    o = o.float()
    q, s = reference.quantise_activations(o)
    wide = s.double().repeat_interleave(BLOCK, -1)
    error = (q.double() * wide - o.double()).abs()
    assert (error <= torch.maximum(o.double().abs() * 2.0**-4, wide * 2.0**-10) * (1 + 1e-6)).all()
    assert torch.allclose(s, o.abs().unflatten(-1, (-1, BLOCK)).amax(-1).clamp_min(AMAX_FLOOR) / 448, rtol=1e-6, atol=0)


def test_inverse_rotary_undoes_a_rotation_and_touches_nothing_else() -> None:
    generator = torch.Generator().manual_seed(4)
    o = torch.randn(5, 2, 1024, generator=generator)
    angles = torch.rand(9, 32, generator=generator) * 6
    table = torch.cat((angles.cos(), angles.sin()), -1)
    positions = torch.tensor([8, 1, 0, 3, 3])
    heads = o.unflatten(-1, (-1, 512)).clone()
    turned = torch.view_as_complex(heads[..., 448:].unflatten(-1, (-1, 2)).contiguous())
    turned = turned * torch.polar(torch.ones(()), angles[positions])[:, None, None]
    heads[..., 448:] = torch.view_as_real(turned).flatten(-2)
    assert torch.allclose(reference.inverse_rotary(heads.flatten(-2), positions, table), o, atol=1e-5)
    back = reference.inverse_rotary(o, positions, table).unflatten(-1, (-1, 512))
    assert torch.equal(back[..., :448], o.unflatten(-1, (-1, 512))[..., :448])


def test_zero_activations_have_a_positive_scale_and_stay_zero() -> None:
    q, s = reference.quantise_activations(torch.zeros(1, 1, BLOCK))
    assert float(s) == pytest.approx(AMAX_FLOOR / 448) and q.float().abs().max() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_odd_activation_makes_its_row_and_no_other_non_finite(value: float) -> None:
    w = torch.randn(1, BLOCK, 2 * BLOCK)
    q, s = reference.quantise_blocks(w)
    o = torch.randn(3, 1, 2 * BLOCK).bfloat16()
    o[1, 0, 7] = value
    for y in (reference.project_quantised(o, q, s), reference.project_blocks(o, q, s)):
        assert not y[1].isfinite().any() and y[[0, 2]].isfinite().all()


@given(seed=st.integers(0, 2**16), exponent=st.integers(-60, 60))
@settings(max_examples=20, deadline=None)
def test_block_quantisation_round_trip(seed: int, exponent: int) -> None:
    w = torch.randn(2, BLOCK, BLOCK, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    q, s = reference.quantise_blocks(w)
    back = reference.dequantise_blocks(q, s, torch.float64)
    limit = torch.maximum(w.double().abs() * 2.0**-4, s.double() * 2.0**-10)
    assert ((back - w.double()).abs() <= limit * (1 + 1e-6)).all()
    again, scale = reference.quantise_blocks(back.float())
    assert torch.allclose(reference.dequantise_blocks(again, scale).double(), back, rtol=1e-6), "quantising twice changes nothing"


@given(seed=st.integers(0, 2**16), exponent=st.integers(-60, 60))
@settings(max_examples=20, deadline=None)
def test_single_scale_reaches_the_largest_value_and_never_passes_it(seed: int, exponent: int) -> None:
    w = torch.randn(1, BLOCK, BLOCK, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    q, s = reference.quantise_single(w)
    assert s.shape == (1,) and q.float().abs().max() == 448
    assert float(s) == pytest.approx(float(w.abs().max()) / 448, rel=1e-6)


def test_an_all_zero_weight_quantises_to_zero() -> None:
    for q, s in (reference.quantise_single(torch.zeros(1, 128, 128)), reference.quantise_blocks(torch.zeros(1, 128, 128))):
        assert q.float().abs().max() == 0 and (s > 0).all() and s.isfinite().all()


@pytest.mark.parametrize("m,g", [(1, 1), (3, 2)])
def test_paths_agree_with_float64_within_what_their_formats_lose(m: int, g: int) -> None:
    torch.manual_seed(0)
    o, w = torch.randn(m, g, 512).bfloat16(), torch.randn(g, 128, 512)
    q, s = reference.quantise_blocks(w)
    dequantised = reference.dequantise_blocks(q, s, torch.float64)
    exact = reference.project_fp64(o, dequantised)
    assert reference.relative_error(reference.project_blocks(o, q, s), exact) < 0.003
    assert reference.relative_error(reference.project(o, dequantised.bfloat16()), exact) < 0.004
    assert reference.relative_error(reference.project_quantised(o, q, s), exact) < 0.03
    single, scale = reference.quantise_single(dequantised)
    exact_single = reference.project_fp64(o, single.double() * scale.double())
    assert reference.relative_error(reference.project_quantised(o, single, scale), exact_single) < 0.03
