"""`passes.remove_host_values` and the pipeline: which passes apply, what is left alone, in what state a graph is left."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import passes
from tests.passes.steps import ALL, check, printed, rewritten, traced


def everything(cache: Tensor, x: Tensor, t: Tensor) -> Tensor:
    start = int(t)
    if start == 0:
        cache.zero_()
    cache[start % 8] = x / t.item()
    keys = cache[: min(start + 1, 8)]
    return keys[keys.sum(-1) > 0].sum(0) * torch.tensor(0.5)


def row(cache: Tensor, x: Tensor, t: Tensor) -> Tensor:
    return cache[int(t) % 8] * 2


def prefix(cache: Tensor, x: Tensor, t: Tensor) -> Tensor:
    return cache[: int(t)].sum(0)


def masked(cache: Tensor, x: Tensor, t: Tensor) -> Tensor:
    return cache[cache[:, 0] > 0].sum(0) * t


def scaled(cache: Tensor, x: Tensor, t: Tensor) -> Tensor:
    return x * t.item()


PARTS = [everything, row, prefix, masked, scaled]


def inputs(start: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(start)
    return torch.randn(8, 3, generator=generator), torch.randn(3, generator=generator), torch.tensor(start)


def test_all_passes_together_are_eager_and_deterministic() -> None:
    graph = rewritten(everything, *inputs(3))
    for start in range(12):
        assert check(graph, everything, *inputs(start), exact=False, may_break=True) == (start > 0)
    again = rewritten(everything, *inputs(3))
    assert printed(again.module) == printed(graph.module) and again.changes == graph.changes


SUBSETS = [list(names) for size in range(len(ALL) + 1) for names in itertools.combinations(ALL, size)]


@pytest.mark.parametrize("only", SUBSETS, ids=lambda names: "+".join(names) or "none")
@pytest.mark.parametrize("step", PARTS, ids=lambda step: step.__name__)
def test_without_some_of_the_passes_a_value_is_named_or_taken_as_it_is(step: Callable[..., Tensor], only: list[str]) -> None:
    try:
        graph = rewritten(step, *inputs(3), only=only)
    except passes.Unremovable as reason:
        assert reason.site[0] == __file__ and reason.detail and len(only) < len(ALL)
        return
    assert not graph.assumes or "branches" in only
    for start in range(12):
        check(graph, step, *inputs(start), exact=False, may_break=True)
    assert check(graph, step, *inputs(3), exact=False)


def test_the_pipeline_names_the_pass_lints_and_hoists_constants() -> None:
    graph = passes.rewrite(traced(everything, *inputs(3)))
    module = graph.module
    assert {change.by for change in graph.changes} == {"remove_host_values", "hoist_constants"}
    module.graph.lint()
    cache, x, t = inputs(5)
    expected = everything(cache.clone(), x, t)
    torch.testing.assert_close(module(cache, x, t)[0], expected)


@pytest.mark.parametrize(
    "step", [lambda x: x * 2 + x.sum(), lambda x: x[1:3].softmax(0), lambda x: x.index_select(0, x.argsort())]
)
def test_a_graph_without_findings_is_left_as_it_is(step: Callable[..., Tensor]) -> None:
    graph = traced(step, torch.randn(5))
    module = graph.module
    nodes, code = list(module.graph.nodes), module.code
    assert passes.rewrite(graph).changes == ()
    assert list(module.graph.nodes) == nodes and module.code == code


def test_a_refused_graph_keeps_its_assumptions_apart_from_the_next_try() -> None:
    def step(x: Tensor, t: Tensor) -> Tensor:
        return x[: int(t)].cummax(0).values.sum(0)  # has no rule: taken at its length

    graph = rewritten(step, torch.randn(8, 3), torch.tensor(5))
    assert len({str(assumption.condition) for assumption in graph.graph.facts.assumptions}) == len(graph.graph.facts.assumptions)
    assert check(graph, step, torch.randn(8, 3), torch.tensor(5))
    assert not check(graph, step, torch.randn(8, 3), torch.tensor(4), may_break=True)


def returned_number(x: Tensor, t: Tensor) -> Any:
    return x * 2, t.item()


def returned_rows(x: Tensor, t: Tensor) -> Tensor:
    return x[: int(t)] * 2


def test_a_number_that_is_returned_is_named() -> None:
    with pytest.raises(passes.Unremovable, match="returns a number that only the device knows") as raised:
        rewritten(returned_number, torch.ones(3), torch.tensor(2))
    assert raised.value.operator == "output" and raised.value.remedy == "Return the tensor"


def test_a_result_as_long_as_the_data_says_is_a_way_per_length() -> None:
    graph = rewritten(returned_rows, torch.ones(8, 3), torch.tensor(2))
    for length in range(9):
        assert check(graph, returned_rows, torch.randn(8, 3), torch.tensor(length), may_break=True) == (length == 2)


def test_an_error_says_what_where_and_what_to_do() -> None:
    error = passes.Unremovable("a length has no bound", "size", ("model.py", 7), "Pass bounds")
    assert str(error) == "size at model.py:7: a length has no bound. Pass bounds"
    assert (error.detail, error.operator, error.site, error.remedy) == (
        "a length has no bound",
        "size",
        ("model.py", 7),
        "Pass bounds",
    )
    assert str(passes.Unremovable("why", "what")) == "what: why"
