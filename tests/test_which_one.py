"""Steps that can tell which object or tensor they were given: a recording of one is never taken for another's.

Each step runs on two equal sets of objects, captured and eagerly, through the same calls; outputs and state are compared.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import graphs
from tests.parity import assert_same

Tensor = torch.Tensor
Step = Callable[["Owner", Tensor, "Cache"], Tensor]
pytestmark = pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
REGISTRY: list[Any] = []


class Cache:
    """What an engine passes per request."""

    def __init__(self, value: float = 1.0) -> None:
        self.k = torch.full((2,), value)
        self.note: Any = None
        self.slots = torch.zeros(2)


class Owner(nn.Module):
    """A model that may keep caches, or what belongs to one."""

    def __init__(self, fn: Step) -> None:
        super().__init__()
        self.fn, self.special = fn, Cache()
        self.pool: list[Cache] = [self.special]
        self.table: dict[Any, float] = {self.special: 3.0, id(self.special): 3.0, hash(self.special): 3.0}
        self.tensors = {id(self.special.k): 3.0}
        self.weak = weakref.WeakKeyDictionary({self.special: 3.0})
        self.address, self.pair = self.special.k.data_ptr(), (id(self.special), 0)
        self.last: Cache | None = None

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        return self.fn(self, x, cache)


def times(x: Tensor, cache: Cache, factor: Any) -> Tensor:
    return x * cache.k.add_(1) * factor


ASKING: dict[str, Step] = {
    "is": lambda m, x, c: times(x, c, 3 if c is m.special else 2),
    "in a list": lambda m, x, c: times(x, c, 3 if c in m.pool else 2),
    "key": lambda m, x, c: times(x, c, m.table.get(c, 2)),
    "id as a key": lambda m, x, c: times(x, c, m.table.get(id(c), 2)),
    "id in a tuple": lambda m, x, c: times(x, c, 3 if m.pair == (id(c), 0) else 2),
    "hash as a key": lambda m, x, c: times(x, c, m.table.get(hash(c), 2)),
    "id of a tensor": lambda m, x, c: times(x, c, m.tensors.get(id(c.k), 2)),
    "weak key": lambda m, x, c: times(x, c, m.weak.get(c, 2)),
    "its tensor is": lambda m, x, c: times(x, c, 3 if c.k is m.special.k else 2),
    "address": lambda m, x, c: times(x, c, 3 if c.k.data_ptr() == m.address else 2),
    "equality by default": lambda m, x, c: times(x, c, 3 if c == m.special else 2),
    "registry": lambda m, x, c: times(x, c, 3 if any(c is one for one in REGISTRY) else 2),
}


def twins(fn: Step) -> tuple[Owner, Owner]:
    REGISTRY.clear()
    owners = Owner(fn), Owner(fn)
    REGISTRY.extend(owner.special for owner in owners)
    return owners


@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("name", ASKING)
def test_the_special_cache_is_not_served_as_an_ordinary_one(name: str, inference: bool) -> None:
    model, twin = twins(ASKING[name])
    step = graphs.capture(model)
    ordinary = [(Cache(), Cache()) for _ in range(3)]
    turns = [*ordinary, (model.special, twin.special), ordinary[0], (model.special, twin.special), (Cache(), Cache())]
    with torch.inference_mode(inference), torch.no_grad():
        for cache, other in [turn for turn in turns for _ in range(2)]:
            assert_same([twin(torch.ones(2), other)], [step(torch.ones(2), cache)], name)
            assert_same([other.k], [cache.k], name)
    assert step.report().replays > 4


def stores(m: Owner, x: Tensor, c: Cache) -> Tensor:
    m.last = c
    return times(x, c, 1)


def stores_its_tensor(m: Owner, x: Tensor, c: Cache) -> Tensor:
    m.pool[0] = c  # type: ignore[assignment]
    return times(x, c, 1)


def counts_changes(m: Owner, x: Tensor, c: Cache) -> Tensor:
    if m.last is not c:
        m.last = c
        m.table["changes"] = m.table.get("changes", 0) + 1
    return times(x, c, 1)


@pytest.mark.parametrize("fn", [stores, stores_its_tensor, counts_changes], ids=lambda fn: fn.__name__)
def test_what_a_step_stores_of_its_cache_is_that_of_the_last_call(fn: Step) -> None:
    model, twin = twins(fn)
    step = graphs.capture(model)
    caches = [(Cache(), Cache()) for _ in range(3)]
    with torch.no_grad():
        for turn in (0, 0, 0, 1, 1, 2, 2, 0, 1, 2):
            cache, other = caches[turn]
            assert_same([twin(torch.ones(2), other)], [step(torch.ones(2), cache)], "output")
            assert (model.last is cache) == (twin.last is other) and (model.pool[0] is cache) == (twin.pool[0] is other)
            assert model.table.get("changes") == twin.table.get("changes")


NOTED: dict[str, tuple[Callable[[Cache], Any], list[Callable[[Cache], None]]]] = {
    "shape": (lambda c: c.slots.shape[0], [lambda c: setattr(c, "slots", torch.zeros(3))]),
    "dtype": (lambda c: 3 if c.slots.dtype == torch.float16 else 2, [lambda c: setattr(c, "slots", c.slots.half())]),
    "stride": (lambda c: c.slots.stride(0), [lambda c: setattr(c, "slots", torch.zeros(2, 2)[:, 0])]),
    "offset": (lambda c: c.slots.storage_offset(), [lambda c: setattr(c, "slots", torch.zeros(4)[2:])]),
    "requires_grad": (lambda c: 3 if c.slots.requires_grad else 2, [lambda c: setattr(c.slots, "requires_grad", True)]),
    "maxlen": (lambda c: c.note.maxlen, [lambda c: setattr(c, "note", collections.deque(maxlen=5))]),
    "Decimal": (lambda c: float(c.note), [lambda c: setattr(c, "note", decimal.Decimal(5))]),
    "date": (lambda c: c.note.day, [lambda c: setattr(c, "note", datetime.date(2020, 1, 5))]),
    "exception": (lambda c: c.note.args[0], [lambda c: setattr(c, "note", ValueError(5))]),
}
FIRST = {"maxlen": collections.deque(maxlen=4), "Decimal": decimal.Decimal(4), "date": datetime.date(2020, 1, 4)}


@pytest.mark.parametrize("name", NOTED)
def test_a_cache_that_differs_in_what_only_python_asks_is_another_step(name: str) -> None:
    asked, changes = NOTED[name]

    def made(changed: bool) -> Cache:
        cache = Cache()
        cache.note = FIRST.get(name, ValueError(4))
        for change in changes if changed else ():
            change(cache)
        return cache

    def fn(m: Owner, x: Tensor, c: Cache) -> Tensor:
        return times(x, c, asked(c))

    model, twin = twins(fn)
    step = graphs.capture(model)
    with torch.no_grad():
        for changed in (False, False, False, True, True, False):
            cache, other = made(changed), made(changed)
            for _ in range(2):
                assert_same([twin(torch.ones(2), other)], [step(torch.ones(2), cache)], name)


class Tied(nn.Module):
    """Weights that stand in several places, or are known by numbers."""

    def __init__(self, fn: Callable[[Tied, Tensor], Tensor]) -> None:
        super().__init__()
        self.fn = fn
        self.w = nn.Parameter(torch.full((2,), 2.0), requires_grad=False)
        self.also = self.w
        self.held, self.bag = [self.w], {self.w}
        self.number, self.address = id(self.w), self.w.data_ptr()
        self.packed, self.packed_of = self.w * 10, self.w

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self, x)


def packs(m: Tied, x: Tensor) -> Tensor:
    if m.packed_of is not m.w:
        m.packed, m.packed_of = m.w * 10, m.w
    return x * m.packed


OF_WEIGHTS: dict[str, Callable[[Tied, Tensor], Tensor]] = {
    "two names": lambda m, x: x * m.w + m.also,
    "is, in a list": lambda m, x: x * m.w * (2 if m.held[0] is m.w else 3),
    "in a set": lambda m, x: x * m.w * (2 if m.w in m.bag else 3),
    "id": lambda m, x: x * m.w * (2 if id(m.w) == m.number else 3),
    "address": lambda m, x: x * m.w * (2 if m.w.data_ptr() == m.address else 3),
    "only looked at": lambda m, x: x * (2 if m.w is m.also else 3),
    "only its address": lambda m, x: x * (2 if m.w.data_ptr() == m.address else 3),
    "only its offset": lambda m, x: x * (2 + m.w.storage_offset()),
    "packed": packs,
}


def exchange(m: Tied) -> None:
    m.w = nn.Parameter(m.w.clone(), requires_grad=False)


def exchange_memory(m: Tied) -> None:
    m.w.data = torch.full((4,), 2.0)[2:]


@pytest.mark.parametrize("change", [exchange, exchange_memory], ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_a_weight_that_is_exchanged_is_the_one_that_eager_finds_in_each_place(name: str, change: Callable[[Tied], None]) -> None:
    model, twin = Tied(OF_WEIGHTS[name]), Tied(OF_WEIGHTS[name])
    step = graphs.capture(model)
    with torch.no_grad():
        for call in range(6):
            x = torch.zeros(2) if call == 3 else torch.full((2,), float(call))  # a call that does not show the difference
            if call in (3, 5):
                change(model)
                change(twin)
            assert_same([twin(x)], [step(x)], f"{name}, call {call}")
            if call == 4:
                model.w.mul_(2)
                twin.w.mul_(2)
    assert step.report().replays > 1


def test_a_comparison_that_fails_leaves_the_state_that_eager_leaves() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k = torch.zeros(2)
            self.other = self.k

        def forward(self, x: Tensor) -> Tensor:
            self.k.add_(1)
            return x * self.other + self.k

    model, twin = Two(), Two()
    step = graphs.capture(model)
    with torch.no_grad():
        for call in range(5):
            if call == 2:
                model.other, twin.other = model.k.clone(), twin.k.clone()
            assert_same([twin(torch.ones(2))], [step(torch.ones(2))], "output")
            assert_same([twin.k, twin.other], [model.k, model.other], "state")


def test_memory_that_was_freed_and_made_again_is_left_alone_by_the_next_cache() -> None:
    step = graphs.capture(lambda x, c: x + c.k.add_(1))
    first, second, junk = Cache(0.0), Cache(0.0), []
    with torch.no_grad():
        for _ in range(2):
            step(torch.zeros(2), first)
        storage = first.k.untyped_storage()
        storage.resize_(0)
        junk.append(torch.zeros(2))
        storage.resize_(8)
        first.k.fill_(10)
        assert step(torch.zeros(2), first).tolist() == [11, 11]
        assert step(torch.zeros(2), second).tolist() == [1, 1]
    assert first.k.tolist() == [11, 11] and second.k.tolist() == [1, 1]


def test_a_cache_that_was_pointed_at_dies_with_its_user() -> None:
    step = graphs.capture(lambda x, c: x + c.k.add_(1))
    first = Cache()
    with torch.no_grad():
        for _ in range(2):
            step(torch.zeros(2), first)
        second = Cache()
        for _ in range(2):
            step(torch.zeros(2), second)
        assert step.report().moved == 1
        known = weakref.ref(second.k)
        del second
        gc.collect()
        step(torch.zeros(2), first)
        gc.collect()
    assert known() is None


def by_rows(x: Tensor, cache: Cache) -> Tensor:
    if len(x) == 2:
        cache.k.add_(1)
    return x * cache.k


def test_a_number_of_rows_that_comes_first_with_another_cache_is_compared() -> None:
    step = graphs.capture(by_rows, buckets=[4])
    caches = [(Cache(), Cache()) for _ in range(4)]
    with torch.no_grad():
        for turn, rows in ((0, 4), (1, 4), (2, 2), (3, 3), (2, 2), (1, 3)):
            cache, other = caches[turn]
            x = torch.randn(rows, 2)
            assert_same([by_rows(x, other)], [step(x, cache)], "output")
            assert_same([other.k], [cache.k], "state")


def experts(x: Tensor) -> Tensor:
    value, index = x[:, 0].topk(min(2, len(x)), 0)
    return torch.zeros_like(x).index_add_(0, index, x[index] * value[:, None])


def first_rows(x: Tensor) -> Tensor:
    return x - x[: min(len(x), 4)].amax(0)


def aggregate(x: Tensor) -> Tensor:
    return (x > 0).sum(0)


@pytest.mark.parametrize("fn", [experts, first_rows, aggregate], ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("sizes", [(2, 4, 3, 3, 3), (1, 4, 3, 3, 2), (8, 3, 3, 2, 1)], ids=str)
def test_each_bucket_is_proved_for_its_padding(fn: Callable[[Tensor], Tensor], sizes: tuple[int, ...]) -> None:
    step = graphs.capture(fn, buckets=[1, 2, 4, 8])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for turn, rows in enumerate(sizes):
            x = torch.rand(rows, 2, generator=generator) + 1
            x = -x if turn > 2 else x
            assert_same([fn(x)], [step(x)], f"{rows} rows")


def test_a_first_call_of_one_row_does_not_keep_larger_buckets_from_being_padded() -> None:
    step = graphs.capture(nn.Linear(3, 3), buckets=[1, 4])
    with torch.no_grad():
        for rows in (1, 4, 3, 2, 3):
            step(torch.randn(rows, 3))
    assert 4 in [key.rows for key in step.report().keys] and not step.report().refusals


class Slots(nn.Module):
    """Writes rows to slots, of which padding has one, and tells rows by the largest: padding reaches them."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("rows", torch.zeros(9, 3))

    def forward(self, x: Tensor, slot: Tensor, cache: Cache | None = None) -> Tensor:
        y = x * self.w + (cache.k[0] if cache is not None else 0)
        self.rows[slot] = y
        return y - y.amax(0)


@pytest.mark.parametrize("moved", ["nothing", "weight", "cache"])
def test_what_a_dummy_row_left_open_is_proved_wherever_its_tensors_are_by_then(moved: str) -> None:
    model, twin = Slots(), Slots()
    padding = {"x": "zero", "slot": graphs.sentinel(8)}
    step = graphs.capture(model, buckets=[4], batch_dims={"x": 0, "slot": 0}, padding=padding)
    caches = [Cache() if moved == "cache" else None for _ in range(2)]
    with torch.no_grad():
        step.record((torch.rand(1, 3), torch.tensor([8]), caches[0]), progress=False)
        if moved == "weight":
            model.w, twin.w = (nn.Parameter(torch.full((3,), 2.0), requires_grad=False) for _ in range(2))
        for rows, sign in ((3, 1), (3, -1), (2, -1)):
            x, slot = sign * (torch.rand(rows, 3) + 1), torch.arange(rows)
            assert_same([twin(x, slot, caches[1])], [step(x, slot, caches[1])], f"{rows} rows")
            assert_same([twin.rows[:8]], [model.rows[:8]], "state")
