"""A recording ends with the object that it was made for: what that held is given back at once."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch

import graphs
from graphs.dispatch.dead_objects import DeadObjects

Tensor = torch.Tensor


class Cache:
    def __init__(self, value: float = 1.0) -> None:
        self.keys = torch.full((3,), value)
        self.inner = [torch.full((3,), value)]


def attend(x: Tensor, cache: Any) -> Tensor:
    cache.keys.add_(x)
    return x * cache.keys + cache.inner[0]


@pytest.fixture(autouse=True, params=[torch.no_grad, torch.inference_mode])
def _grad(request: pytest.FixtureRequest) -> Any:
    with request.param():
        yield


def test_the_tensors_of_a_cache_die_with_it() -> None:
    step, cache = graphs.capture(attend), Cache()
    for _ in range(2):
        step(torch.ones(3), cache)
    kept = [weakref.ref(cache.keys), weakref.ref(cache.inner[0])]
    del cache
    gc.collect()
    assert [reference() for reference in kept] == [None, None]
    assert (step.report().recordings, step.report().replays) == (1, 2)


def test_the_recording_of_another_cache_stays() -> None:
    step, first, second = graphs.capture(attend), Cache(1.0), Cache(2.0)
    for cache in (first, second):
        step(torch.ones(3), cache)
    del cache, first
    gc.collect()
    assert step.report().recordings == 1
    assert torch.equal(step(torch.ones(3), second), torch.full((3,), 6.0))
    assert step.report().replays == 3 and step.report().recordings == 1


def test_an_object_that_dies_below_a_call_is_left_to_the_next() -> None:
    class Owner:
        forgotten = 0

        def forget(self) -> None:
            self.forgotten += 1

    owner, lock, cache = Owner(), threading.RLock(), Cache()
    dead = DeadObjects(owner.forget, (threading.RLock(), lock))
    dead.watch([cache, 3])
    with lock:
        del cache
        gc.collect()
        dead.settle()
        assert owner.forgotten == 0 and dead.pending
    dead.settle()
    dead.settle()
    assert owner.forgotten == 1 and not dead.pending


def test_watching_keeps_no_step_alive() -> None:
    step, cache = graphs.capture(attend), Cache()
    step(torch.ones(3), cache)
    alive = weakref.ref(step)
    del step
    gc.collect()
    assert alive() is None
    del cache
