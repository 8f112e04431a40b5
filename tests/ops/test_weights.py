"""Loading and preparation: every format a checkpoint may hold, every way it may be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphs.errors import ConfigError, WeightError
from graphs.ops.wo_a import reference, weights

G, N, K = 2, 256, 384
FP8 = torch.float8_e4m3fn


def checkpoint(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """An FP8 weight and UE8M0 block scales, flat as on disk: ``[G*N, K]`` and ``[G*N/128, K/128]``."""
    generator = torch.Generator().manual_seed(seed)
    data = reference.round_fp8(torch.randn(G * N, K, generator=generator) * 100)
    scale = torch.randint(110, 130, (G * N // 128, K // 128), generator=generator, dtype=torch.uint8)
    return data, scale


def as_float32(scale: torch.Tensor) -> torch.Tensor:
    return torch.exp2(scale.double() - 127).float()


@pytest.mark.parametrize("grouped_weight", [False, True])
@pytest.mark.parametrize("grouped_scale", [False, True])
@pytest.mark.parametrize("form", ["uint8", "e8m0", "float32"])
def test_every_layout_and_scale_format_is_the_same_weight(grouped_weight: bool, grouped_scale: bool, form: str) -> None:
    data, scale = checkpoint()
    expected = reference.dequantise_blocks(data, as_float32(scale), torch.float64).reshape(G, N, K)
    given_scale = {"uint8": scale, "e8m0": scale.view(torch.float8_e8m0fnu), "float32": as_float32(scale)}[form]
    loaded = weights.load(
        data.reshape(G, N, K) if grouped_weight else data,
        given_scale.reshape(G, N // 128, K // 128) if grouped_scale else given_scale,
        None if grouped_weight else G,
    )
    assert loaded.scale is not None and loaded.scale.dtype == torch.float32
    assert torch.equal(reference.dequantise_blocks(loaded.data, loaded.scale, torch.float64), expected)


def test_ue8m0_restated_is_exact_for_every_byte() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    values = weights.from_ue8m0(every)
    assert torch.equal(values[:255].double(), torch.exp2(every[:255].double() - 127)) and values[255].isnan()
    restated = weights.to_ue8m0(values[:255])
    assert restated is not None and torch.equal(restated, every[:255])


@given(st.floats(2.0**-126, 2.0**126, width=32))
@settings(max_examples=100, deadline=None)
def test_a_scale_that_is_no_power_of_two_stays_float32(value: float) -> None:
    scale = torch.tensor([[1.0, value]])
    restated = weights.to_ue8m0(scale)
    if torch.frexp(scale[0, 1]).mantissa == 0.5:
        assert restated is not None and torch.equal(weights.from_ue8m0(restated), scale)
    else:
        assert restated is None


def test_block_scales_reach_gloop_and_fused_untouched() -> None:
    data, _ = checkpoint()
    odd = torch.rand(G * N // 128, K // 128) + 0.1
    for path in weights.BLOCK_SCALED:
        prepared = weights.prepare(weights.load(data, odd, G), path)
        assert prepared.scale is not None
        assert torch.equal(prepared.scale.flatten(), odd.flatten())
        assert torch.equal(prepared.data.view(torch.uint8).flatten(), data.view(torch.uint8).flatten())


def test_einsum_weight_is_exact_for_power_of_two_scales() -> None:
    loaded = weights.load(*checkpoint(), G)
    prepared = weights.prepare(loaded, "einsum")
    assert loaded.scale is not None and prepared.scale is None and prepared.data.dtype == torch.bfloat16
    assert torch.equal(prepared.data.double(), reference.dequantise_blocks(loaded.data, loaded.scale, torch.float64))


@pytest.mark.parametrize("path", weights.PATHS)
@pytest.mark.parametrize("kind", ["fp8", "bf16"])
def test_preparing_twice_changes_nothing(path: str, kind: str) -> None:
    loaded = weights.load(*checkpoint(), G) if kind == "fp8" else weights.load(torch.randn(G, N, K).bfloat16())
    once = weights.prepare(loaded, path)
    assert weights.prepare(once, path) is once
    assert once.data.shape == (G, N, K) and (once.scale is None) == (path == "einsum")


def test_block_scaled_paths_share_a_preparation_and_the_others_do_not() -> None:
    prepared = weights.prepare(weights.load(*checkpoint(), G), "gloop")
    assert weights.prepare(prepared, "fused").data is prepared.data
    with pytest.raises(WeightError, match="prepared for 'gloop' cannot serve 'bmm'"):
        weights.prepare(prepared, "bmm")


@pytest.mark.parametrize("path", weights.PATHS)
def test_a_bfloat16_weight_needs_no_scale_and_a_stale_one_is_ignored(path: str) -> None:
    w = torch.randn(G * N, K).bfloat16()
    with pytest.warns(UserWarning, match="stale"):
        loaded = weights.load(w, torch.full((3, 3), float("nan")), G)
    prepared = weights.prepare(loaded, path)
    back = prepared.data.float()
    if prepared.scale is not None:
        back = back * (prepared.scale if path == "bmm" else reference.expand_blocks(prepared.scale))
    assert reference.relative_error(back, w.reshape(G, N, K)) < (0.03 if path != "einsum" else 1e-9)


@given(seed=st.integers(0, 2**16), exponent=st.integers(-100, 100))
@settings(max_examples=20, deadline=None)
def test_fnuz_holds_the_same_numbers(seed: int, exponent: int) -> None:
    bits = torch.randint(0, 256, (1, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    bits[(bits & 0x7F) == 0x7F] = 0x80  # NaN does not pass loading; minus zero must
    scale = torch.full((1, 1, 1), 1.5 * 2.0**exponent)
    data, doubled = weights.to_fnuz(bits.view(FP8), scale)
    assert not (data.view(torch.uint8) == 0x80).any()
    assert torch.equal(
        reference.dequantise_blocks(data, doubled, torch.float64),
        reference.dequantise_blocks(bits.view(FP8), scale, torch.float64),
    )
    assert weights.to_fnuz(data, doubled)[0] is data, "re-tagging twice changes nothing"


def test_fnuz_preparation_of_every_quantised_path() -> None:
    loaded = weights.load(*checkpoint(), G)
    exact = weights.prepare(loaded, "einsum").data.double()
    for path in ("bmm", "gloop", "fused"):
        prepared = weights.prepare(loaded, path, torch.float8_e4m3fnuz)
        assert prepared.scale is not None and prepared.data.dtype == torch.float8_e4m3fnuz
        factor = prepared.scale if path == "bmm" else reference.expand_blocks(prepared.scale)
        error = reference.relative_error(prepared.data.double() * factor.double(), exact)
        assert error == 0 if path != "bmm" else error < 0.05


@st.composite
def checkpoints(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Any finite bytes (zeros and subnormals in plenty), scales of any size in either form, and the float64 weight they mean."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    n, k = draw(st.sampled_from([(128, 128), (256, 128), (128, 384)]))
    bits = torch.randint(0, 256, (n, k), dtype=torch.uint8, generator=generator)
    bits[(bits & 0x7F) == 0x7F] = 0x80
    small = draw(st.sampled_from([0x87, 0xFF]))  # only subnormals, or everything
    bits &= small
    shape = (n // 128, k // 128)
    lowest = draw(st.integers(0, 240))
    exponents = torch.randint(lowest, min(lowest + 8, 246), shape, dtype=torch.uint8, generator=generator)  # 448 * 2**118 fits
    scale = as_float32(exponents)
    stored: torch.Tensor = exponents
    if draw(st.booleans()):
        scale = stored = (scale.double() * (1 + torch.rand(shape, generator=generator).double())).float()
    return bits.view(FP8), stored, reference.dequantise_blocks(bits.view(FP8), scale, torch.float64)[None]


@given(checkpoints(), st.sampled_from([FP8, torch.float8_e4m3fnuz]))
@settings(max_examples=60, deadline=None)
def test_every_path_stands_for_the_numbers_of_the_checkpoint(
    made: tuple[torch.Tensor, torch.Tensor, torch.Tensor], fp8: torch.dtype
) -> None:
    data, stored, exact = made
    loaded = weights.load(data, stored, 1)
    for path in weights.PATHS:
        prepared = weights.prepare(loaded, path, fp8)
        assert weights.prepare(prepared, path, fp8) is prepared
        if prepared.scale is None:  # bfloat16: eight bits, and subnormals below 2**-126
            assert ((prepared.data.double() - exact).abs() <= exact.abs() * 2.0**-8 + 2.0**-133).all()
        elif path == "bmm":  # one scale: half a quantum of the value, or of the smallest step
            found, step = prepared.data.double() * prepared.scale.double(), prepared.scale.double() * 2.0**-10
            assert ((found - exact).abs() <= torch.maximum(exact.abs() * 2.0**-4, step) * (1 + 1e-6) + 1e-44).all()
        else:
            assert torch.equal(prepared.data.double() * reference.expand_blocks(prepared.scale).double(), exact)


def test_a_scale_too_large_to_double_is_refused() -> None:
    with pytest.raises(WeightError, match="overflows float32"):
        weights.to_fnuz(torch.zeros(1, 128, 128).to(FP8), torch.full((1, 1, 1), 3e38))


def test_extreme_scales_load_exactly() -> None:
    for byte in (0, 1, 200):
        loaded = weights.load(torch.ones(1, 128, 128).to(FP8), torch.full((1, 1), byte, dtype=torch.uint8))
        assert float(weights.prepare(loaded, "einsum").data[0, 0, 0].double()) == 2.0 ** (byte - 127)


ONES = torch.ones(2, 1, 1)
BAD = {
    "weight dtype": (lambda: (torch.zeros(2, 128, 128), None, None), r"weight is torch.float32; legal are torch.bfloat16"),
    "weight rank": (lambda: (torch.zeros(128).bfloat16(), None, None), r"shape \(128,\); legal are \[G, N, K\]"),
    "empty": (lambda: (torch.zeros(2, 0, 128).bfloat16(), None, None), r"shape \(2, 0, 128\)"),
    "no groups": (lambda: (torch.zeros(256, 128).bfloat16(), None, None), r"needs groups=G.*got None"),
    "groups do not divide": (lambda: (torch.zeros(256, 128).bfloat16(), None, 3), r"divisor of 256; got 3"),
    "groups contradict": (lambda: (torch.zeros(2, 128, 128).bfloat16(), None, 4), r"groups = 4 contradicts"),
    "no scale": (lambda: (torch.zeros(2, 128, 128).to(FP8), None, None), r"came without a scale"),
    "scale shape": (lambda: (torch.zeros(2, 128, 256).to(FP8), ONES, None), r"\(2, 1, 1\).*legal are \[2, 1, 2\] and \[2, 2\]"),
    "scale dtype": (
        lambda: (torch.zeros(2, 128, 128).to(FP8), ONES.half(), None),
        r"scale is torch.float16; legal are torch.float32",
    ),
    "nan scale": (lambda: (torch.zeros(2, 128, 128).to(FP8), ONES * float("nan"), None), r"2 of 2 scales.*first is nan"),
    "zero scale": (lambda: (torch.zeros(2, 128, 128).to(FP8), ONES * 0, None), r"not positive finite.*first is 0.0"),
    "negative scale": (lambda: (torch.zeros(2, 128, 128).to(FP8), -ONES, None), r"first is -1.0"),
    "infinite scale": (lambda: (torch.zeros(2, 128, 128).to(FP8), ONES / 0, None), r"first is inf"),
    "ue8m0 nan": (lambda: (torch.zeros(2, 128, 128).to(FP8), torch.full((2, 1), 255, dtype=torch.uint8), None), r"first is nan"),
    "N": (lambda: (torch.zeros(2, 100, 128).to(FP8), ONES, None), r"N = 100, K = 128.*multiples of 128"),
    "K": (lambda: (torch.zeros(2, 128, 96).to(FP8), ONES, None), r"N = 128, K = 96"),
    "nan weight": (lambda: (torch.full((2, 128, 128), 0x7F, dtype=torch.uint8).view(FP8), ONES, None), r"holds 32768 NaN"),
    "too large": (lambda: (torch.ones(2, 128, 128).to(FP8), ONES * 3.4e38, None), r"leaves bfloat16's range"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_weights_are_named(case: str) -> None:
    arguments, message = BAD[case]
    with pytest.raises(WeightError, match=message):
        weights.load(*arguments())


def test_preparation_refuses_what_a_path_cannot_use() -> None:
    loaded = weights.load(torch.zeros(1, 100, 60).bfloat16())
    assert weights.prepare(loaded, "einsum").data is loaded.data
    for path in ("bmm", "gloop", "fused"):
        with pytest.raises(WeightError, match="N = 100, K = 60"):
            weights.prepare(loaded, path)
    with pytest.raises(ConfigError, match=r"path = 'bmn' is not legal; it must be one of 'einsum', 'bmm', 'gloop', 'fused'"):
        weights.prepare(loaded, "bmn")
    with pytest.raises(WeightError, match="NaN or Inf"):
        weights.prepare(weights.load(torch.full((1, 128, 128), float("inf")).bfloat16()), "bmm")


def test_bytes_per_path() -> None:
    sizes = weights.path_bytes(G, N, K)
    for path in weights.PATHS:
        assert weights.prepare(weights.load(*checkpoint(), G), path).nbytes == sizes[path]
    assert all(sizes[path] <= 0.51 * sizes["einsum"] for path in ("bmm", "gloop", "fused"))


@pytest.mark.parametrize("suffix", weights.SCALE_SUFFIXES)
@pytest.mark.parametrize("source", ["state dict", "safetensors"])
def test_a_checkpoint_is_read_by_name(suffix: str, source: str, tmp_path: Path) -> None:
    data, scale = checkpoint()
    state = {"layer.wo_a.weight": data, f"layer.wo_a.{suffix}": as_float32(scale), "layer.other.weight": torch.zeros(1)}
    if source == "safetensors":
        from safetensors.torch import save_file

        save_file(state, tmp_path / "model.safetensors")
        loaded = weights.from_safetensors(tmp_path / "model.safetensors", "layer.wo_a", G)
    else:
        loaded = weights.from_state_dict(state, "layer.wo_a", G)
    assert loaded.scale is not None and torch.equal(loaded.scale.flatten(), as_float32(scale).flatten())
    assert torch.equal(loaded.data.view(torch.uint8).flatten(), data.view(torch.uint8).flatten())


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a.weight": torch.zeros(1)}, tmp_path / "m.safetensors")
    with pytest.raises(WeightError, match=r"'b.weight' is not in .*m.safetensors; it has a.weight"):
        weights.from_safetensors(tmp_path / "m.safetensors", "b")
    with pytest.raises(WeightError, match=r"'b\.weight' is not in the state dict; it has no tensors"):
        weights.from_state_dict({}, "b")
