"""Golden graphs of `passes.skinny_products`, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import graphs.ops  # noqa: F401  (defines the operator)
import passes
from passes.optimize.operators.skinny_linear import skinny_products

MERGE = partial(skinny_products, operator=torch.ops.graphs.skinny_linear.default, fits=lambda m, n, k: m <= 16 and n % 16 == 0)
X = torch.randn(4, 1, 32).bfloat16()
W = [torch.randn(n, 32).bfloat16() for n in (64, 16, 16)]


def traced(step: Callable[..., Any], *args: Any) -> GraphModule:
    return make_fx(step, tracing_mode="fake")(*args)


def calls(module: GraphModule) -> list[str]:
    return [str(node) for node in module.graph.nodes if node.op == "call_function"]


def test_products_with_one_activation_become_one_operator() -> None:
    def step(x: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Any:
        q = x.reshape(4, 32) @ query.t()
        k = x.reshape(4, 32) @ key.t()  # flattened again, as linear layers do
        return q, torch.relu(k), x.reshape(4, 32) @ value.t()

    module = traced(step, X, *W)
    changes = passes.run(module, [MERGE])
    assert calls(module) == [
        "view",
        "skinny_linear_default",
        "getitem",
        "getitem_1",
        "getitem_2",
        "relu",
    ]
    assert [change.by for change in changes] == ["skinny_products"] * 3
    assert "mm" in changes[0].before and "skinny_linear" in changes[0].after
    for made, expected in zip(module(X, *W), step(X, *W), strict=True):
        assert torch.equal(made, expected)


def test_a_product_by_itself_is_replaced_unless_told_otherwise() -> None:
    module = traced(lambda x, w: x @ w.t(), X[:, 0], W[0])
    assert passes.run(module, [partial(MERGE, alone=False)]) == []
    assert len(passes.run(module, [MERGE])) == 1
    assert torch.equal(module(X[:, 0], W[0]), X[:, 0] @ W[0].t())


def test_products_with_other_activations_stay_apart() -> None:
    module = traced(lambda x, a, b: ((x @ a.t()).relu() @ b[:, :16].contiguous().t(), x @ b.t()), X[:, 0], W[1], W[2])
    assert len(passes.run(module, [MERGE])) == 2  # x @ a and x @ b; the third has a weight that is computed
    assert sum("skinny_linear" in call for call in calls(module)) == 1


@pytest.mark.parametrize("turned", [False, True])
def test_biases_and_weights_that_are_not_transposed_go_with_the_others(turned: bool) -> None:
    """As ``Linear`` with a bias and ``Conv1D`` of GPT-2 write it."""
    bias = torch.randn(64).bfloat16()

    def step(x: Tensor, first: Tensor, second: Tensor, bias: Tensor) -> Any:
        given = (first, second) if turned else (first.t(), second.t())
        return torch.addmm(bias, x.reshape(4, 32), given[0]), x.reshape(4, 32) @ given[1]

    args = [X, *(weight.t().contiguous() if turned else weight for weight in W[:2]), bias]
    module = traced(step, *args)
    changes = passes.run(module, [MERGE])
    assert len(changes) == 2 and sum("skinny_linear" in call for call in calls(module)) == 1
    for made, expected in zip(module(*args), step(*args), strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-2, atol=1e-2)


def test_layouts_are_not_mixed_in_one_launch() -> None:
    module = traced(lambda x, a, b: (x @ a.t(), x @ b), X[:, 0], W[0], W[1].t().contiguous())
    assert len(passes.run(module, [MERGE])) == 2
    assert sum("skinny_linear" in call for call in calls(module)) == 2


@pytest.mark.parametrize(
    ("step", "args"),
    [
        pytest.param(lambda x, w: x @ w.t(), (torch.randn(17, 32).bfloat16(), W[0]), id="more rows than fit"),
        pytest.param(lambda x, w: x @ w.t(), (X[:, 0].float(), W[0].float()), id="32 bits"),
        pytest.param(lambda x, w: x @ w.t(), (X[:, 0], W[0].t().contiguous().t()), id="stored transposed"),
        pytest.param(lambda x, w: x @ (w * 2).t(), (X[:, 0], W[0]), id="a weight that the step computes"),
        pytest.param(lambda x, w: torch.addmm(w[:, 0], x, w.t()), (X[:, 0], W[0]), id="a bias that the step computes"),
        pytest.param(lambda x, w: x @ w.t(), (X[:, 0], W[0][:9]), id="columns that do not fit"),
    ],
)
def test_what_does_not_fit_is_left_as_it_is(step: Callable[..., Any], args: tuple[Tensor, ...]) -> None:
    module = traced(step, *args)
    before = str(module.graph)
    assert passes.run(module, [MERGE]) == []
    assert str(module.graph) == before


def test_constants_that_are_named_late_are_read_in_time() -> None:
    held, bias = W[1].clone(), torch.randn(16).bfloat16()

    def step(x: Tensor, first: Tensor) -> Any:
        return x @ first.t(), torch.addmm(bias, x, held.t())

    module = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(X[:, 0], W[0])
    assert len(passes.run(module, [MERGE])) == 2 and sum("skinny_linear" in call for call in calls(module)) == 1
    for made, expected in zip(module(X[:, 0], W[0]), step(X[:, 0], W[0]), strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-2, atol=1e-2)


def test_what_a_pass_did_before_it_failed_is_undone() -> None:
    def failing(module: GraphModule) -> list[tuple[str, str]]:
        module.graph.output_node().args = ((),)
        module.graph.eliminate_dead_code()
        raise ZeroDivisionError("no rows")

    def step(x: Tensor, w: Tensor) -> Tensor:
        return torch.relu(x @ w.t())

    module, told = traced(step, X[:, 0], W[0]), list[str]()
    with pytest.raises(ZeroDivisionError):
        passes.run(traced(step, X[:, 0], W[0]), [failing])
    before = [node.target for node in module.graph.nodes]
    assert passes.run(module, [failing], failed=lambda name, error: told.append(f"{name}: {error}")) == []
    assert [node.target for node in module.graph.nodes] == before and told == ["failing: no rows"]
    assert len(passes.run(module, [failing, MERGE], failed=lambda name, error: None)) == 1
    assert torch.equal(module(X[:, 0], W[0]), step(X[:, 0], W[0]))
