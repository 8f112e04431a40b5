"""`passes.norm_prologues` and `passes.product_epilogues`: what becomes a part of a product, and what stays as it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

import graphs.ops  # noqa: F401  (defines the operator)
import passes
from passes import inductor_decompositions

OPERATOR = torch.ops.graphs.skinny_linear.default
PASSES = [
    partial(passes.skinny_products, operator=OPERATOR, fits=lambda m, n, k: m <= 16),
    partial(passes.norm_prologues, operator=OPERATOR),
    partial(passes.product_epilogues, operator=OPERATOR, decompositions=inductor_decompositions),
]
K, N = 32, 16
Step = Callable[..., Any]


def made(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).bfloat16()


X, GAIN, SHIFT = made(4, 1, K), made(K, seed=1), made(K, seed=2)
W, V, B, R = made(N, K, seed=3), made(N, K, seed=4), made(N, seed=5), made(4, 1, N, seed=6)
ARGUMENTS = {"x": X, "gain": GAIN, "shift": SHIFT, "w": W, "v": V, "b": B, "r": R}


def rewritten(step: Step, table: dict[Any, Any] | None = None) -> tuple[GraphModule, dict[str, int], list[Tensor]]:
    """A step of some of `ARGUMENTS`, after the passes, with how often each changed it."""
    given = [ARGUMENTS[name] for name in step.__code__.co_varnames[: step.__code__.co_argcount]]
    table = inductor_decompositions() if table is None else table
    with torch.no_grad():
        module = make_fx(step, tracing_mode="fake", decomposition_table=table)(*given)
    changes = passes.run(module, PASSES)
    names = [change.by for change in changes if change.by != "skinny_products"]
    return module, {name: names.count(name) for name in names}, given


def same(step: Step, module: GraphModule, given: list[Tensor]) -> None:
    """As close to float64 as the step itself, up to one rounding."""
    with torch.no_grad():
        found, as_it_is = module(*given), step(*given)
    exact = step(*(one.double() if one.is_floating_point() else one for one in given))
    results = [each if isinstance(each, tuple) else (each,) for each in (found, as_it_is, exact)]
    for one, other, right in zip(*results, strict=True):
        assert one.shape == other.shape and one.stride() == other.stride() and one.dtype == other.dtype
        error, allowed = ((each.double() - right).abs().max() for each in (one, other))
        assert error <= 2 * allowed + 2**-8 * right.abs().max()


def linear(rows: Tensor, weight: Tensor) -> Tensor:
    return (rows.reshape(-1, rows.shape[-1]) @ weight.t()).view(*rows.shape[:-1], -1)


def rms(x: Tensor, gain: Tensor, *, late: bool = False, by: Callable[[Tensor], Tensor] = torch.square) -> Tensor:
    """As models write it; in the dtype of ``x`` where that is float64."""
    wide = x if x.dtype is torch.float64 else x.float()
    scaled = wide * torch.rsqrt(by(wide).mean(-1, keepdim=True) + 1e-6)
    return (scaled * gain).to(x.dtype) if late else gain * scaled.to(x.dtype)


BY: dict[str, Callable[[Tensor], Tensor]] = {
    "pow": lambda wide: wide.pow(2),
    "square": torch.square,
    "product": lambda wide: wide * wide,
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("by", BY)
def test_a_root_mean_square_is_part_of_the_products(late: bool, by: str) -> None:
    def step(x: Tensor, gain: Tensor, w: Tensor, v: Tensor) -> Any:
        rows = rms(x, gain, late=late, by=BY[by])
        return linear(rows, w), linear(rows, v)

    module, changes, given = rewritten(step)
    assert changes == {"norm_prologues": 1}
    (call,) = [node for node in module.graph.nodes if node.target is OPERATOR]
    assert {name: value for name, value in call.kwargs.items() if name != "gain"} == {"norm": "rms", "eps": 1e-6}
    same(step, module, given)


NORMS: dict[str, Step] = {
    "layer_norm": lambda x, gain, shift, w: linear(functional.layer_norm(x, (K,), gain, shift, 1e-5), w),
    "layer_norm without a shift": lambda x, gain, w: linear(functional.layer_norm(x, (K,), gain, None, 1e-5), w),
    "of a sum": lambda x, gain, shift, w: linear(rms(x + shift, gain), w),
    "of rows": lambda x, gain, w: linear(rms(x[:, 0], gain), w),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_of_torchs_own_is_part_of_the_product(name: str) -> None:
    module, changes, given = rewritten(NORMS[name])
    assert changes == {"norm_prologues": 1}
    same(NORMS[name], module, given)


def with_correction(x: Tensor, gain: Tensor, shift: Tensor, w: Tensor) -> Any:
    wide = x.float()
    scaled = (wide - wide.mean(-1, keepdim=True)) * torch.rsqrt(wide.var(-1, keepdim=True) + 1e-5)
    return linear((scaled * gain + shift).bfloat16(), w)


def written_in_place(x: Tensor, gain: Tensor, w: Tensor, r: Tensor) -> Any:
    rows = rms(x, gain)
    x.mul_(0.5)
    return linear(rows, w)


OTHER_NORMS: dict[str, Step] = {
    "wanted by another": lambda x, gain, w: (lambda rows: (linear(rows, w), rows.sum()))(rms(x, gain)),
    "returned": lambda x, gain, w: (lambda rows: (linear(rows, w), rows))(rms(x, gain)),
    "of another dimension": lambda x, gain, w: linear(
        gain * (x.float() * torch.rsqrt(x.float().square().mean(0, keepdim=True) + 1e-6)).bfloat16(), w
    ),
    "of all elements": lambda x, gain, w: linear(
        gain * (x.float() * torch.rsqrt(x.float().square().mean() + 1e-6)).bfloat16(), w
    ),
    "of another tensor": lambda x, gain, r, w: linear(
        gain * (x.float() * torch.rsqrt((x.float() * 2).square().mean(-1, keepdim=True) + 1e-6)).bfloat16(), w
    ),
    "a mean of cubes": lambda x, gain, w: linear(
        gain * (x.float() * torch.rsqrt(x.float().pow(3).abs().mean(-1, keepdim=True) + 1e-6)).bfloat16(), w
    ),
    "rounded before the root": lambda x, gain, w: linear(
        gain * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)), w
    ),
    "a root that is not one over": lambda x, gain, w: linear(
        gain * (x.float() * torch.sqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)).bfloat16(), w
    ),
    "one gain for a row": lambda x, gain, w: linear(gain[:1] * (rms(x, gain)), w),
    "a variance with a correction": with_correction,
    "written before it is multiplied": written_in_place,
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_NORMS)
def test_what_is_no_such_norm_stays(name: str) -> None:
    ARGUMENTS["x"] = X.clone()
    module, changes, given = rewritten(OTHER_NORMS[name])
    assert "norm_prologues" not in changes
    before = [one.clone() for one in given]
    wanted = OTHER_NORMS[name](*before)
    with torch.no_grad():
        found = module(*given)
    torch.testing.assert_close(found, wanted, rtol=2**-6, atol=2**-6)
    ARGUMENTS["x"] = X


def gelu_of_gpt2(y: Tensor) -> Tensor:
    return 0.5 * y * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (y + 0.044715 * torch.pow(y, 3.0))))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda y: functional.gelu(y, approximate="tanh"),
    "gelu_tanh, written out": gelu_of_gpt2,
    "relu": functional.relu,
    "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y),
}


@pytest.mark.parametrize("decomposed", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("gate", ["none", "first", "last"])
def test_an_activation_is_part_of_the_product(name: str, gate: str, decomposed: bool) -> None:
    active = ACTIVATIONS[name]

    def step(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        if gate == "none":
            return active(linear(x, w))
        if gate == "first":
            return active(linear(x, w)) * linear(x, v)
        return linear(x, w) * active(linear(x, v))

    module, changes, given = rewritten(step, None if decomposed else {})
    assert changes == {"product_epilogues": 1}
    (call,) = [node for node in module.graph.nodes if node.target is OPERATOR]
    assert call.kwargs == {"activation": name.partition(",")[0]}
    same(step, module, given)


def test_a_residual_is_part_of_the_product_that_it_is_added_to() -> None:
    def step(x: Tensor, w: Tensor, v: Tensor, b: Tensor, r: Tensor) -> Any:
        first = r + linear(x, w)
        second = linear(first.reshape(4, N).repeat(1, 2)[:, :K], v)  # not a view of the product
        return torch.addmm(b, second.repeat(1, 2), v.t()) + first.reshape(4, N)

    module, changes, given = rewritten(step)
    assert changes == {"product_epilogues": 2}
    calls = [node for node in module.graph.nodes if node.target is OPERATOR]
    assert [set(call.kwargs) for call in calls] == [{"residual"}, set(), {"residual"}]
    same(step, module, given)


def test_a_block_of_a_llama_needs_no_other_kernels() -> None:
    def fed(x: Tensor, gain: Tensor, w: Tensor, v: Tensor, down: Tensor) -> Tensor:
        rows = rms(x, gain)
        inner = functional.silu(linear(rows, w)) * linear(rows, v)
        return x + linear(inner, down)

    ARGUMENTS["down"] = made(K, N, seed=7)
    module, changes, given = rewritten(fed)
    assert changes == {"norm_prologues": 1, "product_epilogues": 2}
    kinds = {node.target for node in module.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    assert kinds <= {OPERATOR, torch.ops.aten.view.default, torch.ops.aten.reshape.default}
    same(fed, module, given)


def copied_elsewhere(x: Tensor, w: Tensor, r: Tensor) -> Tensor:
    y = linear(x, w)
    r.copy_(y)
    return functional.silu(y)


OTHER_EPILOGUES: dict[str, Step] = {
    "the product is returned": lambda x, w: (lambda y: (functional.silu(y), y))(linear(x, w)),
    "the product is kept in an argument": copied_elsewhere,
    "the product is used again": lambda x, w: (lambda y: functional.silu(y) + y.sum())(linear(x, w)),
    "an activation of a part": lambda x, w: functional.silu(linear(x, w)[..., : N // 2]),
    "another slope": lambda x, w: (lambda y: y * torch.sigmoid(1.7 * y))(linear(x, w)),
    "another activation": lambda x, w: torch.tanh(linear(x, w)),
    "a residual that is broadcast": lambda x, w, b: linear(x, w) + b,
    "a residual of more digits": lambda x, w, r: linear(x, w) + r.float(),
    "a weighted residual": lambda x, w, r: torch.add(linear(x, w), r, alpha=2),
    "a product plus itself": lambda x, w: (lambda y: y + y)(linear(x, w)),
    "a gate of another product": lambda x, w, v: functional.silu(linear(x, w)) * linear(x + 1, v),
    "a transposed result": lambda x, w, r: (linear(x, w) + r)[:, 0].t(),
    "the transpose of a product": lambda x, w, r: linear(x, w)[:, 0].t() + r[:, 0].t(),
}


@pytest.mark.parametrize("name", OTHER_EPILOGUES)
def test_what_is_no_such_epilogue_is_computed_as_it_is(name: str) -> None:
    step = OTHER_EPILOGUES[name]
    module, changes, given = rewritten(step)
    copies = [one.clone() for one in given]
    with torch.no_grad():
        wanted, found = step(*copies), module(*given)
    torch.testing.assert_close(found, wanted, rtol=2**-6, atol=2**-6)
    for one, other in zip(given, copies, strict=True):
        torch.testing.assert_close(one, other, rtol=2**-6, atol=2**-6)
    kept = {"a transposed result", "a gate of another product"}  # something is a part of the product in these
    assert ("product_epilogues" in changes) == (name in kept)


def narrow_product(x: Tensor, w: Tensor, r: Tensor) -> Tensor:
    return linear(x[:1], w) + r


def wide_product(x: Tensor, w: Tensor, r: Tensor) -> Tensor:
    return linear(x, w)[:, None] + r.reshape(4, 1, 1, N).expand(4, 3, 1, N)


@pytest.mark.parametrize("step", [narrow_product, wide_product])
def test_a_product_that_is_broadcast_is_not_written_with_a_residual(step: Step) -> None:
    module, changes, given = rewritten(step)
    assert changes == {}
    same(step, module, given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64, torch.bool])
@pytest.mark.parametrize("late", [False, True])
def test_a_gain_that_the_operator_does_not_take_stays(dtype: torch.dtype, late: bool) -> None:
    def step(x: Tensor, gain: Tensor, w: Tensor) -> Tensor:
        return linear(rms(x, gain, late=late).bfloat16(), w)

    ARGUMENTS["gain"] = GAIN.clone().to(dtype)
    try:
        module, changes, given = rewritten(step)
        assert "norm_prologues" not in changes
        torch.testing.assert_close(module(*given), step(*given), rtol=2**-6, atol=2**-6)
    finally:
        ARGUMENTS["gain"] = GAIN


def test_nothing_is_done_twice() -> None:
    def step(x: Tensor, w: Tensor, r: Tensor) -> Tensor:
        return (linear(x, w) + r) + r * 2

    module, changes, given = rewritten(step)
    assert changes == {"product_epilogues": 1}
    assert passes.run(module, PASSES) == []
    same(step, module, given)


def rows_written_behind(x: Tensor, w: Tensor, r: Tensor) -> Tensor:
    rows = x * 1
    y = linear(rows, w)
    rows.add_(1)
    return y + r + rows[..., :N]


def wide_written_before(x: Tensor, gain: Tensor, shift: Tensor, w: Tensor) -> Tensor:
    wide = x.float() * 1
    seen = wide.view(wide.shape)
    wide.mul_(3)
    variance, mean = torch.var_mean(seen, [2], correction=0, keepdim=True)
    return linear(((x.float() - mean) * torch.rsqrt(variance + 1e-5) * gain + shift).bfloat16(), w)


@pytest.mark.parametrize("step", [rows_written_behind, wide_written_before])
def test_what_is_written_in_between_is_read_where_it_was(step: Step) -> None:
    module, _, given = rewritten(step)
    with torch.no_grad():
        torch.testing.assert_close(module(*given), step(*given), rtol=2**-6, atol=2**-6)


def test_a_residual_that_the_product_goes_into_is_not_taken() -> None:
    def step(x: Tensor, w: Tensor) -> Tensor:
        y = linear(x, w)
        return y + torch.tanh(y)

    module, changes, given = rewritten(step)
    assert changes == {}
    same(step, module, given)
