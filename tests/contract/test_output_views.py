"""Outputs that share memory, carry bits or objects, or were made where nobody looks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import graphs

Tensor = torch.Tensor
MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


def complex_(*sizes: int) -> Tensor:
    return torch.randn(*sizes, dtype=torch.complex64)


@dataclass
class Plain:
    hidden: Tensor
    parts: list[Tensor]
    note: str = "note"


@dataclass(frozen=True)
class Frozen:
    hidden: Tensor
    mask: Tensor | None = None


@dataclass(slots=True)
class Slotted:
    hidden: Tensor


@dataclass
class Computed:
    hidden: Tensor
    total: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.total = self.hidden.sum()
        self.extra = self.hidden + 1


def leaves(value: Any) -> list[Any]:
    """The tensors and constants of an output, in order."""
    if isinstance(value, dict):
        value = list(value.items())
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in leaves(item)]
    if isinstance(value, (Plain, Frozen, Computed)):
        return [type(value), *leaves(vars(value))]
    return [value.hidden] if isinstance(value, Slotted) else [value]


def check(wanted: Any, got: Any) -> None:
    """Equal values, bits and layouts, and the same sharing of memory."""
    a, b = leaves(wanted), leaves(got)
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        if not isinstance(x, Tensor):
            assert type(x) is type(y) and x == y
            continue
        torch.testing.assert_close(y, x, rtol=0, atol=0)
        for name in ("is_conj", "is_neg", "stride", "is_inference"):
            assert getattr(x, name)() == getattr(y, name)(), name
        assert x.requires_grad == y.requires_grad
    tensors = [[leaf for leaf in part if isinstance(leaf, Tensor)] for part in (a, b)]
    for first in range(len(tensors[0])):
        for second in range(first):
            shared = [overlap(part[first], part[second]) for part in tensors]
            assert shared[0] == shared[1], (first, second)


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether writing to one tensor changes the other."""
    before = a.clone()
    with torch.inference_mode():
        saved = b.clone()
        b.fill_(77)
        changed = not torch.equal(a, before)
        b.copy_(saved)
    return changed


STEPS: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]] = {
    "a conjugated argument": (lambda z: z.conj(), lambda: (complex_(3),)),
    "an argument conjugated twice": (lambda z: z.conj(), lambda: (complex_(3).conj(),)),
    "a conjugated result": (lambda z: (z * 2).conj(), lambda: (complex_(3),)),
    "a conjugated transpose": (lambda z: (z * 2).mH, lambda: (complex_(3, 4),)),
    "a negated result": (lambda z: (z * 2).conj().imag, lambda: (complex_(3),)),
    "the imaginary part of an argument": (lambda z: z.imag, lambda: (complex_(3),)),
    "an argument seen as real": (lambda z: torch.view_as_real(z), lambda: (complex_(3),)),
    "an argument as another dtype": (lambda x: x.view(torch.int32), lambda: (torch.randn(4),)),
    "a row of an argument": (lambda x: x[1], lambda: (torch.randn(3, 4),)),
    "a row and the argument": (lambda x: (x[1], x, x.t()), lambda: (torch.randn(3, 4),)),
    "a row of a transposed argument": (lambda x: x[1:, ::2], lambda: (torch.randn(4, 3).t(),)),
    "a result and its row": (lambda x: (lambda y: (y, y[0]))(x * 2), lambda: (torch.randn(3, 4),)),
    "a row and its result": (lambda x: (lambda y: (y[0], y))(x * 2), lambda: (torch.randn(3, 4),)),
    "overlapping parts": (lambda x: (lambda y: (y[:3], y[2:]))(x * 2), lambda: (torch.randn(5, 4),)),
    "parts that do not overlap": (lambda x: (lambda y: (y[:2], y[3:]))(x * 2), lambda: (torch.randn(5, 4),)),
    "columns of one product": (lambda x: (x * 2).chunk(3, -1), lambda: (torch.randn(5, 6),)),
    "a result and its conjugate": (lambda z: (lambda y: (y, y.conj()))(z * 2), lambda: (complex_(3),)),
    "one result twice": (lambda x: (lambda y: [y, {"y": y}])(x * 2), lambda: (torch.randn(3),)),
    "empty and not": (lambda x: (x[:0], (x * 2)[:0], x * 2), lambda: (torch.randn(3),)),
    "an expanded result": (lambda x: (x * 2).expand(4, 3), lambda: (torch.randn(3),)),
    "a new leaf that requires a gradient": (lambda x: torch.zeros(3, requires_grad=True), lambda: (torch.randn(3),)),
    "a plain dataclass": (lambda x: Plain(x * 2, [x + 1]), lambda: (torch.randn(3),)),
    "a frozen dataclass": (lambda x: {"out": Frozen(x * 2)}, lambda: (torch.randn(3),)),
    "a dataclass with slots": (lambda x: Slotted(x * 2), lambda: (torch.randn(3),)),
    "a dataclass that computes": (lambda x: Computed(x * 2), lambda: (torch.randn(3),)),
    "dataclasses in each other": (lambda x: Plain(x * 2, [Frozen(x + 1, x)]), lambda: (torch.randn(3),)),  # type: ignore[list-item]
    "a packed sequence": (lambda x, n: PackedSequence(x * 2, n), lambda: (torch.randn(3, 2), torch.tensor([2, 1]))),
    "a packed argument": (lambda p: p.data * 2, lambda: (PackedSequence(torch.randn(3, 2), torch.tensor([2, 1])),)),
    "values and indices": (lambda x: torch.sort(x), lambda: (torch.randn(5),)),
    "values and indices as argument": (lambda p: p.values * 2, lambda: (torch.sort(torch.randn(5)),)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", STEPS)
def test_outputs_are_those_of_eager_in_values_bits_and_sharing(name: str, mode: str) -> None:
    model, arguments = STEPS[name]
    step = graphs.capture(model)
    with MODES[mode]():
        for _ in range(4):
            given = arguments()
            check(model(*given), step(*given))
    assert step.report().replays == 4, str(step.report())


def test_writing_to_a_returned_view_of_an_argument_changes_the_argument() -> None:
    step = graphs.capture(lambda x: x[1:])
    with torch.no_grad():
        for _ in range(4):
            x = torch.ones(3)
            step(x).zero_()
            assert x.tolist() == [1, 0, 0]


class Cache:
    def __init__(self) -> None:
        self.keys = torch.zeros(3, 2)


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cache = Cache()
        self.register_buffer("table", torch.randn(4, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Cache, Tensor]:
        self.cache.keys.add_(x)
        return x * 2, self.cache, self.table[1:]


def test_the_models_own_object_and_views_of_its_buffers_are_handed_out() -> None:
    model = Holder()
    expected, step = copy.deepcopy(model), graphs.capture(model)
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(3, 2)
            out, cache, rows = step(x)
            wanted = expected(x)
            assert torch.equal(out, wanted[0]) and cache is model.cache and torch.equal(cache.keys, wanted[1].keys)
            assert rows.data_ptr() == model.table[1:].data_ptr() and torch.equal(rows, wanted[2])
    assert step.report().replays == 4


def test_another_object_in_the_place_of_a_returned_one_is_returned() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.note = Cache()

        def forward(self, x: Tensor) -> tuple[Tensor, Cache]:
            return x * 2, self.note

    model = Model()
    step = graphs.capture(model)
    with torch.no_grad():
        for index in range(12):
            if index in (3, 9):
                model.note = Cache()
            assert step(torch.ones(3))[1] is model.note


def test_what_hangs_on_an_opaque_argument_is_handed_out() -> None:
    cache, inner = Cache(), Cache()
    cache.inner = inner  # type: ignore[attr-defined]
    step = graphs.capture(lambda x, cache: (x * 2, cache.inner))
    with torch.no_grad():
        assert all(step(torch.ones(3), cache)[1] is inner for _ in range(4))
    assert step.report().replays == 4


def test_an_object_made_anew_is_refused() -> None:
    step = graphs.capture(lambda x: (x * 2, Cache()))
    with torch.no_grad():
        outputs = [step(torch.ones(3))[1] for _ in range(3)]
    assert len({*map(id, outputs)}) == 3
    assert step.report().refusals[0].reason == "unsupported-output"


POOL = ThreadPoolExecutor(1)
UNSEEN: dict[str, Callable[[Tensor], Any]] = {
    "another thread": lambda x: POOL.submit(torch.relu, x).result(),
    "another thread, beside a result": lambda x: {"a": x * 2, "b": [POOL.submit(torch.relu, x).result()]},
    "another thread, in a dataclass": lambda x: Frozen(x * 2, POOL.submit(torch.relu, x).result()),
    "a view of what another thread made": lambda x: POOL.submit(torch.relu, x).result()[1:],
    "another library": lambda x: torch.from_numpy(numpy.asarray(x.tolist(), dtype=numpy.float32)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", UNSEEN)
def test_an_output_that_no_observed_operator_made_is_refused_by_name(name: str, mode: str) -> None:
    step = graphs.capture(UNSEEN[name])
    with MODES[mode]():
        for _ in range(4):
            x = torch.randn(3)
            check(UNSEEN[name](x), step(x))
    assert step.report().replays == 0 and step.report().refusals


def test_a_subclass_among_the_outputs_is_refused() -> None:
    class Mine(torch.Tensor):
        pass

    step = graphs.capture(lambda x: (x * 2).as_subclass(Mine))
    with torch.no_grad():
        assert all(type(step(torch.ones(3))) is Mine for _ in range(3))
    assert step.report().refusals[0].reason == "unsupported-output"


def test_a_dataclass_of_a_step_that_reads_host_values_is_made_of_this_calls_tensors() -> None:
    def model(x: Tensor) -> Plain:
        return Plain(x * 2, [x + x.sum().item()])

    step = graphs.capture(model)
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(3)
            got, wanted = step(x), model(x)
            torch.testing.assert_close([got.hidden, got.parts], [wanted.hidden, wanted.parts])
    assert step.report().replays == 4, str(step.report())
