"""Golden graphs of `passes.expert_products`, and what it leaves alone."""

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
from passes.optimize.operators.expert_products import expert_products

CHOSEN = partial(expert_products, operator=torch.ops.graphs.expert_linear.default)
X = torch.randn(6, 32).bfloat16()
W = torch.randn(4, 48, 32).bfloat16()
EXPERTS = torch.tensor([0, 3, 3, 1, -1, 2])


def traced(step: Callable[..., Any], *args: Any) -> GraphModule:
    return make_fx(step, tracing_mode="fake")(*args)


def calls(module: GraphModule) -> list[str]:
    return [str(node) for node in module.graph.nodes if node.op == "call_function"]


def as_columns(x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    return torch.bmm(weights[experts], x.unsqueeze(-1)).squeeze(-1)


def as_rows(x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    return torch.bmm(x.unsqueeze(1), weights[experts]).squeeze(1)


def as_turned_rows(x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    return torch.bmm(x.unsqueeze(1), weights[experts].transpose(1, 2)).squeeze(1)


def as_permuted_columns(x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    return torch.bmm(weights[experts].permute(0, 2, 1), x.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("step", [as_columns, as_rows, as_turned_rows, as_permuted_columns])
def test_a_chosen_weight_is_read_where_it_is(step: Callable[..., Tensor]) -> None:
    held = W if step in (as_columns, as_turned_rows) else W.transpose(1, 2).contiguous()
    module = traced(step, X, held, EXPERTS)
    changes = passes.run(module, [CHOSEN])
    assert [change.by for change in changes] == ["expert_products"]
    assert "bmm" in changes[0].before and "expert_linear" in changes[0].after
    assert not {"index", "bmm"} & set(calls(module)), "nothing is copied any more"
    torch.testing.assert_close(module(X, held, EXPERTS), step(X, held, EXPERTS), rtol=1e-2, atol=1e-2)


def test_a_copy_that_others_read_stays_for_them() -> None:
    def step(x: Tensor, weights: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        chosen = weights[experts]
        return torch.bmm(chosen, x.unsqueeze(-1)), chosen

    module = traced(step, X, W, EXPERTS)
    assert len(passes.run(module, [CHOSEN])) == 1
    made, copied = module(X, W, EXPERTS)
    assert made.shape == (6, 48, 1) and torch.equal(copied, W[EXPERTS])


LEFT = {
    "several rows of an expert": (lambda x, w, e: torch.bmm(w[e], x.unsqueeze(-1).expand(-1, -1, 2)), X, W, EXPERTS),
    "float32": (as_columns, X.float(), W.float(), EXPERTS),
    "two indices": (lambda x, w, e: torch.bmm(w[e][:, e[:3]], x.unsqueeze(-1)), X, W, EXPERTS),
    "a table of indices": (lambda x, w, e: torch.bmm(w[e[None]][0], x.unsqueeze(-1)), X, W, EXPERTS),
    "no choice": (lambda x, w, e: torch.bmm(w, x[:4].unsqueeze(-1)) + e[0], X, W, EXPERTS),
}


@pytest.mark.parametrize("kind", sorted(LEFT))
def test_other_products_are_left(kind: str) -> None:
    step, *args = LEFT[kind]
    assert passes.run(traced(step, *args), [CHOSEN]) == []
