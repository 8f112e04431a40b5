"""`addressing`: golden graphs, one-row writes, and random programs of views and writes at places the device knows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import passes
from tests.passes.steps import check, printed, rewritten, traced

aten = torch.ops.aten
POSITION = torch.tensor(3)


def cache() -> Tensor:
    return torch.arange(24.0).view(8, 3)


def read_a_row(x: Tensor, t: Tensor) -> Tensor:
    return x[int(t)] * 2


def write_a_row(x: Tensor, t: Tensor) -> Tensor:
    x[int(t)] = torch.ones(3, dtype=torch.float64)
    return x.sum()


def write_a_column(x: Tensor, t: Tensor) -> Tensor:
    x[:, int(t) % 3] = 5.0
    return x.sum()


def ring(x: Tensor, t: Tensor) -> Tensor:
    place = int(t) % 8
    x[place] += 1
    return x[place] * 2


def window(x: Tensor, t: Tensor) -> Tensor:
    start = int(t)
    return x[start : start + 2].sum(0)


BEFORE = """\
arg0_1 [8, 3] = placeholder(arg0_1)
arg1_1 [] = placeholder(arg1_1)
_local_scalar_dense = _local_scalar_dense.default(arg1_1)
select [3] = select.int(arg0_1, 0, _local_scalar_dense)
mul [3] = mul.Tensor(select, 2)
return [mul]"""
READ = """\
arg0_1 [8, 3] = placeholder(arg0_1)
arg1_1 [] = placeholder(arg1_1)
index_tensor [3] = index.Tensor(arg0_1, [arg1_1])
mul [3] = mul.Tensor(index_tensor, 2)
return [mul]"""
WRITE = """\
arg0_1 [8, 3] = placeholder(arg0_1)
arg1_1 [] = placeholder(arg1_1)
ones [3] = ones.default([3], dtype=torch.float64, device=cpu, pin_memory=False)
_to_copy_default [3] = _to_copy.default(ones, dtype=torch.float32)
index_put__default [8, 3] = index_put_.default(arg0_1, [arg1_1], _to_copy_default)
sum_1 [] = sum.default(arg0_1)
return [sum_1]"""
RING = """\
arg0_1 [8, 3] = placeholder(arg0_1)
arg1_1 [] = placeholder(arg1_1)
remainder_scalar [] = remainder.Scalar(arg1_1, 8)
index_tensor [3] = index.Tensor(arg0_1, [remainder_scalar])
add_ [3] = add_.Tensor(index_tensor, 1)
index_put__default [8, 3] = index_put_.default(arg0_1, [remainder_scalar], index_tensor)
index_put__default_1 [8, 3] = index_put_.default(arg0_1, [remainder_scalar], add_)
index_tensor_2 [3] = index.Tensor(arg0_1, [remainder_scalar])
mul [3] = mul.Tensor(index_tensor_2, 2)
return [mul]"""


def test_the_graph_before() -> None:
    assert printed(traced(read_a_row, cache(), POSITION)) == BEFORE


@pytest.mark.parametrize(("step", "golden"), [(read_a_row, READ), (write_a_row, WRITE), (ring, RING)])
def test_the_graph_after(step: Callable[..., Tensor], golden: str) -> None:
    graph = rewritten(step, cache(), POSITION, only=["addressing"])
    assert printed(graph.module) == golden
    assert not graph.assumes
    again = rewritten(step, cache(), POSITION, only=["addressing"])
    assert printed(again.module) == golden and again.changes == graph.changes


def test_changes_are_the_nodes_before_and_after() -> None:
    (read, select) = rewritten(read_a_row, cache(), POSITION, only=["addressing"]).changes
    assert "_local_scalar_dense" in read[0] and "arg1_1" in read[1]
    assert "select.int" in select[0] and "index.Tensor" in select[1]


@pytest.mark.parametrize("step", [write_a_row, write_a_column, ring])
def test_a_write_is_in_place_and_touches_only_its_rows(step: Callable[..., Tensor]) -> None:
    graph = rewritten(step, cache(), POSITION)
    whole = [n for n in graph.module.graph.nodes if n.op == "call_function" and n.target is not aten.index_put_.default]
    assert all(n.meta["val"].shape != (8, 3) for n in whole)  # nothing else makes a tensor of the cache's size
    for position in (0, 3, 7, -1, -8):
        assert check(graph, step, cache(), torch.tensor(position))


@pytest.mark.parametrize("position", [8, 9, -9])
@pytest.mark.parametrize("step", [read_a_row, write_a_row])
def test_an_index_outside_is_refused_as_eager_refuses_it(step: Callable[..., Tensor], position: int) -> None:
    graph = rewritten(step, cache(), POSITION)
    for run in (graph, step):
        x = cache()
        with pytest.raises(IndexError):
            run(x, torch.tensor(position))
        assert torch.equal(x, cache())


def guarded_write(x: Tensor, t: Tensor) -> Tensor:
    if t.item() < 8:
        x[int(t)] = 1.0
    return x * 2


def test_on_a_way_that_is_not_taken_an_index_is_kept_inside() -> None:
    graph = rewritten(guarded_write, cache(), POSITION)
    assert graph.assumes
    for position in range(-9, 12):
        check(graph, guarded_write, cache(), torch.tensor(position), may_break=position > 7)


@pytest.mark.parametrize("start", range(9))
def test_a_window_that_reaches_over_the_end_is_another_way(start: int) -> None:
    graph = rewritten(window, cache(), POSITION)
    assert check(graph, window, cache(), torch.tensor(start), may_break=True) == (start <= 6)


def test_without_the_pass_the_value_is_named() -> None:
    with pytest.raises(passes.Unremovable) as raised:
        rewritten(read_a_row, cache(), POSITION, only=["arithmetic"])
    assert raised.value.operator == "aten._local_scalar_dense.default"
    assert raised.value.site == (__file__, read_a_row.__code__.co_firstlineno + 1)


# Views of views, reads and writes at places from the device, in any order. A view made before a write shows it.
READS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "row": lambda x, p, q: x[p],
    "last but": lambda x, p, q: x[p - 4],
    "window": lambda x, p, q: x[p : p + 2],
    "suffix of fixed size": lambda x, p, q: x[q:][:2],
    "column": lambda x, p, q: x[:, q],
    "columns": lambda x, p, q: x[:, q : q + 1],
    "view": lambda x, p, q: x[1:],
    "transposed": lambda x, p, q: x.t(),
    "copy": lambda x, p, q: x.clone(),
}
WRITES: dict[str, Callable[[Tensor, Tensor, int], object]] = {
    "fill": lambda x, value, q: x.fill_(7.0),
    "add": lambda x, value, q: x.add_(value),
    "copy": lambda x, value, q: x.copy_(value.expand(x.shape)),
    "row": lambda x, value, q: x.__setitem__(q, value),
    "slice": lambda x, value, q: x.__setitem__(slice(q, q + 1), value),
    "none": lambda x, value, q: None,
}
actions = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from(sorted(READS)), st.integers(0, 4), st.sampled_from(sorted(WRITES))),
    min_size=1,
    max_size=5,
)


def program(plan: list[tuple[int, str, int, str]]) -> Callable[..., list[Tensor]]:
    """A step: each action takes a view of something there is and writes to something there is."""

    def step(x: Tensor, tp: Tensor, tq: Tensor) -> list[Tensor]:
        p, q = int(tp), int(tq)
        there, value = [x], torch.tensor(0.5)
        for source, read, target, write in plan:
            base = there[source % len(there)]
            if base.dim() == 2 and base.shape[0] > 3 and base.shape[1] > 2:
                there.append(READS[read](base, p, q))
            chosen = there[target % len(there)]
            if chosen.dim():
                value = value + 1
                WRITES[write](chosen, value, 0 if chosen.shape[0] < 3 else q)
        return [view.clone() for view in there]

    return step


@settings(max_examples=80, deadline=None)
@given(actions, st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), min_size=2, max_size=3))
def test_any_program_of_views_and_writes_is_eager(plan: list[tuple[int, str, int, str]], places: list[tuple[int, int]]) -> None:
    step, x = program(plan), torch.arange(15.0).view(5, 3)
    graph = rewritten(step, x, *map(torch.tensor, places[0]))
    for index, place in enumerate(places):
        check(graph, step, x, *map(torch.tensor, place), may_break=index > 0)
