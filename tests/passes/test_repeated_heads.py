"""Golden graphs of `passes.repeated_heads`, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import passes


def traced(step: Callable[..., Any], *args: Any) -> GraphModule:
    return make_fx(step, tracing_mode="fake")(*args)


def targets(module: GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]


def repeated(states: Tensor, times: int) -> Tensor:
    batch, groups, length, width = states.shape
    return states[:, :, None].expand(batch, groups, times, length, width).reshape(batch, groups * times, length, width)


def attention(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
    """As models with sinks write it: ``query [B, H, M, D]``, ``key`` and ``value`` ``[B, G, S, D]``, ``sinks [H]``."""
    times = query.shape[1] // key.shape[1]
    scores = torch.matmul(query, repeated(key, times).transpose(2, 3)) * query.shape[-1] ** -0.5
    scores = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(query.shape[0], -1, query.shape[2], -1)], -1)
    return torch.matmul(torch.softmax(scores, -1)[..., :-1], repeated(value, times))


def operands(batch: int, groups: int, times: int, rows: int, length: int, width: int) -> list[Tensor]:
    heads = groups * times
    sizes = ((batch, heads, rows, width), (batch, groups, length, width), (batch, groups, length, width), (heads,))
    return [torch.randn(size) for size in sizes]


@settings(deadline=None, max_examples=25)
@given(st.tuples(*(st.integers(*limits) for limits in ((1, 3), (1, 3), (2, 4), (1, 3), (1, 9), (1, 8)))))
def test_attention_reads_keys_and_values_once(sizes: tuple[int, int, int, int, int, int]) -> None:
    args = operands(*sizes)
    module = traced(attention, *args)
    changes = passes.run(module, [passes.repeated_heads])
    assert [change.by for change in changes] == ["repeated_heads"] * 2
    batch, groups = sizes[:2]
    shapes = [node.meta["val"].shape[0] for node in module.graph.nodes if node.target is torch.ops.aten.bmm.default]
    assert shapes == [batch * groups] * 2
    torch.testing.assert_close(module(*args), attention(*args))


def test_no_copy_of_what_is_shared_is_left() -> None:
    args = operands(2, 2, 4, 1, 5, 8)
    module = traced(attention, *args)
    assert sum("clone" in name for name in targets(module)) > 0
    passes.run(module, [passes.repeated_heads])
    largest = max(node.meta["val"].numel() for node in module.graph.nodes if isinstance(node.meta.get("val"), Tensor))
    assert largest <= args[1].numel()


def test_what_is_not_repeated_and_what_has_many_rows_is_left() -> None:
    plain = operands(2, 3, 1, 1, 5, 8)
    assert passes.run(traced(attention, *plain), [passes.repeated_heads]) == []
    long = operands(1, 1, 2, 17, 5, 8)
    assert passes.run(traced(attention, *long), [passes.repeated_heads]) == []


@pytest.mark.parametrize("interleaved", [True, False])
def test_heads_that_lie_in_another_order_are_left(interleaved: bool) -> None:
    def step(query: Tensor, key: Tensor) -> Tensor:
        batch, groups, length, width = key.shape
        if interleaved:  # heads 0, 2, 4 share: not neighbours
            keys = key[:, None].expand(batch, 3, groups, length, width).reshape(batch, 3 * groups, length, width)
        else:  # along the batch
            keys = key[:, None].expand(batch, 3, groups, length, width).reshape(batch * 3, groups, length, width)
            query = query.reshape(batch * 3, groups, 1, width)
        return torch.matmul(query, keys.transpose(2, 3))

    query, key, *_ = operands(2, 2, 3, 1, 5, 8)
    module = traced(step, query, key)
    assert passes.run(module, [passes.repeated_heads]) == []


@pytest.mark.parametrize("empty", ["batch", "length"])
def test_what_is_empty_is_left(empty: str) -> None:
    sizes = {"batch": (0, 2, 2, 1, 5, 8), "length": (2, 2, 2, 1, 0, 8)}[empty]
    given_ = operands(*sizes)
    module = traced(attention, *given_)
    assert passes.run(module, [passes.repeated_heads]) == []
    assert torch.equal(module(*given_), attention(*given_))
