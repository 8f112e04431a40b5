"""`passes.core.verify`: each invariant sees a graph that was broken on purpose, and is silent about the graph as it was."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

import passes
from passes.core.aliasing import written
from passes.core.verify import (
    BrokenInvariant,
    after_each_pass,
    left_symbols,
    stale_reads,
    unguarded_indices,
    unpredicated_writes,
    verify,
    wrong_values,
)
from tests.passes.steps import rewritten, traced

aten = torch.ops.aten


def node_of(module: GraphModule, target: Any) -> Node:
    return next(node for node in module.graph.nodes if node.target is target)


def written_row(cache: Tensor, x: Tensor, t: Tensor) -> Tensor:
    row = cache[int(t)]
    row.mul_(2)
    return row + x


def reset(cache: Tensor, x: Tensor, t: Tensor) -> Tensor:
    if t > 0:
        cache.zero_()
    return cache + x


def added(cache: Tensor, x: Tensor, t: Tensor) -> Tensor:
    if t > 0:
        cache.sin_()
    return cache + x


def picked(cache: Tensor, x: Tensor, t: Tensor, index: Tensor) -> Tensor:
    return cache[index].sum(0) * (2 if t > 0 else 3) + x


def sliced(cache: Tensor, x: Tensor, t: Tensor) -> Tensor:
    return cache[: int(t)].sum(0) + x


CACHE, X, T = torch.randn(4, 3), torch.randn(3), torch.tensor(2)
INDEX = torch.tensor([0, 3])


def graph_of(step: Callable[..., Tensor], *more: Tensor, merge: bool = False) -> passes.RewrittenGraph:
    return rewritten(step, CACHE, X, T, *more, merge=merge).graph


def test_a_value_that_the_operator_does_not_give_is_seen() -> None:
    module = graph_of(sliced).module
    assert wrong_values(module) == []
    total = node_of(module, aten.sum.dim_IntList)
    (total.args[0] if isinstance(total.args[0], Node) else total).meta["val"] = torch.empty(3, 4)  # for [4, 3]
    assert any("is taken for [([3, 4], torch.float32" in text for text in wrong_values(module))


@pytest.mark.parametrize("change", [{"dtype": torch.float64}, {"device": "meta"}, {"size": (2, 3)}])
def test_shape_dtype_and_device_count(change: dict[str, Any]) -> None:
    module = graph_of(sliced).module
    total = node_of(module, aten.sum.dim_IntList)
    with total.meta["val"].fake_mode:
        total.meta["val"] = torch.empty(**{"size": (3,), **change})
    assert [text.partition(" ")[0] for text in wrong_values(module)][:1] == [total.name]


def test_a_node_without_a_value_is_seen() -> None:
    module = graph_of(sliced).module
    del node_of(module, aten.sum.dim_IntList).meta["val"]
    assert wrong_values(module) == ["sum_dim_int_list has no value"]


def test_a_graph_without_values_is_not_looked_at() -> None:
    module = graph_of(sliced).module
    for node in module.graph.nodes:
        node.meta.clear()
    assert wrong_values(module) == []


def test_a_read_of_a_copy_that_a_write_overtook_is_seen() -> None:
    module = graph_of(written_row).module
    assert stale_reads(module) == []
    result = node_of(module, aten.add.Tensor)
    with module.graph.inserting_before(result):
        module.graph.call_function(aten.zero_.default, (next(iter(module.graph.nodes)),))  # the whole cache, behind its row
    (text,) = stale_reads(module)
    assert text.startswith(f"{result} reads index_tensor") and text.endswith("which zero__default made stale")


def test_a_copy_that_is_written_back_is_not_stale_and_its_likes_are() -> None:
    def step(cache: Tensor, x: Tensor, t: Tensor) -> Tensor:
        first, second = cache[int(t)], cache[int(t) - 1]
        first.mul_(2)
        return first + second

    module = graph_of(step).module
    assert stale_reads(module) == []
    copies = [node for node in module.graph.nodes if node.meta.get("gathered") and node.users]
    assert len(copies) == 2  # the second row is read when the first one is written
    node_of(module, aten.mul_.Tensor).prepend(copies[1])
    (text,) = stale_reads(module)
    assert f"reads {copies[1]}, which" in text


@pytest.mark.parametrize("step", [reset, added])
def test_a_write_that_happens_on_either_side_is_seen(step: Callable[..., Tensor]) -> None:
    graph = graph_of(step, merge=True)
    module = graph.module
    assert not graph.assumes and unpredicated_writes(module) == []
    write = next(node for node in module.graph.nodes if written(node))
    if step is added:  # put back by a copy behind it
        restored = node_of(module, aten.copy_.default)
        restored.args = (restored.args[0], restored.args[1].args[1])
    else:
        with module.graph.inserting_before(write):
            plain = module.graph.call_function(aten.zero_.default, (write.args[0],))
        plain.meta = dict(write.meta)
    assert any("whether or not its branch is taken" in text for text in unpredicated_writes(module))


def test_an_index_that_may_leave_its_tensor_is_seen() -> None:
    graph = graph_of(picked, INDEX)
    assert graph.assumes and unguarded_indices(graph.module, graph.results) == []
    guard = node_of(graph.module, aten.clamp.default)
    guard.replace_all_uses_with(guard.args[0])  # type: ignore[arg-type]
    (text,) = unguarded_indices(graph.module, graph.results)
    assert text.endswith("outside of 4 places")


def test_without_a_flag_an_index_is_left_to_its_operator() -> None:
    def step(cache: Tensor, x: Tensor, t: Tensor, index: Tensor) -> Tensor:
        return cache[index].sum(0) * t.item() + x

    graph = graph_of(step, INDEX)
    assert not graph.assumes and unguarded_indices(graph.module, graph.results) == []


def test_a_symbol_that_is_left_is_seen() -> None:
    step = traced(sliced, CACHE, X, T)
    assert [text.partition(" ")[0] for text in left_symbols(step.module)] == ["_local_scalar_dense", "slice_1"]
    assert left_symbols(passes.remove_host_values(step).module) == []


def test_a_pass_that_breaks_an_invariant_is_named_inside_the_block_only() -> None:
    def widen(module: GraphModule) -> Sequence[tuple[str, str]]:
        total = node_of(module, aten.sum.dim_IntList)
        total.args = (total.args[0], [1])
        return [("sum", "sum")]

    module = graph_of(sliced).module
    with pytest.raises(BrokenInvariant, match=r"widen left a graph in which sum_dim_int_list is taken for"):
        passes.run(module, [widen])


def test_nothing_is_checked_outside_of_the_block() -> None:
    def broken(module: GraphModule) -> list[str]:
        return ["all of it"]

    with after_each_pass(), pytest.raises(BrokenInvariant, match="a pass left a graph in which all of it"):
        verify(GraphModule({}, torch.fx.Graph()), "a pass", broken)
    contextvars.Context().run(verify, GraphModule({}, torch.fx.Graph()), "a pass", broken)  # not that of these tests
