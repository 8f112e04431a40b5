"""Attention of one query as sums: against float64, and what is left to the library."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import passes
from graphs.ops.attention import operator as attention_operator
from passes.optimize.operators.one_query_attention import one_query_attention

REPLACE = partial(one_query_attention, longest=32)
attention = torch.nn.functional.scaled_dot_product_attention
Q, K, V = torch.randn(2, 3, 1, 16), torch.randn(2, 3, 32, 16), torch.randn(2, 3, 32, 8 + 8)


def half(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.bfloat16() for tensor in tensors)


def traced(step: Callable[..., Any], *args: Any) -> GraphModule:
    return make_fx(step, tracing_mode="fake")(*args)


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = q.double() @ k.double().transpose(-1, -2) * scale
    scores = scores if mask is None else scores + mask.double()
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v.double()


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("masked", [False, True])
def test_sums_agree_with_float64(masked: bool, scale: float | None) -> None:
    torch.manual_seed(0)
    q, k, v = half(Q, K, V)
    mask = torch.zeros(2, 1, 1, 32).bfloat16().masked_fill(torch.rand(2, 1, 1, 32) < 0.5, -torch.inf) if masked else None
    module = traced(lambda *args: attention(*args, scale=scale), q, k, v, mask)
    (change,) = passes.run(module, [REPLACE])
    assert "attention" in change.before and "attention" not in str(module.graph)
    made = module(q, k, v, mask)
    assert made.dtype == torch.bfloat16 and made.shape == (2, 3, 1, 16)
    torch.testing.assert_close(made.double(), exact(q, k, v, mask, scale or 0.25), rtol=2**-8, atol=1e-6)


def test_a_row_that_is_masked_everywhere_is_zero_and_the_other_is_not() -> None:
    q, k, v = half(Q, K, V)
    mask = torch.zeros(2, 1, 1, 32).bfloat16()
    mask[1] = -torch.inf
    module = traced(attention, q, k, v, mask)
    assert passes.run(module, [REPLACE])
    made = module(q, k, v, mask)
    assert torch.equal(made[1], torch.zeros_like(made[1])) and made[0].abs().min() > 0


@pytest.mark.parametrize("written_out", [False, True])
def test_only_repeated_keys_where_that_is_asked_for(written_out: bool) -> None:
    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t[:, :, None].expand(2, 1, 3, 32, 16) for t in (k, v))
        if written_out:
            k, v = k.clone(memory_format=torch.contiguous_format), v.clone(memory_format=torch.contiguous_format)
        return attention(q, k.reshape(2, 3, 32, 16), v.reshape(2, 3, 32, 16))

    q, k, v = half(Q, K, V)
    assert passes.run(traced(attention, q, k, v), [partial(REPLACE, grouped=True)]) == []
    module = traced(step, q, k[:, :1], v[:, :1])
    assert passes.run(module, [partial(REPLACE, grouped=True)])
    torch.testing.assert_close(module(q, k[:, :1], v[:, :1]), step(q, k[:, :1], v[:, :1]), rtol=2e-2, atol=2e-2)


def test_large_scores_do_not_overflow() -> None:
    q, k, v = half(Q * 1000, K * 1000, V)
    module = traced(attention, q, k, v)
    assert passes.run(module, [REPLACE])
    torch.testing.assert_close(module(q, k, v).double(), exact(q, k, v, None, 0.25), rtol=2**-8, atol=1e-6)


def test_not_a_number_stays_in_its_row() -> None:
    q, k, v = half(Q, K, V)
    q[0, 1] = torch.nan
    module = traced(attention, q, k, v)
    assert passes.run(module, [REPLACE])
    lost = module(q, k, v).isnan().all(-1).squeeze(-1)
    assert lost.tolist() == [[False, True, False], [False, False, False]]


@pytest.mark.parametrize(
    ("step", "args"),
    [
        pytest.param(attention, half(Q.expand(2, 3, 2, 16), K, V), id="two queries"),
        pytest.param(lambda *args: attention(*args, is_causal=True), half(Q, K, V), id="causal"),
        pytest.param(attention, (Q, K, V), id="32 bits"),
        pytest.param(attention, half(Q, K.repeat(1, 1, 2, 1), V.repeat(1, 1, 2, 1)), id="more keys than fit"),
        pytest.param(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, half(Q, K, V), id="its logarithms are used"),
    ],
)
def test_the_rest_is_left_to_the_library(step: Callable[..., Any], args: tuple[Tensor, ...]) -> None:
    module = traced(step, *args)
    before = str(module.graph)
    assert passes.run(module, [REPLACE]) == []
    assert str(module.graph) == before


def repeated(states: Tensor, times: int) -> Tensor:
    batch, groups, length, width = states.shape
    return states[:, :, None].expand(batch, groups, times, length, width).reshape(batch, groups * times, length, width)


BY_OPERATOR = partial(
    one_query_attention,
    longest=32,
    grouped=True,
    operator=torch.ops.graphs.one_query_attention.default,
    fits=attention_operator.fits,
)


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("length", [32, 5000])
def test_an_operator_takes_keys_before_they_are_repeated(times: int, length: int) -> None:
    q, k, v = half(torch.randn(2, 6, 1, 16), *torch.randn(2, 2, 6 // times, length, 16))
    mask = torch.zeros(2, 1, 1, length).bfloat16().masked_fill(torch.arange(length) > 20, -torch.inf)
    module = traced(lambda q, k, v, mask: attention(q, repeated(k, times), repeated(v, times), mask), q, k, v, mask)
    (change,) = passes.run(module, [BY_OPERATOR])
    (made,) = [node for node in module.graph.nodes if node.target is torch.ops.graphs.one_query_attention.default]
    assert made.args[1].meta["val"].shape[1] == 6 // times and "one_query_attention" in change.after
    assert not any("clone" in str(node.target) for node in module.graph.nodes), "nothing is repeated any more"
    wanted = exact(q, repeated(k, times), repeated(v, times), mask, 0.25)
    torch.testing.assert_close(module(q, k, v, mask).double(), wanted, rtol=2**-8, atol=1e-3)


def test_what_the_operator_does_not_take_is_made_of_sums_or_left() -> None:
    q, k, v = half(torch.randn(2, 4, 1, 24), *torch.randn(2, 2, 2, 32, 24))  # a width that is no power of two
    module = traced(lambda q, k, v: attention(q, repeated(k, 2), repeated(v, 2)), q, k, v)
    assert len(passes.run(module, [BY_OPERATOR])) == 1 and "graphs" not in str(module.graph)
    assert passes.run(traced(lambda q, k, v: attention(q, k, v), q[:, :2], k, v), [BY_OPERATOR]) == []


def by_cudnn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, mask, False)[0]


def by_efficient(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask.expand(2, 3, 1, 32), False)[0]


def as_bias(mask: Tensor, hidden: float, mode: str = "hidden where not seen") -> Tensor:
    number, zero = (torch.scalar_tensor(value, dtype=torch.bfloat16) for value in (hidden, 0.0))
    return torch.where(mask, zero, number) if mode == "hidden where not seen" else torch.where(mask, number, zero)


def masks_of(module: GraphModule) -> list[Tensor]:
    return [
        node.args[3].meta["val"] for node in module.graph.nodes if node.target is torch.ops.graphs.one_query_attention.default
    ]


@pytest.mark.parametrize(
    ("library", "hidden"),
    [(attention, -torch.inf), (by_efficient, -torch.inf), (by_cudnn, -torch.inf), (by_cudnn, -65504.0)],
)
@pytest.mark.parametrize("mode", ["hidden where not seen", "hidden where true"])
@pytest.mark.parametrize("size", [(2, 1, 1, 32), (1, 32)])
def test_the_operator_is_given_the_boolean_mask(
    library: Callable[..., Any], hidden: float, mode: str, size: tuple[int, ...]
) -> None:
    if library is by_efficient and len(size) == 2:
        pytest.skip("torch gives that operator a mask of four dimensions")
    q, k, v = half(Q, K, V)
    seen = torch.arange(32).expand(size) < 9
    given = seen if mode == "hidden where not seen" else ~seen
    module = traced(lambda q, k, v, mask: library(q, k, v, as_bias(mask, hidden, mode)), q, k, v, given)
    assert passes.run(module, [BY_OPERATOR])
    (mask,) = masks_of(module)
    assert mask.dtype is torch.bool and mask.dim() == 4
    made = module(q, k, v, given).double()
    torch.testing.assert_close(made, exact(q, k, v, as_bias(seen, -torch.inf), 0.25), rtol=2**-8, atol=1e-3)


def test_layers_share_a_boolean_mask() -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
        return attention(attention(q, k, v, mask), k, v, mask)

    q, k, v = half(Q, K, V)
    module = traced(step, q, k, v, torch.ones(2, 1, 1, 32, dtype=torch.bool))
    assert len(passes.run(module, [BY_OPERATOR])) == 2
    module.graph.eliminate_dead_code()
    assert not any(node.target is torch.ops.aten.where.self for node in module.graph.nodes)


@pytest.mark.parametrize(
    ("library", "bias"),
    [
        pytest.param(attention, lambda mask: as_bias(mask, -65504.0), id="a number of the model's own"),
        pytest.param(by_cudnn, lambda mask: as_bias(mask, -100.0), id="another number"),
        pytest.param(by_cudnn, lambda mask: as_bias(mask, -torch.inf) + 1, id="something is added"),
        pytest.param(by_cudnn, lambda mask: torch.where(mask, mask * -0.5, -torch.inf).bfloat16(), id="distances"),
    ],
)
def test_any_other_bias_stays_a_bias(library: Callable[..., Any], bias: Callable[[Tensor], Tensor]) -> None:
    q, k, v = half(Q, K, V)
    seen = torch.arange(32).expand(2, 1, 1, 32) < 9
    module = traced(lambda q, k, v, mask: library(q, k, v, bias(mask)), q, k, v, seen)
    assert passes.run(module, [BY_OPERATOR])
    assert [mask.dtype for mask in masks_of(module)] == [torch.bfloat16]
    torch.testing.assert_close(module(q, k, v, seen).double(), exact(q, k, v, bias(seen), 0.25), rtol=2**-8, atol=1e-3)


def test_values_wider_than_keys_are_not_for_the_operator() -> None:
    q, k, v = half(Q, K, V.repeat(1, 1, 1, 2))
    mask = torch.zeros(2, 1, 1, 32).bfloat16()
    assert passes.run(traced(by_cudnn, q, k, v, mask), [BY_OPERATOR]) == []
    module = traced(by_cudnn, q, k, v, mask)
    assert passes.run(module, [REPLACE])
    torch.testing.assert_close(module(q, k, v, mask).double(), exact(q, k, v, mask, 0.25), rtol=2**-8, atol=1e-3)


def test_an_expanded_boolean_mask_has_the_views_of_its_bias() -> None:
    q, k, v = half(Q[:1], K[:1], V[:1])
    seen = torch.rand(1, 8) < 0.5

    def step(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Any:
        bias = torch.where(seen.expand(4, 8), 0.0, -torch.inf).bfloat16()
        mask = torch.where(seen.expand(4, 8), torch.zeros((), dtype=q.dtype), torch.full((), -torch.inf, dtype=q.dtype))
        return attention(q, k, v, mask.view(1, 1, 1, 32)), bias

    module = traced(step, q, k, v, seen)
    operator = partial(REPLACE, operator=torch.ops.graphs.one_query_attention.default, fits=attention_operator.fits)
    assert len(passes.run(module, [operator])) == 1
    torch.testing.assert_close(module(q, k, v, seen)[0], step(q, k, v, seen)[0], rtol=2**-7, atol=2**-7)
