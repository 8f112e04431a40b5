"""The run in float64 beside eager: shadows follow storages, decisions are eager's, nothing is left behind."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphs.numerics.high_precision import HighPrecision

Tensor = torch.Tensor
BF16, F64 = torch.bfloat16, torch.float64
CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "grad": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


@pytest.fixture(params=CONTEXTS)
def context(request: pytest.FixtureRequest) -> Callable[[], AbstractContextManager[Any]]:
    return CONTEXTS[request.param]


def run(
    context: Callable[[], AbstractContextManager[Any]], step: Callable[..., Any], *args: Any
) -> tuple[Any, Any, HighPrecision]:
    """What the step gives under the mode, its float64 counterpart, and the mode."""
    mode = HighPrecision()
    with context(), mode:
        eager = step(*args)
    return eager, [mode.of(t) for t in eager] if isinstance(eager, tuple) else mode.of(eager), mode


def numbers(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def chain(x: Tensor, w: Tensor) -> Tensor:
    return F.layer_norm(F.silu(F.linear(x, w, w[0])), (8,)).softmax(-1)


def views(x: Tensor, w: Tensor) -> Tensor:
    y = (x @ w).view(2, 2, 8).transpose(0, 1)[:, 1:].expand(2, 3, 8)
    return torch.cat([y.reshape(6, 8), y[0, :1].squeeze().unsqueeze(0)]).flip(0).chunk(2, 1)[1]


def in_place(x: Tensor, w: Tensor) -> Tensor:
    y = x @ w
    y[1:3].mul_(3)
    y[:, ::2] += y[:, 1::2]
    y.t()[2].exp_()
    return y.clamp_(-2, 2)


def cache_rows(x: Tensor, w: Tensor) -> Tensor:
    cache = torch.zeros(6, 8, dtype=x.dtype)
    new = x @ w
    cache.index_copy_(0, torch.tensor([4, 1]), new[:2])
    cache.index_put_((torch.tensor([2]), torch.tensor([3])), new[3, 3])
    cache.scatter_(1, torch.tensor([[7], [6]]), new[:2, :1])
    cache.scatter_add_(0, torch.zeros(1, 8, dtype=torch.int64), new[1:2])
    cache[5, 2:5] = new[2, 2:5]
    return cache


def between_dtypes(x: Tensor, w: Tensor) -> Tensor:
    y = (x.float() @ w.float()).half()
    out = torch.empty(4, 8, dtype=torch.float32)
    out.copy_(y)
    torch.mul(out, 3, out=out)
    return out.to(x.dtype).double().float()


def attention(x: Tensor, w: Tensor) -> Tensor:
    y = (x @ w).view(1, 2, 2, 8)
    mask = torch.tensor([[True, False], [True, True]])
    return F.scaled_dot_product_attention(y, y * 2, y.neg(), attn_mask=mask) + F.scaled_dot_product_attention(
        y, y, y, is_causal=True
    )


def several(x: Tensor, w: Tensor) -> Tensor:
    a, b = (x @ w).split(4, -1)
    mean, variance = torch.var_mean(a * b, dim=-1)
    torch._foreach_mul_([mean, variance], 2.0)
    return torch.stack([mean, variance, torch.linalg.vector_norm(b, dim=-1), (a - b).amax(-1)])


def complex_numbers(x: Tensor, w: Tensor) -> Tensor:
    z = torch.view_as_complex((x.float() @ w.float()).view(4, 4, 2))
    z = z.conj() * torch.polar(torch.ones(4), torch.arange(4.0))
    torch.view_as_real(z)[..., 0].add_(0.1)
    return torch.view_as_real(z)


@pytest.mark.parametrize(
    "step", [chain, views, in_place, cache_rows, between_dtypes, attention, several, complex_numbers], ids=lambda f: f.__name__
)
def test_the_shadow_is_what_the_step_gives_in_float64(step: Callable[..., Tensor], context: Any) -> None:
    x, w = numbers(4, 8), numbers(8, 8, seed=1)
    eager, precise, mode = run(context, step, x, w)
    with context():
        torch.testing.assert_close(step(x, w), eager, rtol=0, atol=0)
    with context(), DoubleEverywhere():
        wanted = step(x.double(), w.double())
    assert precise.dtype is F64 and not mode.gaps, mode.gaps
    torch.testing.assert_close(precise, wanted.double(), rtol=1e-6, atol=1e-6)
    assert not torch.equal(eager.double(), precise), "eager rounds"


class DoubleEverywhere(torch.overrides.TorchFunctionMode):
    """The step written for 16 bits, with every dtype that it names float64 instead."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {**(kwargs or {})}
        if func in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.to):
            return args[0].double()
        if isinstance(kwargs.get("dtype"), torch.dtype) and kwargs["dtype"].is_floating_point:
            kwargs["dtype"] = F64
        if func is torch.polar or func is torch.view_as_complex:
            args = tuple(a.double() for a in args)
        return func(*args, **kwargs)


def test_choices_and_comparisons_are_those_of_eager(context: Any) -> None:
    def step(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y = x @ w
        values, indices = y.topk(3, -1)
        ordered, order = y.sort(-1, descending=True)
        top, where = y.max(-1)
        return values, ordered, top, torch.where(y > 0, y, -y), y.floor(), indices, order, where, y.argmax(-1)

    x, w = numbers(4, 8), numbers(8, 32, seed=1)
    x[0], w[:, 1:16] = x[0].abs(), w[:, :1]  # many candidates nearly equal
    w[0, 1:16] += 2**-9 * torch.arange(15)
    eager, precise, mode = run(context, step, x, w)
    y = x.double() @ w.double()
    assert not mode.gaps
    for values, indices in ((precise[0], eager[5]), (precise[1], eager[6]), (precise[2].unsqueeze(-1), eager[7].unsqueeze(-1))):
        torch.testing.assert_close(values, y.gather(-1, indices))
    torch.testing.assert_close(precise[3], torch.where((x @ w) > 0, y, -y))
    assert torch.equal(precise[4], eager[4].double())


def test_host_reads_are_those_of_eager(context: Any) -> None:
    def step(x: Tensor) -> Tensor:
        return x * 2 if float(x.sum()) > 0 and bool((x.mean() < 9).all()) else x - 1

    x = numbers(64).abs()
    eager, precise, _ = run(context, step, x)
    assert torch.equal(eager, x * 2) and torch.equal(precise, x.double() * 2)


@pytest.mark.parametrize("name", CONTEXTS)
def test_autocast_rounds_in_eager_only(name: str) -> None:
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), numbers(3, 8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=BF16):
        eager, precise, mode = run(CONTEXTS[name], model, x)
    assert eager.dtype is BF16 and not mode.gaps
    torch.testing.assert_close(precise, model.double()(x.double()).detach())


def test_a_mask_of_the_lowest_number_and_infinities(context: Any) -> None:
    def step(x: Tensor, w: Tensor) -> Tensor:
        mask = torch.full((4, 4), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)
        return ((x @ w).mm(x.t()) + mask).masked_fill(torch.eye(4, dtype=torch.bool).flip(0), -torch.inf).softmax(-1)

    x, w = numbers(4, 8), numbers(8, 8, seed=1)
    eager, precise, mode = run(context, step, x, w)
    assert not mode.gaps and torch.equal(torch.isnan(eager), torch.isnan(precise))
    assert float((eager.double() - precise).nan_to_num().abs().max()) < 0.05


def test_random_draws_are_those_of_eager_and_dropout_is_a_gap(context: Any) -> None:
    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.rand_like(x).exponential_()
        return x.exp() * noise, noise

    eager, precise, mode = run(context, step, numbers(5))
    assert torch.equal(precise[1], eager[1].double()) and not mode.gaps
    torch.testing.assert_close(precise[0], numbers(5).double().exp() * eager[1].double())
    _, _, mode = run(context, lambda x: F.dropout(x.exp(), 0.5, training=True).relu(), numbers(5))
    eager, precise, mode = run(context, lambda x: torch.normal(x.exp(), 1.0), numbers(5))
    assert torch.equal(precise, eager.double()) and "draws random numbers" in next(iter(mode.gaps.values()))


def test_an_operator_of_somebody_else_is_a_gap() -> None:
    @torch.library.custom_op("numerics_test::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return x * 2

    eager, precise, mode = run(torch.no_grad, lambda x: twice(x).exp(), numbers(5))
    assert not mode.gaps, "nothing was rounded before it"
    assert torch.equal(precise, (numbers(5) * 2).double().exp())
    eager, precise, mode = run(torch.no_grad, lambda x: twice(x.exp()), numbers(5))
    assert torch.equal(precise, eager.double())
    assert mode.gaps == {"numerics_test.twice.default": "CannotRaise: not an operator of ATen"}


def test_rounding_to_eight_bits_is_a_gap() -> None:
    eager, precise, mode = run(torch.no_grad, lambda x: x.exp().to(torch.float8_e4m3fn).to(BF16), numbers(5))
    assert torch.equal(precise, eager.double()) and "8 bits" in next(iter(mode.gaps.values()))


def test_memory_written_as_other_numbers_is_read_anew() -> None:
    def step(x: Tensor) -> Tensor:
        y = x.exp()
        y.view(torch.int16)[0] = 0x4000
        return y

    eager, precise, _ = run(torch.no_grad, step, numbers(4))
    assert float(eager[0]) == 2 and float(precise[0]) == 2


@pytest.mark.parametrize("foreign", [False, True])
def test_grouped_products(foreign: bool) -> None:
    if foreign:
        pytest.importorskip("transformers.integrations.moe", reason="transformers is not installed")
    product = torch.ops.transformers.grouped_mm_fallback if foreign else torch._grouped_mm

    def step(x: Tensor, w: Tensor) -> Tensor:
        return product(x.exp(), w, offs=torch.tensor([3, 3, 8], dtype=torch.int32))

    x, w = numbers(8, 16), numbers(3, 16, 8, seed=1)
    _, precise, mode = run(torch.no_grad, step, x, w)
    y = x.double().exp()
    assert not mode.gaps
    torch.testing.assert_close(precise, torch.cat([y[:3] @ w[0].double(), y[3:] @ w[2].double()]))


def test_shadows_go_with_their_tensors_and_weights_have_none() -> None:
    weights = [numbers(64, 64, seed=seed) for seed in range(40)]
    mode, most = HighPrecision(), 0
    with torch.no_grad(), mode:
        y = numbers(2, 64)
        for weight in weights:
            y = torch.relu(y @ weight)
            most = max(most, mode.held)
    del y
    gc.collect()
    assert most <= 4 * 2 * 64 * 8 and mode.held == 0


def test_a_written_weight_is_left_as_eager_leaves_it() -> None:
    cache, twin = numbers(4, 8), numbers(4, 8)
    for tensor, mode in ((cache, HighPrecision()), (twin, nullcontext())):
        with torch.no_grad(), mode:
            tensor[1:3].mul_(0.3)
    assert torch.equal(cache, twin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_other_dtypes(dtype: torch.dtype, context: Any) -> None:
    x, w = numbers(4, 8, dtype=dtype), numbers(8, 8, dtype=dtype, seed=1)
    _, precise, mode = run(context, chain, x, w)
    torch.testing.assert_close(precise, chain(x.double(), w.double()), rtol=1e-12, atol=1e-12)
    assert not mode.gaps
