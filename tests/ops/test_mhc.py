"""``graphs::mhc_*`` without a GPU: their meaning, their errors, their kernels in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from graphs.errors import WeightError
from graphs.ops.mhc import operator, tiles
from tests.ops.interpreted import interpreted

SCRIPT = Path(__file__).with_name("interpret_mhc.py")
DTYPES = (torch.float32, torch.bfloat16)
ops = torch.ops.graphs
Tensor = torch.Tensor


def layer(outputs: int, scales: int, features: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.randn(outputs, features) / features**0.5
    return weight.to(dtype), torch.randn(outputs).to(dtype), torch.randn(scales).to(dtype)


def behind(*rows: int, hc: int = 4, width: int = 16, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    out, streams = torch.randn(*rows, width).to(dtype), torch.randn(*rows, hc, width).to(dtype)
    return out, streams, torch.rand(*rows, hc), torch.rand(*rows, hc, hc)


@pytest.fixture(params=["connection", "head"])
def module(request: pytest.FixtureRequest) -> Any:
    """A module of transformers' with weights that are not those it begins with."""
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    from transformers import DeepseekV4Config

    kind = {"connection": "DeepseekV4HyperConnection", "head": "DeepseekV4HyperHead"}[request.param]
    made = getattr(modeling, kind)(DeepseekV4Config(hidden_size=64))
    torch.manual_seed(0)
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return made.requires_grad_(False)


@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_they_are_what_the_models_modules_compute(module: Any, dtype: torch.dtype, weights: torch.dtype) -> None:
    streams, module = torch.randn(2, 3, 4, 64).to(dtype), module.to(weights)
    norm_eps = module.input_norm.eps
    if hasattr(module, "fn"):
        made = ops.mhc_pre(streams, module.fn, module.base, module.scale, norm_eps, module.hc_eps, module.hc_sinkhorn_iters)
        post, comb, mixed = module(streams)
        expected = mixed, post, comb
    else:
        made = (ops.mhc_head(streams, module.hc_fn, module.hc_base, module.hc_scale, norm_eps, module.eps),)
        expected = (module(streams),)
    for one, wanted in zip(made, expected, strict=True):
        assert torch.equal(one, wanted) and one.dtype == wanted.dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_behind_a_block_they_are_what_the_models_layer_computes(dtype: torch.dtype) -> None:
    out, streams, post, comb = behind(2, 3, dtype=dtype)
    expected = post.to(dtype).unsqueeze(-1) * out.unsqueeze(-2) + torch.matmul(comb.to(dtype).transpose(-1, -2), streams)
    assert torch.equal(ops.mhc_post(out, streams, post, comb), expected)


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.integers(1, 3), max_size=2), hc=st.integers(1, 5), width=st.integers(1, 33), iterations=st.integers(1, 3))
def test_both_at_once_are_one_after_the_other(rows: list[int], hc: int, width: int, iterations: int) -> None:
    given_, weights = behind(*rows, hc=hc, width=width), layer((2 + hc) * hc, 3, hc * width)
    streams = ops.mhc_post(*given_)
    expected = streams, *ops.mhc_pre(streams, *weights, 1e-6, 1e-6, iterations)
    for one, wanted in zip(ops.mhc_post_pre(*given_, *weights, 1e-6, 1e-6, iterations), expected, strict=True):
        assert torch.equal(one, wanted) and one.shape == wanted.shape


CALLS = {
    "mhc_pre": lambda: (behind(3)[1], *layer(24, 3, 64), 1e-6, 1e-5, 4),
    "mhc_post": lambda: behind(3),
    "mhc_post_pre": lambda: (*behind(3), *layer(24, 3, 64, torch.bfloat16), 1e-6, 1e-5, 4),
    "mhc_head": lambda: (behind(3)[1], *layer(4, 1, 64), 1e-6, 1e-5),
}


@pytest.mark.parametrize("name", CALLS)
def test_they_pass_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(ops, name).default, CALLS[name]())


@pytest.mark.parametrize("name", CALLS)
def test_autocast_and_inference_mode_change_nothing(name: str) -> None:
    arguments = CALLS[name]()
    expected = getattr(ops, name)(*arguments)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        made = getattr(ops, name)(*arguments)
    for one, wanted in zip(tree_leaves(made), tree_leaves(expected), strict=True):
        assert torch.equal(one, wanted) and one.dtype == wanted.dtype


STREAMS = torch.ones(3, 4, 16)


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("mhc_pre", (torch.ones(3), *layer(24, 3, 64), 0.0, 0.0, 1), r"shape \(3,\); legal are \[..., H, D\]"),
        ("mhc_pre", (STREAMS.long(), *layer(24, 3, 64), 0.0, 0.0, 1), "torch.int64 of shape"),
        ("mhc_pre", (STREAMS, *layer(23, 3, 64), 0.0, 0.0, 1), r"have \(23, 64\), .* legal are \(24, 64\), \(24,\), \(3,\)"),
        ("mhc_pre", (STREAMS, *layer(24, 1, 64), 0.0, 0.0, 1), r"legal are \(24, 64\), \(24,\), \(3,\)"),
        ("mhc_pre", (STREAMS, *layer(24, 3, 64, torch.float64), 0.0, 0.0, 1), "fn is torch.float64 on"),
        ("mhc_pre", (STREAMS, *layer(24, 3, 64), 0.0, 0.0, 0), "0 iterations; legal are 1 or more"),
        ("mhc_post", (*behind(3)[:3], torch.ones(3, 4)), r"legal are \(3, 16\), \(3, 4\), \(3, 4, 4\)"),
        ("mhc_post", (torch.ones(3, 16), *behind(3)[1:]), "out is torch.float32 on .*; legal is torch.bfloat16"),
        ("mhc_post", (*behind(3)[:3], torch.ones(3, 4, 4).half()), "comb is torch.float16 on .*; legal is torch.float32"),
        ("mhc_post_pre", (*behind(3), *layer(4, 1, 64), 0.0, 0.0, 1), r"mhc_post_pre: .* legal are \(24, 64\)"),
        ("mhc_head", (STREAMS, *layer(24, 3, 64), 0.0, 0.0), r"legal are \(4, 64\), \(4,\), \(1,\)"),
    ],
)
def test_operands_that_do_not_fit_are_named(name: str, arguments: tuple[Any, ...], message: str, fake: bool) -> None:
    given_ = [one.to("meta") if fake and isinstance(one, Tensor) else one for one in arguments]
    with pytest.raises(WeightError, match=message):
        getattr(ops, name)(*given_)


@pytest.mark.parametrize(("rows", "hc", "width"), [(0, 4, 64), (65, 4, 64), (1, 3, 64), (1, 16, 64), (1, 4, 48)])
def test_operators_of_torch_compute_what_no_tile_fits(rows: int, hc: int, width: int) -> None:
    assert tiles.few(rows, hc, width) is None


def test_the_linear_layer_is_read_by_as_many_programs_as_there_are_multiprocessors() -> None:
    tile = tiles.few(4, 4, 4096)
    assert tile is not None
    assert 4096 // tile.columns == 128


def test_they_are_used_on_the_devices_they_were_written_for_only() -> None:
    assert not operator.pays_on(torch.device("cpu"))


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    return interpreted(SCRIPT)


def test_the_interpreted_kernels_agree_with_float64(errors: dict[str, float]) -> None:
    assert errors.keys() == {"pre", "post", "post_pre", "head"}
    assert max(errors.values()) < 1e-6, errors
