"""The rules of `passes.host_values.rules` against eager: prefixes of every length, with NaN where nothing may look."""

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

from tests.passes.steps import OLDER, Rewritten, check, rewritten

ROWS = 8
Step = Callable[[Tensor, Tensor], Any]
Body = Callable[[Tensor, int], Any]


def prefix(body: Body) -> Step:
    """A step that does ``body`` with the first ``int(t)`` rows, and their number."""

    def step(x: Tensor, t: Tensor) -> Any:
        n = int(t)
        return body(x[:n], n)

    return step


def attention(x: Tensor, **settings: Any) -> Tensor:
    return F.scaled_dot_product_attention(torch.ones(1, 1, 2, 3), x[None, None], x[None, None], **settings)


def writing(x: Tensor, write: Callable[[Tensor], object]) -> Tensor:
    y = torch.zeros(ROWS, 3)
    write(y)
    return y


REDUCTIONS: dict[str, Body] = {
    "sum": lambda x, n: x.sum(0),
    "sum of all": lambda x, n: x.sum(),
    "sum in double": lambda x, n: x.sum(0, dtype=torch.float64),
    "mean": lambda x, n: x.mean(0),
    "mean of all": lambda x, n: x.mean(),
    "mean of each row": lambda x, n: x.mean(1).sum(),
    "amax": lambda x, n: x.amax(0),
    "amin": lambda x, n: x.amin(0),
    "max": lambda x, n: tuple(x.max(0)),
    "min": lambda x, n: tuple(x.min(0)),
    "max of all": lambda x, n: x.max(),
    "min of all": lambda x, n: x.min(),
    "argmax": lambda x, n: x.argmax(0),
    "argmin": lambda x, n: x.argmin(0),
    "argmax of all": lambda x, n: x.argmax(),
    "prod": lambda x, n: x.prod(0),
    "any": lambda x, n: (x > 0).any(0),
    "all": lambda x, n: (x > 0).all(0),
    "count": lambda x, n: (x > 0).count_nonzero(0),
    "logsumexp": lambda x, n: x.logsumexp(0),
    "norm": lambda x, n: x.norm(dim=0),
    "largest norm": lambda x, n: torch.linalg.vector_norm(x, math.inf, dim=0),
    "smallest norm": lambda x, n: torch.linalg.vector_norm(x, -math.inf, dim=0),
    "norm of a negative order": lambda x, n: torch.linalg.vector_norm(x, -1, dim=0),
    "norm of order zero": lambda x, n: torch.linalg.vector_norm(x, 0, dim=0),
    "running sum": lambda x, n: x.cumsum(0).sum(0),
    "softmax": lambda x, n: (x.softmax(0) * x).sum(0),
    "softmax of rows": lambda x, n: x.softmax(1).sum(0),
    "log softmax": lambda x, n: x.log_softmax(0).sum(0),
    "sorted": lambda x, n: (x.sort(0).values * torch.arange(n)[:, None]).nansum(0),
    "sorted the other way": lambda x, n: (x.sort(0, descending=True).values * torch.arange(n)[:, None]).nansum(0),
    "top two": lambda x, n: x.topk(2, 0).values,
    "top three or less": lambda x, n: x.topk(min(3, n), 0).values.sum(0),
    "least three or less": lambda x, n: x.topk(min(3, n), 0, largest=False).values.sum(0),
    "places of equal elements": lambda x, n: x.sign().topk(min(3, n), 0).indices.sum(0),
    "divided to whole numbers": lambda x, n: ((x * 4).nan_to_num(0, 9, -9).long() // 3).sum(0),
    "a row of the top": lambda x, n: (x[:, 0][x[:, 0].topk(min(2, n)).indices]).sum(),
    "layer norm": lambda x, n: F.layer_norm(x, (3,)).sum(0),
    "rms norm": lambda x, n: F.rms_norm(x, (3,)).sum(0),
    "a number of elements": lambda x, n: torch.ones(2) * x.numel() + len(x),
}
PRODUCTS: dict[str, Body] = {
    "rows through a matrix": lambda x, n: (x @ torch.ones(3, 2)).sum(0),
    "rows through a layer": lambda x, n: F.linear(x, torch.ones(2, 3), torch.ones(2)).sum(0),
    "both sides contracted": lambda x, n: x.t() @ x,
    "a vector": lambda x, n: x.t() @ x[:, 0],
    "a dot product": lambda x, n: x[:, 0].dot(x[:, 1]),
    "every pair": lambda x, n: (x @ x.t()).sum(),
    "a batch": lambda x, n: x[None].transpose(1, 2) @ x[None],
    "keys and values": lambda x, n: attention(x),
    "keys with a mask": lambda x, n: attention(x, attn_mask=torch.ones(2, n).bool()),
    "keys with a bias": lambda x, n: attention(x, attn_mask=torch.ones(2, n)),
    "queries": lambda x, n: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]).sum(2),
    "differences": lambda x, n: (x[:, None] - x[None]).abs().sum(),
}
SHAPES: dict[str, Body] = {
    "elementwise": lambda x, n: torch.where(x > 0, x, -x).clamp(-1, 1).exp().sum(0),
    "with a number": lambda x, n: (x * n / max(n, 1)).sum(0),
    "in other dtypes": lambda x, n: x.double().half().float().sum(0),
    "joined with rows behind": lambda x, n: torch.cat([x, torch.ones(2, 3)])[-1] + torch.cat([x, torch.ones(2, 3)]).sum(0),
    "joined with rows before": lambda x, n: torch.cat([torch.ones(2, 3), x])[-1],
    "joined with itself": lambda x, n: (torch.cat([x, x * 2, x * 3]) * torch.arange(3 * n)[:, None]).sum(0),
    "joined side by side": lambda x, n: torch.cat([x, x * 2], 1).sum(0),
    "the last row": lambda x, n: x[-1],
    "the first row": lambda x, n: x[0],
    "all but the first": lambda x, n: x[1:].sum(0),
    "all but the last": lambda x, n: x[:-1].sum(0),
    "the last two": lambda x, n: x[-2:].sum(0),
    "every other": lambda x, n: x[::2].sum(0),
    "flattened": lambda x, n: x.flatten().cumsum(0).sum(),
    "with another dimension": lambda x, n: x.reshape(n, 3, 1).squeeze(-1).unsqueeze(0).sum(1),
    "expanded": lambda x, n: (torch.ones(3).expand(n, 3) * x).sum(0),
    "with zeros of its size": lambda x, n: (torch.zeros(n, 3) + x + torch.ones_like(x)).sum(0),
    "with its places": lambda x, n: (torch.arange(n)[:, None] * x).sum(0),
    "unbound": lambda x, n: sum(column.sum() for column in x.unbind(1)),
    "split": lambda x, n: sum(part.sum() * i for i, part in enumerate(x.split(2, 1))),
    "looked up backwards": lambda x, n: x[torch.arange(x.shape[0] - 1, -1, -1)].sum(0),
    "gathered": lambda x, n: x.gather(1, torch.ones(n, 1, dtype=torch.long)).sum() + x.sum(),
    "added by index": lambda x, n: torch.zeros(4, 3).index_add(0, torch.arange(n) % 4, x),
    "added by place": lambda x, n: torch.zeros(4, 3).scatter_add(0, (torch.arange(n) % 4)[:, None].expand(n, 3), x),
    "picked": lambda x, n: x[x[:, 0] > 0].sum(0),
    "distinct": lambda x, n: torch.unique(torch.where(x[:, 0] > 0, math.inf, x[:, 0])).sum(),
}
WRITES: dict[str, Body] = {
    "rows": lambda x, n: writing(x, lambda y: y[:n].copy_(x * 2)),
    "added rows": lambda x, n: writing(x, lambda y: y[:n].add_(x)),
    "a number": lambda x, n: writing(x, lambda y: y[:n].fill_(7)),
    "zeros": lambda x, n: writing(x, lambda y: y.add_(1)[:n].zero_()),
    "what is left": lambda x, n: writing(x, lambda y: y[n:].fill_(7)),
    "twice in place": lambda x, n: writing(x, lambda y: y[:n].add_(1).mul_(2)),
    "rows by index": lambda x, n: writing(x, lambda y: y.index_copy_(0, torch.arange(n), x)),
    "sums by index": lambda x, n: writing(x, lambda y: y.index_add_(0, torch.arange(n), x)),
    "a number by place": lambda x, n: writing(
        x, lambda y: y.scatter_(0, (torch.arange(len(x)) * 2 % 7)[:, None].expand(-1, 3), 5.0)
    ),
    "rows by place": lambda x, n: writing(x, lambda y: y.scatter_(0, (7 - torch.arange(n))[:, None].expand(n, 3), x)),
    "columns by place": lambda x, n: writing(x, lambda y: y.scatter_(1, torch.arange(n)[:, None] % 3, x)),
    "a number into a longer row": lambda x, n: (
        torch.ones(2, len(x) + 1).scatter(1, torch.arange(1, len(x) + 1)[None].expand(2, -1), 4.0).sum(1)
    ),
    "where a mask says": lambda x, n: writing(x, lambda y: y[:n].masked_fill_(x > 0, 3.0)),
    "through the given tensor": lambda x, n: x.mul_(2).sum(0),
}
EMPTY_IS_ANOTHER_WAY = {
    *("logsumexp", "sorted", "sorted the other way", "keys and values", "keys with a mask", "keys with a bias", "queries"),
    *("every other", "with another dimension", "writing where a mask says"),
}
"""Where torch itself asks whether there is anything."""
RULES = {**REDUCTIONS, **PRODUCTS, **SHAPES, **{f"writing {name}": body for name, body in WRITES.items()}}


@functools.cache
def rewritten_once(name: str) -> tuple[Step, Rewritten]:
    step = prefix(RULES[name])
    return step, rewritten(step, *inputs(0, 5, {}))


def inputs(seed: int, length: int, special: dict[int, float]) -> tuple[Tensor, Tensor]:
    """Rows of which the first ``length`` mean something, with some special values among them; NaN behind."""
    x = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(seed)) + (seed % 3 - 1) * 5
    for place, value in special.items():
        x.view(-1)[place] = value
    x[length:] = math.nan
    return x, torch.tensor(length)


specials = st.dictionaries(st.integers(0, ROWS * 3 - 1), st.sampled_from([0.0, 1.0, -1.0, math.inf, -math.inf]), max_size=4)


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1 << 20), st.integers(0, ROWS), specials)
def test_a_rule_is_eager_at_every_length(name: str, seed: int, length: int, special: dict[int, float]) -> None:
    if OLDER and name == "writing rows by index":
        pytest.skip("this torch does not say that there are as many rows as indices, which is where the bound comes from")
    step, graph = rewritten_once(name)
    other_way = (name in EMPTY_IS_ANOTHER_WAY or (OLDER and name == "log softmax")) and length == 0
    check(graph, step, *inputs(seed, length, special), exact=False, may_break=other_way)


LARGE = 1 << 19


def weighted(x: Tensor, t: Tensor) -> Tensor:
    n = int(t)
    return x[:4, :n].softmax(-1) @ x[4:, :n].t()


@pytest.fixture(scope="module")
def wide() -> Tensor:
    return torch.randn(8, LARGE // 4, generator=torch.Generator().manual_seed(0))


def test_a_large_side_of_a_product_is_not_copied_and_its_padding_is_noticed(wide: Tensor) -> None:
    columns = wide.shape[1]
    graph = rewritten(weighted, wide, torch.tensor(columns // 2))
    fills = [node for node in graph.module.graph.nodes if node.target is torch.ops.aten.masked_fill.Scalar]
    assert [fill.args[2] for fill in fills] == [-math.inf], "the weights are zero already, the other side is not touched"
    for length in (1, columns // 2, columns):
        check(graph, weighted, wide, torch.tensor(length), exact=False)
    for garbage in (math.nan, math.inf):
        spoiled = wide.clone()
        spoiled[4:, columns // 2 :] = garbage
        results, held, _ = graph(spoiled, torch.tensor(columns // 2))
        assert not held and results[0].isnan().any()
    results, held, _ = graph(wide, torch.tensor(0))
    assert not held, "of no weights softmax makes NaN, and eager zeros"


def fused_attention(cache: Tensor, t: Tensor) -> Tensor:
    n = int(t)
    return F.scaled_dot_product_attention(cache[:1, :, :2], cache[:1, :, :n], cache[1:, :, :n])


@pytest.mark.parametrize("part", [0, 1], ids=["keys", "values"])
def test_a_large_cache_is_not_copied_for_attention_and_its_padding_is_noticed(wide: Tensor, part: int) -> None:
    cache = wide.view(2, 1, -1, 16)
    rows = cache.shape[2]
    graph = rewritten(fused_attention, cache, torch.tensor(rows // 2))
    assert not any(node.target is torch.ops.aten.masked_fill.Scalar for node in graph.module.graph.nodes)
    for length in (1, rows // 2, rows):
        check(graph, fused_attention, cache, torch.tensor(length), exact=False)
    spoiled = cache.clone()
    spoiled[part, :, rows // 2 :] = math.nan
    assert not graph(spoiled, torch.tensor(rows // 2))[1]
    assert graph(cache, torch.tensor(rows // 2))[1]


EXACT: dict[str, Body] = {
    "argmax between rows": lambda x, n: x.t().contiguous().argmax(),
    "variance": lambda x, n: x.var(0),
    "running maximum": lambda x, n: x.cummax(0).values.sum(0),
    "median": lambda x, n: x.median(0).values,
    "reversed": lambda x, n: x.flip(0)[0] if n else x.sum(0),
    "stacked": lambda x, n: torch.stack([x, x]).sum(0).sum(0),
    "repeated": lambda x, n: x.repeat(2, 1).sum(0),
    "an identity": lambda x, n: torch.eye(x.shape[0]).sum() + x.sum(),
    "convolved": lambda x, n: F.conv1d(x.t()[None], torch.ones(3, 3, 1)).sum(2),
    "causal attention": lambda x, n: F.scaled_dot_product_attention(x[None], x[None], x[None], is_causal=True).sum(1),
    "random numbers": lambda x, n: (torch.rand(n, 3) * x).sum(0),
    "random numbers alike": lambda x, n: (torch.rand_like(x) * x).sum(0),
    "dropout": lambda x, n: F.dropout(x, 0.5).sum(0),
}


@pytest.mark.parametrize("name", EXACT)
def test_an_operator_without_a_rule_runs_at_the_length_it_was_traced_with(name: str) -> None:
    def seeded(x: Tensor, t: Tensor) -> Any:
        torch.manual_seed(3)
        return prefix(EXACT[name])(x, t)

    graph = rewritten(prefix(EXACT[name]), *inputs(0, 5, {}))

    class Seeded(Rewritten):
        def __call__(self, *tensors: Tensor) -> tuple[list[Tensor], bool, list[Tensor]]:
            torch.manual_seed(3)
            return super().__call__(*tensors)

    for length in range(1, ROWS + 1):
        held = check(Seeded(graph.graph), seeded, *inputs(1, length, {}), may_break=True)
        assert held == (length == 5)
