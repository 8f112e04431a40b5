"""`branches` and `legality`: both sides of a branch in one graph, for every outcome what eager does."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import passes
from graphs.state.python_state import PythonState
from passes.core.predicates import trips_of
from tests.passes.steps import Rewritten, check, printed, rewritten, traced

Step = Callable[..., Any]


def merged(step: Step, *tensors: Tensor) -> Rewritten:
    return rewritten(step, *tensors, merge=True)


def reasons(graph: Rewritten) -> list[str]:
    return list(graph.graph.facts.unmerged.values())


def reset_or_scale(cache: Tensor, x: Tensor, t: Tensor) -> Tensor:
    position = int(t)
    scale = 2.0
    if position == 0:
        cache[1].zero_()
        x = x + 1
    else:
        scale = position * 0.5
    return (cache[1] + x) * scale


BEFORE = """\
arg0_1 [4, 3] = placeholder(arg0_1)
arg1_1 [3] = placeholder(arg1_1)
arg2_1 [] = placeholder(arg2_1)
_local_scalar_dense = _local_scalar_dense.default(arg2_1)
select [3] = select.int(arg0_1, 0, 1)
zero_ [3] = zero_.default(select)
add [3] = add.Tensor(arg1_1, 1)
scalar_tensor [] = scalar_tensor.default(_local_scalar_dense, dtype=torch.float64, device=cpu, pin_memory=False)
scalar_tensor_1 [] = scalar_tensor.default(0.5, dtype=torch.float64, device=cpu, pin_memory=False)
mul [] = mul.Tensor(scalar_tensor, scalar_tensor_1)
_local_scalar_dense_1 = _local_scalar_dense.default(mul)
scalar_tensor_2 [] = scalar_tensor.default(sym_ite_2, dtype=torch.bool, device=cpu, pin_memory=False)
where [3] = where.self(scalar_tensor_2, add, arg1_1)
select_1 [3] = select.int(arg0_1, 0, 1)
add_1 [3] = add.Tensor(select_1, where)
mul_1 [3] = mul.Tensor(add_1, sym_ite_1)
return [mul_1]"""


def test_the_graphs_before_and_after() -> None:
    arguments = torch.ones(4, 3), torch.ones(3), torch.tensor(0)
    traced_step = traced(reset_or_scale, *arguments, merge=True)
    assert "\n".join(line for line in printed(traced_step).splitlines() if "function" not in line) == BEFORE
    sides = {str(node): [str(arm.predicate) for arm in trips_of(node)] for node in traced_step.module.graph.nodes}
    assert sides["zero_"] == sides["add"] == ["Eq(u0, 0)"] and sides["where"] == sides["add_1"] == []
    graph = merged(reset_or_scale, *arguments)
    assert printed(graph.module) == AFTER and not graph.assumes
    for position in (0, 1, 5):
        assert check(graph, reset_or_scale, torch.randn(4, 3), torch.randn(3), torch.tensor(position))


AFTER = """\
arg0_1 [4, 3] = placeholder(arg0_1)
arg1_1 [3] = placeholder(arg1_1)
arg2_1 [] = placeholder(arg2_1)
select [3] = select.int(arg0_1, 0, 1)
eq_scalar [] = eq.Scalar(arg2_1, 0)
masked_fill__scalar [3] = masked_fill_.Scalar(select, eq_scalar, 0)
add [3] = add.Tensor(arg1_1, 1)
_to_copy_default [] = _to_copy.default(arg2_1, dtype=torch.float64)
clone_default [] = clone.default(_to_copy_default)
scalar_tensor_1 [] = scalar_tensor.default(0.5, dtype=torch.float64, device=cpu, pin_memory=False)
mul [] = mul.Tensor(clone_default, scalar_tensor_1)
where [3] = where.self(eq_scalar, add, arg1_1)
select_1 [3] = select.int(arg0_1, 0, 1)
add_1 [3] = add.Tensor(select_1, where)
full_like_default_2 [] = full_like.default(eq_scalar, 2.0, dtype=torch.float64)
where_self_1 [] = where.self(eq_scalar, full_like_default_2, mul)
_to_copy_default_1 [] = _to_copy.default(where_self_1, dtype=torch.float32)
mul_tensor [3] = mul.Tensor(add_1, _to_copy_default_1)
return [mul_tensor]"""


class Taken(NamedTuple):
    """Outcomes to try, one number after the other, and whether the graph assumes anything: places within their tensors."""

    values: Sequence[float]
    assumes: bool = False


CASES: dict[str, tuple[Step, Taken]] = {}


def case(*values: float, assumes: bool = False) -> Callable[[Step], Step]:
    def add(step: Step) -> Step:
        CASES[step.__name__] = (step, Taken(values, assumes))
        return step

    return add


@case(-1, 0, 2)
def both_sides_assign(x: Tensor, t: Tensor) -> Tensor:
    if t > 0:
        y, k = x * 2, 3
    else:
        y, k = x - 1, 5
    return y * k


@case(-1, 0, 2)
def a_chain(x: Tensor, t: Tensor) -> Tensor:
    if t < 0:
        y = x.neg()
    elif t == 0:
        y = x * 3
    else:
        y = x.exp()
    return y + 1


@case(-2, -1, 0, 1, 2, 3)
def nested_returns(x: Tensor, t: Tensor) -> Tensor:
    if t > 0:
        x = x + t
        if t > 1:
            if t > 2:
                return x * 5
            return x * t
        return x - 1
    elif t < -1:
        return x.abs()
    return x.neg()


@case(-1, 1, 3)
def both_sides_return(x: Tensor, t: Tensor) -> Tensor:
    for _ in range(2):
        x = x * 1.5
    if t > 0:
        return x + 1
    else:
        return x - 1


@case(-2, 0, 1, 2)
def and_or_not(x: Tensor, t: Tensor) -> Tensor:
    if t > 0 and not t > 1:
        x = x + 1
    if t < -1 or (t > 1 and x.sum() > 0):
        x = x * 2
    return x * 1


@case(-1, 0, 1)
def an_expression(x: Tensor, t: Tensor) -> Tensor:
    factor = 2.0 if t > 0 else -0.0
    return (x.relu() if t >= 0 else x.abs()) * factor


@case(0, 1, 3, 4)
def continue_in_a_loop(x: Tensor, t: Tensor) -> Tensor:
    out = torch.zeros(3)
    counts = [int(t), 2 - int(t)]
    for index, count in enumerate(counts):
        if count <= 0:
            continue
        row = x[index] * count
        out = out * 0.5 + row
    return out


@case(0, 2, 5, assumes=True)
def lengths_that_differ(x: Tensor, t: Tensor) -> Tensor:
    n = int(t)
    keys = x[:2]
    if n > 0:
        keys = torch.cat([keys, x[2 : 2 + min(n, 3)] * 2])
    return keys.sum(0)


@case(0, 2, 5)
def a_tuple(x: Tensor, t: Tensor) -> Tensor:
    pair = (x, 1)
    if t > 1:
        pair = (x * 2, 2)
    return pair[0] * pair[1]


@case(0, 3, 7)
def numbers(x: Tensor, t: Tensor) -> Tensor:
    n = int(t)
    k = 1
    if n > 2:
        k = k + n
        offset = k * 2
    else:
        offset = -k
    return x * k + offset


@case(0, 1, 2)
def what_a_side_changes_is_what_it_was_for_the_other(x: Tensor, t: Tensor) -> Tensor:
    y, k = x + 1, 1
    if t > 1:
        y, k = y * 2, k + 1
        out = y + k
    else:
        out = y * 3 - k
    return out


def scaling_by(factor: float) -> Step:
    def scaled(y: Tensor, t: Tensor, offset: float = 1.0, *, sign: float = -1.0) -> Tensor:
        if t > 1:
            return y * factor + offset
        return y + factor * sign

    return scaled


SCALED = [scaling_by(3.0), scaling_by(0.5)]


@case(0, 1, 2)
def closures(x: Tensor, t: Tensor) -> Tensor:
    return SCALED[0](x, t) + SCALED[1](x * 2, t, 2.0)


@case(-2, 0, 1, 2, 6, assumes=True)
def rows_of_either_table(x: Tensor, t: Tensor) -> Tensor:
    i = int(t)
    if i < 3 and i >= 0:  # noqa: SIM108
        row = x[i]
    else:
        row = x[abs(i) % 3] * 2
    return row + 1


@case(0, 1, 4, -3, assumes=True)
def a_divisor_that_is_zero_on_the_other_side(x: Tensor, t: Tensor) -> Tensor:
    n = int(t)
    if n > 0:
        x = x * (12 // n)
    return x + 1


@case(0, 1, 4, assumes=True)
def places_that_exist_on_one_side_only(x: Tensor, t: Tensor) -> Tensor:
    if t < 3:  # noqa: SIM108
        rows = x[t.view(1)]
    else:
        rows = x[(t - 3).view(1)]
    return rows * 2


@pytest.mark.parametrize("name", CASES)
def test_one_graph_does_what_eager_does_for_every_outcome(name: str) -> None:
    step, taken = CASES[name]
    kind = torch.int64 if all(isinstance(value, int) for value in taken.values) else torch.float32
    for traced_with in taken.values:
        graph = merged(step, torch.randn(6, 3), torch.tensor(traced_with, dtype=kind))
        assert graph.assumes == taken.assumes and not reasons(graph), reasons(graph)
        for value in taken.values:
            assert check(graph, step, torch.randn(6, 3), torch.tensor(value, dtype=kind))


WRITES: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "row": lambda cache, x, t: cache[1].copy_(x[0]),
    "row at an index": lambda cache, x, t: cache.__setitem__(int(t) % 6, x[0]),
    "view of a row": lambda cache, x, t: cache[int(t) % 6][1:].mul_(3),
    "all": lambda cache, x, t: cache.zero_(),
    "a view": lambda cache, x, t: cache.t()[1].add_(x[:, 0].sum()),
    "added rows": lambda cache, x, t: cache.index_add_(0, torch.tensor([2, 2]), x[:2]),
    "copied rows": lambda cache, x, t: cache.index_copy_(0, torch.tensor([2, 0]), x[:2]),
    "put": lambda cache, x, t: cache.index_put_((torch.tensor([2, 0]), torch.tensor([1, 2])), x[0, :2]),
    "accumulated": lambda cache, x, t: cache.index_put_((torch.tensor([2, 2]),), x[:2], accumulate=True),
    "a length": lambda cache, x, t: cache[: int(t) % 6].add_(1),
    "masked": lambda cache, x, t: cache.__setitem__(cache[:, 0] > t, 9.0),
    "scattered": lambda cache, x, t: cache.scatter_(0, torch.zeros(1, 3, dtype=torch.int64), x[:1]),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_write_takes_place_on_its_side_only(name: str) -> None:
    write = WRITES[name]

    def step(cache: Tensor, x: Tensor, t: Tensor) -> Tensor:
        row = cache[1]
        if t > 2:
            write(cache, x, t)
            row = row + 1
        else:
            cache[5] = -0.0
        return row * 1

    for traced_with in (1, 4):
        graph = merged(step, torch.randn(6, 3), torch.randn(6, 3), torch.tensor(traced_with))
        assert not reasons(graph), reasons(graph)
        for value in range(7):
            cache = torch.randn(6, 3)
            cache[::2] *= 0
            assert check(graph, step, cache, torch.randn(6, 3), torch.tensor(value))


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.names, self.scale = 0, dict[str, int](), torch.ones(3)

    def bump(self) -> None:
        self.calls += 1

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if t > 0:
            self.bump()
            x = x * 2
        return x


GLOBAL: list[int] = []


def python_effects() -> Iterator[tuple[str, Step, str]]:
    def appends(x: Tensor, t: Tensor) -> Tensor:
        seen: list[int] = []
        if t > 0:
            seen.append(1)
        return x * len(seen)

    def adds_to_a_list(x: Tensor, t: Tensor) -> Tensor:
        seen: list[int] = []
        if t > 0:
            seen += [1]
        return x * len(seen)

    def sets_a_key(x: Tensor, t: Tensor) -> Tensor:
        table = {"scale": 2}
        if t > 0:
            table["scale"] = 3
        return x * table["scale"]

    def appends_to_a_global(x: Tensor, t: Tensor) -> Tensor:
        if t > 0:
            GLOBAL.append(1)
        return x * 2

    def advances_an_iterator(x: Tensor, t: Tensor) -> Tensor:
        numbers = iter([1, 2, 3])
        if t > 0:
            next(numbers)
        return x * next(numbers)

    def changes_a_variable_of_its_own(x: Tensor, t: Tensor) -> Tensor:
        scale = 1

        def double() -> None:
            nonlocal scale
            scale = 2

        if t > 0:
            double()
        return x * scale

    def holds_a_list(x: Tensor, t: Tensor) -> Tensor:
        a, b = [x], [x * 2]
        chosen = a
        if t > 0:
            chosen = b
        chosen.append(x * 3)
        return torch.stack([sum(a), sum(b)])  # type: ignore[list-item]

    def keeps_a_tensor(x: Tensor, t: Tensor) -> Tensor:
        parts = [x]
        if t > 0:
            parts.append(x * 2)
        return sum(parts)  # type: ignore[return-value]

    def of_two_kinds(x: Tensor, t: Tensor) -> Tensor:
        scale: Any = 1.0
        if t > 0:
            scale = None
        return x if scale is None else x * 3

    yield "attribute", Counting(), "step.calls"
    yield "list", appends, "seen[0]"
    yield "list in place", adds_to_a_list, "seen[0]"
    yield "dictionary", sets_a_key, "table['scale']"
    yield "global", appends_to_a_global, "GLOBAL["
    yield "iterator", advances_an_iterator, "numbers"
    yield "nonlocal", changes_a_variable_of_its_own, "scale"
    yield "either list", holds_a_list, "leave list and list"
    yield "list of tensors", keeps_a_tensor, "parts[1]"
    yield "kinds", of_two_kinds, "leave NoneType and float"


@pytest.mark.parametrize(("name", "step", "reason"), python_effects(), ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("traced_with", [0, 1])
def test_a_side_that_changes_python_is_assumed(name: str, step: Step, reason: str, traced_with: int) -> None:
    graph = merged(step, torch.randn(3), torch.tensor(traced_with))
    (said,) = reasons(graph)
    assert reason in said and graph.assumes
    for value in (0, 1):
        assert _flag(graph, torch.randn(3), torch.tensor(value)) == (value == traced_with)


def _flag(graph: Rewritten, *tensors: Tensor) -> bool:
    return graph(*[tensor.clone() for tensor in tensors])[1]


def unmergeable() -> Iterator[tuple[str, Step, str]]:
    def draws(x: Tensor, t: Tensor) -> Tensor:
        if t > 0:
            x = x + torch.rand_like(x)
        return x

    def raises_on_one_side(x: Tensor, t: Tensor) -> Tensor:
        if t > 0:
            x = refuse(x)
        return x + 1

    def may_raise(x: Tensor, t: Tensor) -> Tensor:
        if t > 0:
            x = torch.linalg.inv(x.outer(x) + torch.eye(3)) @ x
        return x

    def is_long(x: Tensor, t: Tensor) -> Tensor:
        if t > 0:
            for _ in range(70):
                x = x + 1
        return x

    def leaks(x: Tensor, t: Tensor) -> Tensor:
        if t > 0:
            y = x * 2
        if t > 0:
            x = x + y
        return x

    def is_written_behind(x: Tensor, t: Tensor) -> Tensor:
        y = x * 1
        z = y
        if t > 0:
            z = y * 2
        z += 1
        return y + z

    def is_read_after_a_write(x: Tensor, t: Tensor) -> Tensor:
        y = x * 1
        z = y
        if t > 0:
            z = y * 2
        y += 1
        return z * 1

    def is_a_choice_of_choices(x: Tensor, t: Tensor) -> Tensor:
        y, z = x * 1, x * 2
        if t > 0:
            z = y if t > 0 and t < 3 else z
        y += 1
        return z * 1

    def differs_in_dtype(x: Tensor, t: Tensor) -> Tensor:
        y = x
        if t > 0:
            y = x.double()
        return y + 1

    def lies_in_memory_differently(x: Tensor, t: Tensor) -> Tensor:
        y = x.outer(x)
        if t > 0:
            y = (y * 2).t()
        return y.sum(0)

    def is_resized(x: Tensor, t: Tensor) -> Tensor:
        y = x * 1
        if t > 0:
            y.unsqueeze_(0)
        return y.sum()

    def catches(x: Tensor, t: Tensor) -> Tensor:
        try:
            if t > 0:
                x = refuse(x)
        except ValueError:
            x = x * 3
        return x + 1

    yield "random", draws, "draws random numbers"
    yield "raises", raises_on_one_side, "raises ValueError: not this side"
    yield "may raise", may_raise, "may raise"
    yield "long", is_long, "70 operators"
    yield "leaks", leaks, "read elsewhere"
    yield "written", is_written_behind, "is written"
    yield "overtaken", is_read_after_a_write, "is written"
    yield "chosen twice", is_a_choice_of_choices, "is written"
    yield "dtype", differs_in_dtype, "float32[3]"
    yield "strides", lies_in_memory_differently, "lie in memory differently"
    yield "resized", is_resized, "changes a tensor's shape"
    yield "caught", catches, "caught elsewhere"


def refuse(x: Tensor) -> Tensor:
    raise ValueError("not this side")


@pytest.mark.parametrize(("name", "step", "reason"), unmergeable(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_side_that_has_no_condition_is_assumed(name: str, step: Step, reason: str) -> None:
    graph = merged(step, torch.randn(3), torch.tensor(0))
    assert any(reason in said for said in reasons(graph)), reasons(graph)
    assert graph.assumes
    assert [_flag(graph, torch.randn(3), torch.tensor(value)) for value in (0, 1)] == [True, False]
    first = {site[1] for site in graph.graph.facts.unmerged}
    source, start = inspect.getsourcelines(step)
    assert all(start <= line < start + len(source) and "if t > 0" in source[line - start] for line in first)


def test_only_the_branch_that_cannot_be_merged_is_assumed() -> None:
    def step(x: Tensor, t: Tensor) -> Tensor:
        if t > 0:
            x = x + 1
        if t > 1:
            x = x + torch.rand_like(x)
        if t > -1:
            x = x * 2
        return x

    graph = merged(step, torch.ones(3), torch.tensor(0))
    assert len(reasons(graph)) == 1
    assert [_flag(graph, torch.randn(3), torch.tensor(value)) for value in (-3, 0, 1, 2)] == [True, True, True, False]
    for value in (-3, 0, 1):
        check(graph, step, torch.randn(3), torch.tensor(value))


def test_what_python_holds_is_restored_between_traces() -> None:
    model = Counting()
    state: list[int] = []

    def restore() -> None:
        state.append(model.calls)
        model.calls = 0

    passes.trace_step(
        lambda leaves, _: [model(*leaves)],
        [torch.ones(3), torch.tensor(1)],
        [passes.Read("aten._local_scalar_dense.default", (__file__, Counting.forward.__code__.co_firstlineno + 1), True)],
        snapshot=functools.partial(PythonState, tensors=False),
        restore=restore,
    )
    assert state[0] == 0 and len(state) >= 2 and set(state[1:]) == {1}
