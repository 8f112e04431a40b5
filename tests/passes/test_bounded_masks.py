"""`passes.host_values.rules` against eager: lists whose length a mask decides, with NaN where nothing may look."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.passes.steps import OLDER, Rewritten, check, printed, rewritten, traced

ROWS = 8
aten = torch.ops.aten
Step = Callable[[Tensor, Tensor], Any]


def rows(mask: Tensor) -> Tensor:
    return torch.where(mask)[0]


def writing(write: Callable[[Tensor], object]) -> Tensor:
    y = torch.ones(ROWS, 3)
    write(y)
    return y


MASKS: dict[str, Step] = {
    "sum": lambda x, m: x[m].sum(0),
    "softmax": lambda x, m: (x[m].softmax(0) * x[m]).sum(0),
    "one column": lambda x, m: x[m, 1].sum(),
    "some columns": lambda x, m: x[m, 1:].sum(0),
    "of two dimensions": lambda x, m: x[x > 0].sum(),
    "twice": lambda x, m: x[m][x[m][:, 0] > 0].sum(0),
    "selected": lambda x, m: x.masked_select(m[:, None]).sum(),
    "the first": lambda x, m: x[m][0],
    "the last": lambda x, m: x[m][-1],
    "the largest": lambda x, m: tuple(x[m].max(0)),
    "the place of the largest": lambda x, m: x[m].argmax(0),
    "the top two": lambda x, m: x[m].topk(min(2, x[m].shape[0]), 0).values.sum(0),
    "normalised": lambda x, m: (x[m] / x[m].norm(dim=0, keepdim=True)).sum(0),
    "products": lambda x, m: x[m].t() @ x[m],
    "a number": lambda x, m: x.masked_fill_(m[:, None], 2.0).nan_to_num(),
    "written a number": lambda x, m: writing(lambda y: y.__setitem__(m, 7.0)),
    "written a row": lambda x, m: writing(lambda y: y.__setitem__(m, torch.arange(3.0))),
    "written rows": lambda x, m: writing(lambda y: y.__setitem__(m, x[m] * 2)),
    "written a column": lambda x, m: writing(lambda y: y.__setitem__((m, 1), 5.0)),
    "advanced rows": lambda x, m: writing(lambda y: y.__setitem__(m, y[m] + x[m])),
    "scattered back": lambda x, m: torch.zeros(ROWS, 3).masked_scatter(m[:, None].expand(ROWS, 3), x[m] * 2),
    "a branch on any": lambda x, m: x[m].sum(0) * 2 if bool((m | True).any()) else x.sum(0),
    "the count as a length": lambda x, m: torch.where(m[:, None], x, 0.0)[: int(m.sum())].sum(0),
}
INDICES: dict[str, Step] = {
    "sum of places": lambda x, m: m.nonzero().sum(),
    "argwhere": lambda x, m: torch.argwhere(m).sum(),
    "looked up": lambda x, m: x[rows(m)].sum(0),
    "counted": lambda x, m: torch.ones(3) * rows(m).shape[0] + len(rows(m)) + rows(m).numel(),
    "written": lambda x, m: writing(lambda y: y.__setitem__(rows(m), x[rows(m)])),
    "put and added": lambda x, m: writing(lambda y: y.index_put_((rows(m) % 3,), x[rows(m)], accumulate=True)),
    "added": lambda x, m: writing(lambda y: y.index_add_(0, rows(m), x[rows(m)])),
    "copied": lambda x, m: writing(lambda y: y.index_copy_(0, rows(m), x[rows(m)])),
    "gathered": lambda x, m: x.nan_to_num(0.0, 1.0, -1.0).gather(0, rows(m)[:, None].expand(-1, 3)).sum(),
    "through a layer and back": lambda x, m: torch.zeros(ROWS, 2).index_add_(0, rows(m), F.linear(x[rows(m)], torch.ones(2, 3))),
    "cut": lambda x, m: (x[rows(m)][:1].sum(0), x[rows(m)][1:].sum(0), x[rows(m)[:2]].sum(0), x[rows(m)[-2:]].sum(0)),
}
GROUPS: dict[str, Step] = {
    "distinct numbers": lambda x, m: torch.unique(m.long() * 3).sum() + torch.unique(m).numel(),
    "distinct and back": lambda x, m: (u := torch.unique(torch.arange(ROWS) // 2 * m, return_inverse=True))[0][u[1]],
    "distinct and counted": lambda x, m: torch.unique(torch.where(m, x[:, 0], math.inf), return_counts=True)[1].max(),
    "runs": lambda x, m: torch.unique_consecutive(m, return_counts=True)[1].max(),
    "runs and back": lambda x, m: torch.unique_consecutive(m, return_inverse=True)[1],
    "bins": lambda x, m: torch.bincount(m.long() + 1, minlength=4),
    "weighted bins": lambda x, m: torch.bincount(m.long() + 1, weights=x.nan_to_num()[:, 0], minlength=4),
    "repeated to a known size": lambda x, m: torch.arange(2).repeat_interleave(
        torch.stack([m.sum(), (~m).sum()]), output_size=ROWS
    ),
}
RULES = {**MASKS, **INDICES, **GROUPS}


def inputs(mask: list[bool], seed: int, special: dict[int, float]) -> tuple[Tensor, Tensor]:
    x = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(seed)) + (seed % 3 - 1) * 5
    for place, value in special.items():
        x.view(-1)[place] = value
    x[~torch.tensor(mask)] = math.nan
    return x, torch.tensor(mask)


@functools.cache
def rewritten_once(name: str) -> Rewritten:
    return rewritten(RULES[name], *inputs([True, False, True, True, False, False, True, False], 0, {}))


masks = st.lists(st.booleans(), min_size=ROWS, max_size=ROWS)
specials = st.dictionaries(st.integers(0, ROWS * 3 - 1), st.sampled_from([0.0, 1.0, -1.0, math.inf, -math.inf]), max_size=4)


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=25, deadline=None)
@given(masks, st.integers(0, 1 << 20), specials)
def test_a_list_of_any_length_is_eager(name: str, mask: list[bool], seed: int, special: dict[int, float]) -> None:
    other_way = OLDER and name == "cut" and sum(mask) < 2
    check(rewritten_once(name), RULES[name], *inputs(mask, seed, special), exact=False, may_break=other_way)


@pytest.mark.parametrize("name", RULES)
def test_nothing_is_left_that_has_the_host_wait(name: str) -> None:
    for node in rewritten_once(name).module.graph.nodes:
        given = node.args[1] if node.target in (aten.index.Tensor, aten.index_put_.default) else ()
        assert all(index is None or index.meta["val"].dtype == torch.int64 for index in given)
        assert torch.Tag.data_dependent_output not in getattr(node.target, "tags", ())
        sized = given or "output_size" in node.kwargs
        assert torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()) or sized


def picked(x: Tensor, m: Tensor) -> Tensor:
    return x[m].sum(0)


BEFORE = """\
arg0_1 [8, 3] = placeholder(arg0_1)
arg1_1 [8] = placeholder(arg1_1)
index [u0, 3] = index.Tensor(arg0_1, [arg1_1])
sum_1 [3] = sum.dim_IntList(index, [0])
return [sum_1]"""
AFTER = """\
arg0_1 [8, 3] = placeholder(arg0_1)
arg1_1 [8] = placeholder(arg1_1)
sum_default [] = sum.default(arg1_1)
nonzero_static_default [8, 1] = nonzero_static.default(arg1_1, size=8, fill_value=0)
select_int [8] = select.int(nonzero_static_default, 1, 0)
index_tensor [8, 3] = index.Tensor(arg0_1, [select_int])
_pass_constant_0 [8] = get_attr(_pass_constant_0)
ge_tensor [8] = ge.Tensor(_pass_constant_0, sum_default)
view_default [8, 1] = view.default(ge_tensor, [8, 1])
masked_fill_scalar [8, 3] = masked_fill.Scalar(index_tensor, view_default, 0)
sum_dim_int_list [3] = sum.dim_IntList(masked_fill_scalar, [0])
return [sum_dim_int_list]"""


def test_the_graphs_before_and_after() -> None:
    arguments = inputs([True] * 4 + [False] * 4, 0, {})
    assert printed(traced(picked, *arguments)) == BEFORE
    graph = rewritten(picked, *arguments, only=["bounded"])
    assert printed(graph.module) == AFTER and not graph.assumes
    assert printed(rewritten(picked, *arguments, only=["bounded"]).module) == AFTER
    assert [after.split(" : ")[0] for _, after in graph.changes] == ["%index_tensor", "%sum_dim_int_list"]


def list_written_through_a_view(x: Tensor, m: Tensor) -> Tensor:
    rows = m.nonzero()
    head = rows[:, 0]
    head.add_(1).remainder_(ROWS)
    return x[rows[:, 0]].nan_to_num().sum(0)


def test_a_list_that_is_written_is_not_taken_for_zeros_behind_its_end() -> None:
    graph = rewritten(list_written_through_a_view, *inputs([True] * 4 + [False] * 4, 0, {}))
    for true in range(1, ROWS + 1):
        x, m = inputs([True] * true + [False] * (ROWS - true), true, {})
        check(graph, list_written_through_a_view, x.nan_to_num(1e6), m, exact=False, may_break=True)
