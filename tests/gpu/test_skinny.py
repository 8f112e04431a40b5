"""``graphs::skinny_linear`` and one-query attention on a device: numbers, launches, and compiled steps that use them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import graphs
from graphs.dynamo.backend import backend_report, graphs_backend
from graphs.observation.launches import count_launches
from graphs.ops.skinny import operator
from tests.models.one_query_attention import OneQueryAttention, pair_of

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.gpu
Tensor = torch.Tensor
linear = torch.ops.graphs.skinny_linear
TOLERANCE = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    with torch.no_grad():
        yield
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("m", "sizes", "k"),
    [(1, (64,), 256), (4, (2048, 512, 512), 2048), (8, (16, 48), 768), (13, (512,), 8192), (16, (128, 128, 128, 128), 1024)],
)
def test_products_agree_with_float64(m: int, sizes: tuple[int, ...], k: int, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    x = torch.randn(m, k, device=device).to(dtype)
    weights = [torch.randn(n, k, device=device).to(dtype) for n in sizes]
    made = linear(x, weights)
    for y, weight in zip(made, weights, strict=True):
        exact = x.double() @ weight.double().t()
        assert (y.double() - exact).abs().max() <= TOLERANCE[dtype] * exact.abs().max()
    assert count_launches(lambda: linear(x, weights), device) == -(-len(sizes) // 3)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 2304, 768), (4, 768, 3072), (1, 50257, 768), (13, 33, 256)])
@pytest.mark.parametrize("turned", [False, True])
def test_biases_and_either_layout_agree_with_float64(
    m: int, n: int, k: int, turned: bool, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(size, device=device).to(dtype) for size in ((m, k), (n, k), (n,)))
    held = weight.t().contiguous().t() if turned else weight
    exact = x.double() @ weight.double().t() + bias.double()
    (made,) = linear(x, [held], [bias])
    assert (made.double() - exact).abs().max() <= TOLERANCE[dtype] * exact.abs().max()
    assert count_launches(lambda: linear(x, [held], [bias]), device) == 1


def test_biases_of_any_strides_and_infinite_values_are_read_as_they_are(device: torch.device) -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(2, 256, device=device).half(), [torch.randn(64, 256, device=device).half() for _ in range(2)]
    biases = [torch.randn(64, 2, device=device).half()[:, 0], torch.randn(1, device=device).half().expand(64)]
    for made, weight, bias in zip(linear(x, weights, biases), weights, biases, strict=True):
        torch.testing.assert_close(made, torch.nn.functional.linear(x, weight, bias), rtol=2**-8, atol=2**-6)
    query, key, value = torch.randn(1, 2, 1, 16, device=device).half(), *torch.randn(2, 1, 2, 20, 16, device=device).half()
    value[0, 0, 3, 5] = torch.inf
    made = torch.ops.graphs.one_query_attention(query, key, value, None, 0.25)
    assert made[0, 0, 0, 5] == torch.inf and made.isfinite().sum() == made.numel() - 1
    bias = torch.full((1, 1, 1, 20), -torch.inf, device=device)
    bias[..., 2] = torch.nan
    assert torch.ops.graphs.one_query_attention(query, key, key, bias, 0.25).isnan().all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
@pytest.mark.parametrize("behind", ["none", "residual", *operator.ACTIVATIONS])
@pytest.mark.parametrize(("m", "n", "k", "turned"), [(1, 3072, 768, True), (4, 2048, 2048, False), (13, 33, 512, False)])
def test_what_is_around_a_product_takes_no_launch_of_its_own(
    m: int, n: int, k: int, turned: bool, behind: str, norm: str, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    x = (torch.randn(m, k, device=device) * 3 + 1).to(dtype)
    weights = [(torch.randn(n, k, device=device) / k**0.5).to(dtype) for _ in range(2 if behind in operator.ACTIVATIONS else 1)]
    held = [weight.t().contiguous().t() for weight in weights] if turned else weights
    gain, shift = torch.randn(2, k, device=device).to(dtype)
    around = {"norm": norm, "gain": None if norm == "none" else gain, "shift": shift if norm == "layer" else None, "eps": 1e-5}
    around |= {"activation": behind} if behind in operator.ACTIVATIONS else {}
    around |= {"residual": torch.randn(m, n, device=device).to(dtype)} if behind == "residual" else {}
    for some in [held[:1], held] if len(held) > 1 else [held]:
        (made,) = linear(x, some, **around)
        wide = {name: one.double() if isinstance(one, Tensor) else one for name, one in around.items()}
        (exact,) = operator.products(x.double(), [one.double() for one in some], **wide)
        assert (made.double() - exact).abs().max() <= 3 * TOLERANCE[dtype] * exact.abs().max()  # rounded up to three times
        assert count_launches(lambda some=some: linear(x, some, **around), device) == 1
        assert torch.equal(made, linear(x, some, **around)[0])


@pytest.mark.parametrize(
    ("batch", "heads", "groups", "length", "width"),
    [(1, 12, 12, 192, 64), (4, 32, 8, 192, 64), (2, 16, 1, 1000, 128), (1, 4, 2, 9000, 256), (3, 2, 2, 5, 16)],
)
@pytest.mark.parametrize("filled", [1.0, 0.2])
def test_attention_agrees_with_float64(
    batch: int, heads: int, groups: int, length: int, width: int, filled: float, device: torch.device
) -> None:
    torch.manual_seed(0)
    query = torch.randn(batch, heads, 1, width, device=device).bfloat16()
    key, value = torch.randn(2, batch, groups, length, width, device=device).bfloat16()
    places = int(filled * length) or 1
    mask = torch.where(torch.arange(length, device=device) < places, 0.0, -torch.inf).expand(batch, 1, 1, length)
    shares = [states.double().repeat_interleave(heads // groups, 1) for states in (key, value)]
    exact = torch.nn.functional.scaled_dot_product_attention(query.double(), *shares, mask.double())
    key[:, :, 2 * places + 512 :], value[:, :, 2 * places + 512 :] = float("nan"), float("nan")  # parts that nobody sees
    made = torch.ops.graphs.one_query_attention(query, key, value, mask, width**-0.5)
    assert (made.double() - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_what_no_tile_fits_is_multiplied_by_the_library(device: torch.device) -> None:
    x, weight = torch.randn(20, 256, device=device).bfloat16(), torch.randn(24, 256, device=device).bfloat16()
    assert torch.equal(linear(x, [weight])[0], x @ weight.t())


def test_rows_that_do_not_lie_together_are_read_as_they_are(device: torch.device) -> None:
    held, weight = torch.randn(8, 512, device=device).bfloat16(), torch.randn(64, 256, device=device).bfloat16()
    (y,) = linear(held[::2, ::2], [weight])
    torch.testing.assert_close(y, held[::2, ::2] @ weight.t(), rtol=2e-2, atol=0.2)


def pair(device: torch.device) -> tuple[OneQueryAttention, OneQueryAttention]:
    return pair_of(OneQueryAttention(64, masked=True).to(device, torch.bfloat16))


def inputs(device: torch.device, position: int) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 1, 256, device=device).bfloat16(), torch.tensor([position], device=device)


@pytest.mark.parametrize("way", ["capture", "backend"])
def test_compiled_steps_are_rewritten_and_agree_with_eager(way: str, device: torch.device) -> None:
    model, twin = pair(device)
    options = {"skinny_products": True, "one_query_attention": True, "force_disable_caches": True}
    if way == "capture":
        step = graphs.capture(model, compiler="inductor", compiler_options=options)
    else:
        step = torch.compile(model, backend=graphs_backend, options={"compiler_options": options})
    for position in range(4):
        x = inputs(device, position)
        torch.testing.assert_close(step(*x), twin(*x), rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(model.keys, twin.keys, rtol=1e-2, atol=1e-2)
    if way == "capture":
        assert step.report().keys[0].rewrites == {"one_query_attention": 1, "skinny_products": 3}
    else:
        assert sum(rewrite.startswith("skinny_products") for rewrite in backend_report().pieces[-1].rewrites) == 3
    model.q.weight.mul_(2)  # weights are read where they are
    twin.q.weight.mul_(2)
    x = inputs(device, 4)
    torch.testing.assert_close(step(*x), twin(*x), rtol=2e-2, atol=2e-2)


def test_what_a_boolean_mask_hides_is_not_read_in_a_compiled_step(device: torch.device) -> None:
    """Whatever a library's attention is given for it: torch up to 2.11 hands cuDNN -65504, not ``-inf``."""
    if not operator.pays_on(device):
        pytest.skip(f"compute capability {torch.cuda.get_device_capability(device)}, measured on (9, 0)")
    model, twin = pair_of(OneQueryAttention(2048, masked=True).to(device, torch.bfloat16))
    step = graphs.capture(model, compiler="inductor", compiler_options={"force_disable_caches": True})
    for position in range(3):
        x = inputs(device, position)
        torch.testing.assert_close(step(*x), twin(*x), rtol=2e-2, atol=2e-2)
        model.keys[:, :, 512:], model.values[:, :, 512:] = float("nan"), float("nan")
    assert step.report().keys[0].rewrites["one_query_attention"] == 1


def test_both_are_on_where_they_were_measured(device: torch.device) -> None:
    if not operator.pays_on(device):
        pytest.skip(f"compute capability {torch.cuda.get_device_capability(device)}, measured on (9, 0)")
    model, _ = pair(device)
    step = graphs.capture(model, compiler="inductor", compiler_options={"force_disable_caches": True})
    step(*inputs(device, 0))
    assert set(step.report().keys[0].rewrites) == {"one_query_attention", "skinny_products"}
