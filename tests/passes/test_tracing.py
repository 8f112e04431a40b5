"""`passes.trace_step`: one ATen graph of the step, values that the host reads as symbols, nothing computed or written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

import passes
from passes.core.source_location import user_site
from tests.passes.steps import check, printed, rewritten, traced

aten = torch.ops.aten


def line(step: Callable[..., Any], offset: int) -> tuple[str, int]:
    return __file__, step.__code__.co_firstlineno + offset


def decode(x: Tensor, t: Tensor) -> Tensor:
    n = int(t)
    if n > 2:
        x.mul_(2)
    return x[:n].sum(0)


GOLDEN = """\
arg0_1 [8, 3] = placeholder(arg0_1)
arg1_1 [] = placeholder(arg1_1)
_local_scalar_dense = _local_scalar_dense.default(arg1_1)
mul_ [8, 3] = mul_.Tensor(arg0_1, 2)
slice_1 [u1, 3] = slice.Tensor(mul_, 0, 0, _local_scalar_dense)
sum_1 [3] = sum.dim_IntList(slice_1, [0])
return [sum_1]"""


def test_a_step_is_one_graph_with_its_hints_lines_and_assumptions() -> None:
    x = torch.ones(8, 3)
    graph = traced(decode, x, torch.tensor(5))
    module, facts = graph.module, graph.facts
    (symbol,) = facts.hints
    assert printed(module) == GOLDEN
    assert facts.hints[symbol] == 5 and facts.sources[symbol] == line(decode, 1)
    assert facts.assumptions[0].condition == (symbol > 2) and facts.assumptions[0].site == line(decode, 2)
    assert {node.target: node.meta["site"] for node in module.graph.nodes if node.op == "call_function"} == {
        aten._local_scalar_dense.default: line(decode, 1),
        aten.mul_.Tensor: line(decode, 3),
        aten.slice.Tensor: line(decode, 4),
        aten.sum.dim_IntList: line(decode, 4),
    }
    assert torch.equal(x, torch.ones(8, 3))
    assert printed(traced(decode, x, torch.tensor(5))) == GOLDEN


def test_a_length_is_resolved_to_what_it_follows_from() -> None:
    facts = traced(decode, torch.ones(8, 3), torch.tensor(5)).facts
    length, definition = next(iter(facts.replacements.items()))
    (symbol,) = facts.hints
    assert facts.resolve(length + 1) == definition + 1 and definition.free_symbols == {symbol}
    assert facts.hint(length) == 5 and facts.hint(sympy.Symbol("other")) is None


class Cache:
    """Opaque state, as a Hugging Face cache is."""

    def __init__(self) -> None:
        self.keys, self.table = torch.zeros(4, 2), [torch.arange(4.0)]

    def update(self, x: Tensor, t: Tensor) -> Tensor:
        self.keys[int(t)] = x
        return self.keys * self.table[0][:2]


def test_state_that_nobody_passed_is_read_in_place_and_untouched() -> None:
    cache = Cache()
    module = traced(cache.update, torch.ones(2), torch.tensor(1)).module
    assert torch.equal(cache.keys, torch.zeros(4, 2))
    held = {node.target: getattr(module, node.target) for node in module.graph.nodes if node.op == "get_attr"}
    assert [name for name in held] == ["state_0", "state_1"]
    assert held["state_0"].untyped_storage()._cdata == cache.keys.untyped_storage()._cdata
    graph = rewritten(cache.update, torch.ones(2), torch.tensor(1))
    graph(torch.full((2,), 7.0), torch.tensor(3))
    assert cache.keys.tolist() == [[0, 0]] * 3 + [[7, 7]]


def test_host_data_and_state_are_told_apart() -> None:
    table = torch.arange(3.0)
    module = traced(lambda x: x * torch.tensor([1.0, 2.0, 3.0]) + table, torch.ones(3)).module
    names = [str(node.target) for node in module.graph.nodes if node.op == "get_attr"]
    assert names == ["_tensor_constant0", "state_0"]


def test_numbers_of_python_are_symbols_of_which_the_new_values_are_known() -> None:
    counter, held = [5, 2], [torch.tensor(5), torch.tensor(2)]

    def step(leaves: Any, symbols: Any) -> list[Tensor]:
        counter[:] = symbols
        counter[0] = (counter[0] + counter[1]) % 8
        return [leaves[0] * counter[0]]

    numbers = [passes.Number(tensor, value, f"self.{i}") for i, (tensor, value) in enumerate(zip(held, (5, 2), strict=True))]
    graph = passes.trace_step(step, [torch.ones(3)], numbers=numbers, advanced=lambda: counter)
    assert graph.advance is not None
    assert graph.advance(5, 2) == (7, 2) and graph.advance(7, 2) == (1, 2)
    module = passes.remove_host_values(graph).module
    module.recompile()
    assert [module(torch.ones(3))[0][0].item() for _ in range(3)] == [7, 1, 3]
    assert held[0].item() == 3 and held[1].item() == 2


def test_a_number_that_advances_by_data_is_named() -> None:
    state: list[Any] = [5]

    def step(leaves: Any, symbols: Any) -> list[Tensor]:
        state[0] = symbols[0] + leaves[0].sum().item()
        return [leaves[0] * 2]

    reads = [passes.Read("aten._local_scalar_dense.default", line(step, 1), 6)]
    number = passes.Number(torch.tensor(5), 5, "self.length")
    with pytest.raises(passes.Unremovable, match=r"self\.length advances by a value that only the device knows"):
        passes.trace_step(step, [torch.ones(6, dtype=torch.int64)], reads, numbers=[number], advanced=lambda: state)


READS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tolist": lambda x, t: x * t.tolist()[1],
    "nested tolist": lambda x, t: x * t.view(2, 1).tolist()[1][0],
    "items of a list": lambda x, t: x * sum(t.tolist()),
    "rows by a list": lambda x, t: x[t.tolist()],
    "whole numbers of numpy": lambda x, t: x * int(t.numpy()[0]),
    "numpy indices": lambda x, t: x[torch.as_tensor(np.array([1, 0]))] * t.numpy()[1],
    "to the host": lambda x, t: x * t.cpu()[0].item(),
    "to the host by name": lambda x, t: x * t.to("cpu", torch.float64)[0].item(),
    "a tensor of items": lambda x, t: torch.tensor([t[0].item(), 3, t[1]]) + x.sum(),
    "a tensor of tensors": lambda x, t: torch.tensor([t[0], t[1]]) + x.sum(),
    "a new tensor": lambda x, t: x.new_tensor([t[0].item(), 1.5]) + x.sum(),
    "a named argument": lambda x, t: torch.tensor(data=[t[0].item()]) + x.sum(),
    "equal": lambda x, t: x * 2 if torch.equal(t, t + 0) else x,
    "allclose": lambda x, t: x * 2 if torch.allclose(x, x) else x,
    "padded": lambda x, t: F.pad(x[: t[0]], (0, 4 - x[: t[0]].shape[0])),
    "an index among others": lambda x, t: x.view(2, 2)[..., int(t[1])] + x.view(2, 2)[None, int(t[0]) % 2, :],
    "a slice of tensors": lambda x, t: x[t[1] : t[0]].sum(),
    "arange": lambda x, t: (torch.arange(t[0])[:4] * x[: t[0]]).sum(),
    "full": lambda x, t: torch.full((4,), t[1]) + x,
}


@pytest.mark.parametrize("name", READS)
def test_what_python_does_with_values_is_traced(name: str) -> None:
    step = READS[name]
    graph = rewritten(
        step, torch.arange(4.0), torch.tensor([2, 1]), bounds={f"test_tracing.py:{step.__code__.co_firstlineno}": 4}
    )
    for values in ([2, 1], [3, 0], [1, 2], [0, 3]):
        check(graph, step, torch.arange(4.0), torch.tensor(values), may_break=True)
    assert check(graph, step, torch.arange(4.0) + 1, torch.tensor([2, 1]))


HOST: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "numpy": (lambda x: x * float(x.numpy().sum()), "Tensor.numpy"),
    "array": (lambda x: x * float(np.asarray(x).sum()), "Tensor.__array__"),
    "text": (lambda x: (str(x), x * 2)[1], "Tensor.__repr__"),
    "format": (lambda x: (f"{x}", x * 2)[1], "Tensor.__format__"),
    "float": (lambda x: x * {0.5: 2.0}.get(x.sum().item(), 1.0), "float"),
}


@pytest.mark.parametrize("name", HOST)
def test_what_needs_the_tensor_itself_is_named(name: str) -> None:
    step, operator = HOST[name]
    with pytest.raises(passes.Unremovable) as raised:
        traced(step, torch.rand(3))
    assert raised.value.operator == operator and raised.value.site == line(step, 0)
    assert str(raised.value).startswith(f"{operator} at {__file__}:")


def test_a_copy_on_the_host_is_a_copy_where_the_tensor_is_elsewhere() -> None:
    def step(x: Tensor) -> Tensor:
        before = x.cpu()
        x.add_(1)
        return before

    copied = passes.trace_step(lambda leaves, _: [step(leaves[0])], [torch.ones(3, device="meta")])
    assert aten.clone.default in [node.target for node in copied.module.graph.nodes]
    assert check(rewritten(step, torch.ones(3)), step, torch.ones(3))  # and not where it is there already


def test_a_branch_on_what_the_eager_run_did_not_read_is_named() -> None:
    def step(leaves: Any, _: Any) -> list[Tensor]:
        return [leaves[0] * 2 if leaves[0].sum() > 1 else leaves[0]]

    with pytest.raises(passes.Unremovable, match="the eager run did not read") as raised:
        passes.trace_step(step, [torch.ones(3)])
    assert raised.value.site == line(step, 1)


def test_the_site_of_a_call_is_the_innermost_line_of_the_user() -> None:
    here = user_site()
    assert here == line(test_the_site_of_a_call_is_the_innermost_line_of_the_user, 1)
