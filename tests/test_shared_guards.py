"""Guards that the sizes of a step have in common: shared where they would have been the same, and nowhere else."""

from __future__ import annotations

import contextvars
import gc
import os
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

import graphs
from graphs.first_call import record_key
from graphs.guards.guard_walk import GuardWalk, guards_of
from graphs.python_reads.code_reads import CodeReads

Tensor = torch.Tensor
LARGE = 3
FACTOR = contextvars.ContextVar("FACTOR", default=2.0)


class Model(torch.nn.Module):
    """A step with numbers and buffers to choose from."""

    def __init__(self, fn: Callable[..., Tensor]) -> None:
        super().__init__()
        self.fn, self.linear = fn, torch.nn.Linear(8, 8)
        self.first, self.second, self.calls = 2.0, 2.0, 0
        self.register_buffer("one", torch.ones(8))
        self.register_buffer("two", torch.ones(8))

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        return self.fn(self, x, *(() if cache is None else (cache,)))


class Cache:
    """What a step keeps for the rows of one size."""

    def __init__(self, rows: int) -> None:
        self.seen, self.factor = torch.zeros(rows, 8), 2.0


class OtherCache(Cache):
    """One of another class that looks the same."""


def plain(model: Any, x: Tensor) -> Tensor:
    return torch.relu(model.linear(x)) * model.first + model.one


def cached(model: Any, x: Tensor, cache: Any) -> Tensor:
    cache.seen.add_(model.linear(x))
    return cache.seen * cache.factor * model.first


def unknown_code(model: Any, x: Tensor) -> Tensor:
    read = eval("lambda model: model." + ("fir", "seco")[x.shape[0] > LARGE] + ("st", "nd")[x.shape[0] > LARGE])
    return model.linear(x) * read(model)


def of_environment(model: Any, x: Tensor) -> Tensor:
    return model.linear(x) * (float(os.environ.get("A_FACTOR", "2")) if x.shape[0] > LARGE else 2.0)


def of_the_interpreter(model: Any, x: Tensor) -> Tensor:
    return model.linear(x) * (2.0 + max(sys.getrecursionlimit() - 100_000, 0) if x.shape[0] > LARGE else 2.0)


def of_the_context(model: Any, x: Tensor) -> Tensor:
    return model.linear(x) * (FACTOR.get() if x.shape[0] > LARGE else 2.0)


def other_buffer(model: Any, x: Tensor) -> Tensor:
    return model.linear(x) * model.one.shape[0] + (model.two if x.shape[0] > LARGE else model.one)[:8]


def counts(model: Any, x: Tensor) -> Tensor:
    if x.shape[0] > LARGE:
        model.calls += 1
    return model.linear(x)


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each recording, whether it has the guards of another one as well."""
    found: list[bool] = []
    guarded = record_key.guards_of

    def noted(*args: Any, **kwargs: Any) -> Any:
        guards = guarded(*args, **kwargs)
        found.append(args[-1] is not None and guards.serving(CodeReads()) is args[-1])
        return guards

    monkeypatch.setattr(record_key, "guards_of", noted)
    return found


def made(fn: Callable[..., Tensor]) -> tuple[Any, Any]:
    model = Model(fn)
    return model, graphs.capture(model)


def agrees(step: Any, model: Any, size: int, *args: Any) -> None:
    x = torch.randn(size, 8)
    with graphs.eager():
        expected = step(x, *args)
    torch.testing.assert_close(step(x, *args), expected)


def replayed(step: Any, model: Any, size: int) -> None:
    """A call agrees, and is a replay."""
    before = step.report().replays
    agrees(step, model, size)
    assert step.report().replays == before + 1


@torch.no_grad()
def test_sizes_share_guards(shared: list[bool]) -> None:
    model, step = made(plain)
    for size in (2, 5, 7):
        replayed(step, model, size)
    assert shared == [False, True, True]
    model.first = 3.0
    for size in (2, 5, 7):
        agrees(step, model, size)


@torch.no_grad()
def test_what_changed_between_two_sizes_is_looked_at_anew(shared: list[bool]) -> None:
    model, step = made(plain)
    agrees(step, model, 2)
    model.extra = object()  # no function names it
    agrees(step, model, 5)
    model.first = 3.0
    for size in (7, 2, 5, 7):
        agrees(step, model, size)
    assert shared[:3] == [False, True, False]
    model.first = 2.0
    for size in (7, 2, 5):
        agrees(step, model, size)


@torch.no_grad()
def test_guards_that_do_not_hold_are_not_shared(shared: list[bool]) -> None:
    model, step = made(lambda model, x: model.linear(x) * 2 if model.first > 1 else model.linear(x))
    replayed(step, model, 2)
    model.first = 3.0
    for size in (5, 7, 5, 7):
        replayed(step, model, size)
    assert shared == [False, False, True]


@torch.no_grad()
def test_a_size_that_runs_other_code_has_guards_of_its_own(shared: list[bool]) -> None:
    model, step = made(unknown_code)
    for size in (2, 5):
        agrees(step, model, size)
    assert shared == [False, False]
    model.second = 3.0
    agrees(step, model, 5)


@torch.no_grad()
def test_a_size_that_asks_for_the_environment(shared: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    model, step = made(of_environment)
    for size in (2, 5):
        agrees(step, model, size)
    assert shared == [False, False]
    monkeypatch.setenv("A_FACTOR", "3")
    agrees(step, model, 5)


@torch.no_grad()
def test_a_size_that_asks_for_a_setting(shared: list[bool]) -> None:
    model, step = made(of_the_interpreter)
    for size in (2, 5):
        agrees(step, model, size)
    assert shared == [False, False]
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(100_007)
    try:
        agrees(step, model, 5)
    finally:
        sys.setrecursionlimit(before)


@torch.no_grad()
def test_a_size_that_asks_for_a_context_variable(shared: list[bool]) -> None:
    model, step = made(of_the_context)
    for size in (2, 5):
        agrees(step, model, size)
    assert shared == [False, False]
    token = FACTOR.set(3.0)
    try:
        agrees(step, model, 5)
    finally:
        FACTOR.reset(token)


@torch.no_grad()
def test_a_size_that_reads_another_tensor_in_place(shared: list[bool]) -> None:
    model, step = made(other_buffer)
    for size in (2, 5):
        agrees(step, model, size)
    assert len(shared) == 2 and not any(shared)
    model.one.data = torch.ones(16)
    agrees(step, model, 5)


@torch.no_grad()
def test_a_size_that_writes_to_python(shared: list[bool]) -> None:
    model, step = made(counts)
    for size in (2, 5, 5, 2, 5):
        before = model.calls
        step(torch.randn(size, 8))
        assert model.calls == before + (size > LARGE)
    assert not any(shared)


@torch.no_grad()
def test_caches_of_sizes_have_guards_of_their_own(shared: list[bool]) -> None:
    _, step = made(cached)
    caches = {size: Cache(size) for size in (2, 5, 7)}
    for size, cache in caches.items():
        agreed(step, size, cache)
    assert shared == [False, True, True]
    caches[5].factor = 3.0
    for size, cache in caches.items():
        agreed(step, size, cache)
    assert len(shared) == 4  # only of the one whose cache changed


@torch.no_grad()
def test_a_cache_of_another_class(shared: list[bool]) -> None:
    _, step = made(cached)
    caches = {2: Cache(2), 5: OtherCache(5)}
    for size, cache in caches.items():
        agreed(step, size, cache)
    OtherCache.factor = property(lambda cache: 3.0)  # type: ignore[assignment]
    try:
        for size, cache in caches.items():
            agreed(step, size, cache)
    finally:
        del OtherCache.factor


def agreed(step: Any, size: int, cache: Any) -> None:
    """A call agrees with eager, in what it returns and in what it leaves."""
    x, before = torch.randn(size, 8), cache.seen.clone()
    with graphs.eager():
        expected = step(x, cache)
    after = cache.seen.clone()
    cache.seen.copy_(before)
    torch.testing.assert_close(step(x, cache), expected)
    torch.testing.assert_close(cache.seen, after)


@torch.no_grad()
def test_weights_that_are_exchanged_are_seen_at_every_size(shared: list[bool]) -> None:
    model, step = made(plain)
    sizes = (2, 5, 7)
    for size in sizes:
        agrees(step, model, size)
    assert shared == [False, True, True]
    for _ in range(2):
        model.load_state_dict({name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}, assign=True)
        for size in sizes:
            agrees(step, model, size)


@torch.no_grad()
def test_caches_and_what_they_hold_are_let_go() -> None:
    _, step = made(cached)
    caches = {size: Cache(size) for size in (2, 5, 7)}
    for size, cache in caches.items():
        agreed(step, size, cache)
    held = [weakref.ref(cache) for cache in caches.values()]
    del cache
    caches.clear()
    gc.collect()
    assert [reference() for reference in held] == [None] * 3


@torch.no_grad()
def test_what_the_model_gave_up_is_let_go() -> None:
    model, step = made(lambda model, x: model.linear(x) * len(model.names.kept))
    model.names = type("Names", (), {})()
    model.names.kept = [1, 2]
    for size in (2, 5, 7):
        agrees(step, model, size)
    held = weakref.ref(model.names)
    model.names = type("Names", (), {"kept": [1, 2, 3]})()
    agrees(step, model, 5)
    for size in (2, 7):
        agrees(step, model, size)
    gc.collect()
    assert held() is None


def walked(opaque: Any, beside: Any = None) -> GuardWalk:
    model = Model(plain)
    return GuardWalk(CodeReads(), [("self", model), ("cache", opaque)], opaques=[("cache", opaque)], beside=beside)


def test_guards_do_not_serve_where_an_argument_leads_to_unknown_functions() -> None:
    guards = walked(Cache(2)).guards()
    assert walked(Cache(3), guards.serving(CodeReads())).fits
    other = Cache(3)
    other.hook = lambda model: model.hidden  # type: ignore[attr-defined]
    reads = CodeReads(codes={id(cached.__code__): (cached.__code__, globals())}, complete=True)
    known = guards_of(reads, [("self", Model(cached)), ("cache", cache := Cache(2))], opaques=[("cache", cache)])
    base = known.serving(reads)
    assert base is not None
    walk = GuardWalk(reads, [("cache", other)], opaques=[("cache", other)], beside=base)
    assert walk.fits  # what no function names is not looked at
    other.seen = other.hook  # type: ignore[attr-defined]
    assert not GuardWalk(reads, [("cache", other)], opaques=[("cache", other)], beside=base).fits


def test_guards_do_not_serve_where_arguments_hold_something_weakly() -> None:
    cache, target = Cache(2), Cache(2)
    cache.seen = weakref.ref(target)  # type: ignore[assignment]
    reads = CodeReads(codes={id(cached.__code__): (cached.__code__, globals())})
    guards = guards_of(reads, [("cache", cache)], opaques=[("cache", cache)])
    assert guards.serving(reads) is None
    other = Cache(2)
    assert guards_of(reads, [("cache", other)], opaques=[("cache", other)]).serving(reads) is not None
