"""Random programs: whatever is put together from operators, views, writes and outputs, captured is eager."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from torch import nn

import graphs
from graphs.contract.buckets import batch_size, bucket_for, inferred_batch_dims, resized
from graphs.dispatch.call_log import NotReplayed
from tests.parity import assert_same, copied, state_of

Tensor = torch.Tensor
WIDTH = 4
CHECKED = settings(
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)

PURE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "multiply": lambda a, b: torch.tanh(a * b),
    "maximum": torch.maximum,
    "where": lambda a, b: torch.where(a > 0, a, b),
    "relu": lambda a, b: torch.relu(a),
    "softmax": lambda a, b: torch.softmax(a, -1),
    "cumsum": lambda a, b: a.cumsum(1).tanh(),
    "sort": lambda a, b: torch.sort(a, dim=1)[0],
    "largest": lambda a, b: a.max(1, keepdim=True)[0].expand_as(b) - b,
    "topk": lambda a, b: torch.cat(torch.topk(a, 2, dim=1)[:1] * 2, 1),
    "variance": lambda a, b: sum(torch.var_mean(a, 1, keepdim=True)) + b,
    "halves": lambda a, b: torch.cat(a.chunk(2, 1)[::-1], 1),
    "constant": lambda a, b: a * 0.5 + torch.arange(WIDTH),
    "outer": lambda a, b: torch.bmm(a.unsqueeze(2), b.unsqueeze(1)).mean(1),
    "integers": lambda a, b: (a * 4).long().clamp(-3, 3).float(),
    "gather": lambda a, b: a.gather(1, (b.abs() * 10).long() % WIDTH),
    "half": lambda a, b: a.bfloat16().float(),
    "view": lambda a, b: a.view(a.shape),
    "flipped": lambda a, b: a.flip(1),
    "twice transposed": lambda a, b: a.t().contiguous().t(),
    "reshaped": lambda a, b: a.reshape(-1).reshape(a.shape),
    "detached": lambda a, b: a.detach(),
}
ROW_WISE = {name: operator for name, operator in PURE.items() if name != "twice transposed"}  # copies more than one row only
INTERACTING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean of rows": lambda a, b: a - a.mean(0, keepdim=True),
    "sorted rows": lambda a, b: a.sort(0)[0],
    "sum over rows": lambda a, b: a.cumsum(0).tanh(),
    "share": lambda a, b: a / a.shape[0],
    "reversed rows": lambda a, b: a.flip(0),
    "shifted rows": lambda a, b: a.roll(1, 0),
}
WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "add_": lambda a, b: a.add_(b).tanh_(),
    "copy_": lambda a, b: a.copy_(b),
    "zero_": lambda a, b: a.zero_(),
    "write a part": lambda a, b: a[:, :2].copy_(b[:, 2:]),
    "write a column": lambda a, b: a[:, 1].mul_(0.5),
    "write transposed": lambda a, b: a.t().copy_(b.t()),
    "set a column": lambda a, b: a.__setitem__((slice(None), 2), 1.5),
    "fill masked": lambda a, b: a.masked_fill_(b > 0, 0.25),
    "add with out": lambda a, b: torch.add(a, b, out=a).tanh_(),
    "noise": lambda a, b: a.normal_(),
    "scatter": lambda a, b: a.scatter_(1, (b.abs() * 10).long() % WIDTH, 0.75),
}
DETERMINED = {name: write for name, write in WRITES.items() if name != "noise"}  # padded rows draw numbers too
RANDOM: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dropout": lambda a, b: nn.functional.dropout(a, 0.5, training=True),
    "rand_like": lambda a, b: a + torch.rand_like(a),
}


@dataclass(frozen=True)
class Program:
    """Operators with the positions of their operands among all tensors so far, and what is returned."""

    lines: tuple[tuple[str, int, int], ...]
    results: tuple[int, ...]
    form: str

    def run(self, tensors: list[Tensor]) -> Any:
        """Tensors are made by pure operators and added to ``tensors``; writes change one of them."""
        for name, first, second in self.lines:
            a, b = tensors[first % len(tensors)], tensors[second % len(tensors)]
            if name in WRITES:
                WRITES[name](a, b.clone())
            else:
                tensors.append(({**PURE, **INTERACTING, **RANDOM}[name])(a, b))
        made = [tensors[index % len(tensors)] for index in self.results]
        if self.form == "dict":
            return {"first": made[0], "rest": made[1:], "none": None}
        return {"one": made[0], "tuple": tuple(made), "list": [made, 3]}[self.form]


class Interpreted(nn.Module):
    """A program over its arguments and two buffers."""

    def __init__(self, program: Program, rows: int) -> None:
        super().__init__()
        self.program = program
        self.register_buffer("state", torch.linspace(-1, 1, rows * WIDTH).view(rows, WIDTH))
        self.cache = torch.zeros(rows, WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.program.run([x, y, self.state, self.cache])


class RowWise(nn.Module):
    """A program over its arguments and a weight, for any number of rows."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.weight = nn.Parameter(torch.linspace(-1, 1, WIDTH * WIDTH).view(WIDTH, WIDTH), requires_grad=False)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.program.run([x, y, torch.tanh(x @ self.weight)])


def programs(
    *vocabularies: dict[str, Any], forms: Sequence[str] = ("one", "tuple", "list", "dict")
) -> st.SearchStrategy[Program]:
    names = [name for vocabulary in vocabularies for name in vocabulary]
    lines = st.lists(st.tuples(st.sampled_from(names), st.integers(0, 11), st.integers(0, 11)), min_size=1, max_size=7)
    results = st.lists(st.integers(0, 11), min_size=1, max_size=3)
    return st.builds(Program, lines.map(tuple), results.map(tuple), st.sampled_from(forms))


class Arguments:
    """Makes two tensors for each call, of their own or sharing memory; all but the fresh ones at the same addresses."""

    def __init__(self, rows: int) -> None:
        self._whole, self._other, self._wide = torch.zeros(2 * rows, WIDTH), torch.zeros(rows, WIDTH), torch.zeros(WIDTH, rows)

    def __call__(self, kind: str, rows: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        for buffer in (self._whole, self._other, self._wide):
            buffer.normal_(generator=generator)
        x, other = self._whole[:rows], self._other[:rows]
        if kind == "one object":
            return x, x
        return {
            "same": (x, self._whole[:rows]),
            "neighbours": (x, self._whole[rows : 2 * rows]),
            "overlapping": (x, self._whole[1 : rows + 1]),
            "transposed": (self._wide[:, :rows].t(), other),
            "interleaved": (self._whole[: 2 * rows : 2], other),
            "fresh": (x.clone(), other.clone()),
            "own": (x, other),
        }[kind]


KINDS = ("own", "own", "own", "fresh", "same", "one object", "neighbours", "overlapping", "transposed", "interleaved")


def run(
    make: Callable[[], nn.Module], calls: Sequence[tuple[str, int, int]], wrap: Callable[[Any], Any]
) -> tuple[list[Any], Any]:
    """What each call returns, leaves in its arguments and in the model."""
    model = make()
    step = wrap(model)
    torch.manual_seed(5)
    arguments = Arguments(max(rows for _, rows, _ in calls))
    seen = []
    for kind, rows, seed in calls:
        x, y = arguments(kind, rows, seed)
        output = step(x, y)
        seen.append(copied({"output": output, "arguments": [x, y], "state": state_of(model)}))
    return seen, step


CONTEXTS = st.sampled_from([torch.no_grad, torch.inference_mode])


def check(
    make: Callable[[], nn.Module], calls: Sequence[tuple[str, int, int]], context: Any, **options: Any
) -> graphs.CapturedModule[..., Any]:
    with context(), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotReplayed)
        expected, _ = run(make, calls, lambda model: model)
        actual, step = run(make, calls, lambda model: graphs.capture(model, **options))
    for index, (wanted, got) in enumerate(zip(expected, actual, strict=True)):
        for part in ("output", "arguments", "state"):
            assert_same(wanted[part], got[part], f"{part} of call {index} ({calls[index]})")
    return step


@CHECKED
@given(programs(PURE, INTERACTING, DETERMINED), st.lists(st.sampled_from(KINDS), min_size=3, max_size=5), CONTEXTS)
@example(
    Program((("add_", 2, 0), ("copy_", 0, 1), ("add", 1, 3)), (4, 1), "list"), ["own", "overlapping", "one object"], torch.no_grad
)
@example(
    Program((("view", 2, 0), ("write a part", 4, 0), ("add", 2, 0)), (5, 4), "dict"), ["own", "same", "transposed"], torch.no_grad
)
def test_a_random_program_gives_and_leaves_what_eager_does(program: Program, kinds: list[str], context: Any) -> None:
    calls = [(kind, 3, index) for index, kind in enumerate(kinds)]
    check(lambda: Interpreted(program, 3), [*calls, *calls[-1:]], context)


@CHECKED
@given(programs(PURE, INTERACTING, WRITES, RANDOM), st.integers(0, 1000), CONTEXTS)
def test_a_program_that_draws_random_numbers_draws_those_of_eager(program: Program, seed: int, context: Any) -> None:
    """Contiguous arguments: elements get their numbers in the order of memory, and a copied argument is contiguous."""
    check(lambda: Interpreted(program, 3), [("fresh", 3, seed + index) for index in range(4)], context)


@CHECKED
@given(programs(ROW_WISE), st.lists(st.integers(1, 9), min_size=3, max_size=6), CONTEXTS)
def test_a_row_wise_program_in_buckets_gives_what_eager_does(program: Program, sizes: list[int], context: Any) -> None:
    calls = [("fresh", rows, index) for index, rows in enumerate(sizes)]
    step = check(lambda: RowWise(program), calls, context, buckets=[2, 4, 8], batch_dims={"x": 0, "y": 0})
    report = step.report()
    assert report.replays + report.eager_calls == len(sizes)
    reasons = {refusal.reason for refusal in report.refusals}
    assert reasons <= {"above-largest-bucket", "rows-interact"}  # a view of an argument is recorded at its exact size, any size
    if "rows-interact" not in reasons:
        assert report.eager_calls == sum(rows > 8 for rows in sizes)


@CHECKED
@given(programs(ROW_WISE, INTERACTING, DETERMINED), st.lists(st.integers(1, 9), min_size=3, max_size=6), CONTEXTS)
@example(Program((("mean of rows", 0, 0), ("add", 3, 1)), (4,), "one"), [3, 1, 4, 6], torch.no_grad)
@example(Program((("write a column", 2, 0), ("shifted rows", 2, 0)), (3, 2), "tuple"), [3, 2, 3, 8], torch.no_grad)
def test_a_program_whose_rows_may_interact_gives_what_eager_does_in_buckets(
    program: Program, sizes: list[int], context: Any
) -> None:
    calls = [("fresh", rows, index) for index, rows in enumerate(sizes)]
    check(lambda: RowWise(program), calls, context, buckets=[2, 4, 8], batch_dims={"x": 0, "y": 0})


@CHECKED
@given(programs(PURE), st.lists(st.integers(1, 9), min_size=3, max_size=6), CONTEXTS)
def test_an_inferred_batch_gives_what_eager_does(program: Program, sizes: list[int], context: Any) -> None:
    check(lambda: RowWise(program), [("fresh", rows, index) for index, rows in enumerate(sizes)], context, buckets=[2, 4, 8])


SIZES = st.lists(st.integers(1, 64), min_size=1, max_size=6).map(lambda sizes: tuple(sorted(set(sizes))))


@given(st.integers(0, 80), SIZES)
def test_a_batch_goes_to_the_smallest_bucket_that_holds_it(batch: int, buckets: tuple[int, ...]) -> None:
    found = bucket_for(batch, buckets)
    fitting = [size for size in buckets if size >= batch]
    assert found == (min(fitting) if fitting else None)


SHAPES = st.lists(st.lists(st.integers(1, 4), min_size=0, max_size=3).map(tuple), min_size=1, max_size=4)


@given(SHAPES, st.data())
def test_inferred_dimensions_are_those_that_were_resized(shapes: list[tuple[int, ...]], data: st.DataObject) -> None:
    """Put a batch of 7 somewhere in some of the shapes, then one of 9: it is found where it was put, and only there."""
    dims = [data.draw(st.one_of(st.none(), st.integers(0, len(shape)))) for shape in shapes]
    seven = [shape if dim is None else (*shape[:dim], 7, *shape[dim:]) for shape, dim in zip(shapes, dims, strict=True)]
    nine = [resized(shape, dim, 9) for shape, dim in zip(seven, dims, strict=True)]
    found = inferred_batch_dims(seven, nine)
    if all(dim is None for dim in dims):
        assert found is None
    else:
        assert found == tuple(dims)
        assert batch_size(nine, dims) == 9


@given(SHAPES)
def test_nothing_is_inferred_from_equal_shapes_or_from_two_sizes(shapes: list[tuple[int, ...]]) -> None:
    assert inferred_batch_dims(shapes, shapes) is None
    assert inferred_batch_dims([*shapes, (3,), (3,)], [*shapes, (4,), (5,)]) is None
    assert inferred_batch_dims([*shapes, (3, 3)], [*shapes, (4, 4)]) is None
    assert inferred_batch_dims([*shapes, (3,)], [*shapes, (3, 1)]) is None
