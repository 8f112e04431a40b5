"""`host_reads`: host reads and branches are told apart by their place in the code, several of them in one line too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import passes
from passes.core.source_location import Place, user_place
from passes.core.values.host_reads import Read, Reads
from tests.passes.steps import Step, check, rewritten, traced

ITEM = "aten._local_scalar_dense.default"


def drawn(high: int, *size: int, seed: int) -> Tensor:
    return torch.randint(high, size, generator=torch.Generator().manual_seed(seed))


def edges(pairs: Tensor, keep: Tensor) -> Tensor:
    return pairs[:, keep[pairs[0]] & keep[pairs[1]]].sum(1)


def chosen(x: Tensor, keys: Tensor, picked: Tensor) -> Tensor:
    return x[keys[picked] > 3].sum()


def rows_then_mask(x: Tensor, picked: Tensor, mask: Tensor) -> Tensor:
    return x[picked][mask].sum()


def masked_update(cache: Tensor, classes: Tensor, picked: Tensor) -> Tensor:
    cache[classes[picked] == 1] += 1
    return cache.sum(0)


def two_lengths(x: Tensor, mask: Tensor, other: Tensor) -> Tensor:
    return x[mask].sum() - x[other].sum() * x[other][: int(mask.sum())].sum()


def number_of_a_constant(x: Tensor, t: Tensor) -> Tensor:
    numbers = [int(value) for value in (torch.tensor(3), t.sum(), torch.tensor(4), t.max())]
    return x * numbers[0] + numbers[1] - numbers[2] * numbers[3]


def sized_or_not(x: Tensor, given: Tensor, counts: Tensor) -> Tensor:
    return x.repeat_interleave(given, output_size=8).sum() + x.repeat_interleave(counts)[: min(int(counts[0]), 2)].sum()


def pooled(scores: Tensor, batch: Tensor, ratio: Tensor) -> Tensor:
    """The best of each of three groups, some of them empty at times."""
    count = torch.zeros(3).index_add_(0, batch, torch.ones(batch.numel()))
    k = (count * ratio).ceil().long()
    order = scores.argsort(descending=True)
    order = order[batch[order].argsort(stable=True)]
    batch = batch[order]
    start = torch.cat([count.new_zeros(1), count.cumsum(0)[:-1]]).long()
    place = torch.arange(scores.numel()) - start[batch]
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order[place < k[batch]]] = True
    return torch.where(mask, scores, 0.0)


def smaller(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return x * int(min(a[0], b[0])) + int(max(a[1], b[1]))


READS: dict[str, tuple[Step, Any]] = {
    "two masks": (edges, lambda i: (drawn(6, 2, 10, seed=i), drawn(2, 6, seed=i + 50) > 0)),
    "an index and a mask": (chosen, lambda i: (torch.arange(10.0), drawn(8, 6, seed=i), drawn(6, 10, seed=i + 50))),
    "rows, then a mask": (rows_then_mask, lambda i: (torch.arange(10.0), drawn(10, 6, seed=i), drawn(2, 6, seed=i) > 0)),
    "a write": (masked_update, lambda i: (torch.ones(8, 2), drawn(2, 5, seed=i), drawn(5, 8, seed=i + 50))),
    "masks and a number": (two_lengths, lambda i: (torch.arange(6.0), drawn(2, 6, seed=i) > 0, drawn(2, 6, seed=i + 50) > 0)),
    "a number that is known": (number_of_a_constant, lambda i: (torch.arange(3.0), drawn(9, 4, seed=i))),
    "sized by the caller": (
        sized_or_not,
        lambda i: (torch.arange(4.0), torch.bincount(drawn(4, 8, seed=i), minlength=4), drawn(2, 4, seed=i)),
    ),
    "the best of groups": (
        pooled,
        lambda i: (
            torch.randn(9, generator=torch.Generator().manual_seed(i)),
            drawn(3 if i % 3 == 1 else 2, 9, seed=i) + (i % 3 == 2),
            torch.tensor([0.5, 0.3, 0.0, 0.01][i % 4]),
        ),
    ),
    "the smaller of two": (smaller, lambda i: (torch.arange(3.0), drawn(9, 2, seed=i), drawn(9, 2, seed=i + 50))),
}


@pytest.mark.parametrize("name", READS)
def test_reads_of_one_line_are_told_apart(name: str) -> None:
    step, arguments = READS[name]
    graph = rewritten(step, *arguments(0), merge=True, bounds={"test_reads.py:50": 8})
    assert [check(graph, step, *arguments(seed)) for seed in range(12)] == [True] * 12


def nested(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return (x if a > 0 else x * 2 if b > 0 else x * 3) + (x if c > 0 else -x)


def called(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return _scaled(x, 1, c) if a > 0 else _scaled(x, 2, c) if b > 0 else x


def _scaled(x: Tensor, by: int, t: Tensor) -> Tensor:
    return x * by if t > 0 else x - by


# fmt: off
def one_line(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    if a > 0: x = x * 2; y = x + 1 if b > 0 else x - 1  # noqa: E701, E702
    else: y = x * 5 if b > 1 else x  # noqa: E701
    return y if not c > 0 or (a > b and b > c) else -y
# fmt: on


def spread(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    if (
        a > 0
        and not b > 0
    ):  # fmt: skip
        x = x + 1
    elif c == 1 or (a > b and c > 0):
        x = x * 3
    return x


BRANCHES: dict[str, Step] = {"nested": nested, "a function called twice": called, "statements": one_line, "several lines": spread}
OUTCOMES = [torch.tensor(value) for value in (-1, 0, 1, 2)]


def chain(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return x * 2 if a < b < c else x * 3 if b < c else x


@pytest.mark.parametrize("name", BRANCHES)
@pytest.mark.parametrize("first", [(0, 0, 0), (2, 2, 2), (3, 0, 2), (0, 3, 1)])
def test_branches_of_one_line_are_told_apart(name: str, first: tuple[int, int, int]) -> None:
    step = BRANCHES[name]
    graph = rewritten(step, torch.arange(3.0), *[OUTCOMES[index].clone() for index in first], merge=True)
    assert not graph.assumes
    for a in OUTCOMES:
        for b in OUTCOMES:
            for c in OUTCOMES:
                assert check(graph, step, torch.arange(3.0), a, b, c)


def test_a_chain_of_comparisons_asks_at_a_place_of_its_own() -> None:
    graph = rewritten(chain, torch.arange(3.0), torch.tensor(0), torch.tensor(1), torch.tensor(2), merge=True)
    held = [check(graph, chain, torch.arange(3.0), a, b, c, may_break=True) for a in OUTCOMES for b in OUTCOMES for c in OUTCOMES]
    assert sum(held) >= 24


def test_only_the_branch_that_cannot_be_merged_is_assumed() -> None:
    def step(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (x + torch.rand(3) * 0 if a > 0 else x) + (x * 2 if b > 0 else x * 3)

    graph = rewritten(step, torch.ones(3), torch.tensor(0), torch.tensor(0), merge=True)
    (site,) = graph.graph.facts.unmerged
    assert site[2] == 16 and graph.assumes
    assert [check(graph, step, torch.ones(3), torch.tensor(0), torch.tensor(b)) for b in (0, 1)] == [True, True]


def test_trips_beyond_the_eager_run_go_the_way_of_their_own_branch() -> None:
    def step(x: Tensor, mask: Tensor, t: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for row in mask.nonzero():
            out.index_add_(0, row, (x[row] if t > 0 else -x[row]) + (x[row] * 2 if t > 1 else x[row] * 3))
        return out

    x = torch.arange(1.0, 5.0)
    graph = rewritten(step, x, torch.tensor([1, 0, 0, 0]), torch.tensor(1))
    for mask in ([1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]):
        assert check(graph, step, x, torch.tensor(mask), torch.tensor(1))


def test_a_read_has_its_turn_at_its_place() -> None:
    here = Place("file.py", 3, 4, 3, 9)
    reads = Reads([Read(ITEM, here.site, 5, place=here, turn=1), Read(ITEM, here.site, 7, place=Place("file.py", 3, 12, 3, 20))])
    assert [[read.value for read in reads.next(ITEM, here, number=True)] for _ in range(3)] == [[], [5], []]


def test_elements_of_a_list_are_read_one_after_the_other() -> None:
    here = Place("file.py", 3, 4, 3, 9)
    reads = Reads(
        [Read("Tensor.tolist", here.site, [[1, 2], [3]], place=here), Read("Tensor.tolist", here.site, [4], place=here)]
    )
    assert [reads.next(ITEM, here, number=True)[0].value for _ in range(4)] == [1, 2, 3, 4]
    assert reads.next(ITEM, here, number=True) == []


def test_the_truth_of_a_number_is_not_taken_for_the_number() -> None:
    def step(x: Tensor, t: Tensor) -> Tensor:
        return x * min(t, 3)  # type: ignore[operator, type-var]  # Python asks whether 3 is below, the trace for the number

    graph = traced(step, torch.ones(2), torch.tensor(2))
    assert not graph.facts.hints


def test_places_of_one_line_differ() -> None:
    first = user_place()
    second = user_place()
    pair = [user_place(), user_place()]
    assert first.line + 1 == second.line and pair[0].line == pair[1].line
    assert pair[0] != pair[1] and pair[0].file == __file__


def test_a_decomposition_that_reads_less_than_the_operator_is_not_followed_blindly() -> None:
    def step(index: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(index).sum(0)[:2]  # the host reads the least and the largest class

    with pytest.raises(passes.Unremovable, match="did not read"):
        traced(step, torch.tensor([1, 2]))


def test_reads_of_one_place_are_told_apart_by_what_was_read() -> None:
    here = Place("file.py", 3, 4, 3, 9)
    given = [("min", 1), ("max", 2), ("max", 3)]
    read = [Read(ITEM, here.site, value, place=here, turn=turn, source=name) for turn, (name, value) in enumerate(given)]
    assert [r.value for r in Reads(read).next(ITEM, here, number=True, source="max")] == [2]
    assert Reads(read).next(ITEM, here, number=True, source="aminmax") == []


def test_a_length_that_no_hint_is_known_of_is_still_bounded() -> None:
    def step(x: Tensor, mask: Tensor) -> Tensor:
        return x[mask].sum()

    graph = traced(step, torch.ones(4), torch.tensor([True, False, True, True]))
    graph.facts.hints.clear()
    rewritten_graph = passes.remove_host_values(graph)
    assert rewritten_graph.changes
    graph.module.recompile()
    assert graph.module(torch.arange(4.0), torch.tensor([False, True, False, True]))[0] == 4
