"""Several threads on one step and on several; every join has a limit, so that a deadlock is a failure and not a hang."""

from __future__ import annotations

import concurrent.futures
import queue
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import graphs
from graphs.dispatch.call_log import NotReplayed

Tensor = torch.Tensor
LIMIT = 60  # seconds


def together(*bodies: Callable[[], Any]) -> list[Any]:
    """Run each body in a thread of its own, all starting at once; what they return, or the first error."""
    barrier = threading.Barrier(len(bodies))
    results: list[Any] = [None] * len(bodies)
    failures: list[BaseException] = []

    def run(index: int) -> None:
        try:
            barrier.wait(LIMIT)
            with torch.no_grad():
                results[index] = bodies[index]()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    if failures:
        raise failures[0]
    return results


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.count.add_(1)
        return x * 2 + 1, self.count * 1


def calls(step: Any, first: float, number: int = 25) -> Callable[[], list[int]]:
    """Calls with data of this thread's own; returns the counts seen."""

    def body() -> list[int]:
        seen = []
        for index in range(number):
            x = torch.full((3,), first + index)
            doubled, count = step(x)
            assert doubled.tolist() == [2 * (first + index) + 1] * 3
            seen.append(int(count))
        return seen

    return body


def in_order(seen: Sequence[Sequence[int]]) -> bool:
    return all(list(counts) == sorted(set(counts)) for counts in seen)


@pytest.mark.parametrize("verify", ["capture", "always", "off"])
def test_threads_on_one_step_get_their_own_results_and_advance_state_once_per_call(verify: str) -> None:
    model = Counter()
    step = graphs.capture(model, verify=verify)
    seen = together(*(calls(step, 1000.0 * thread) for thread in range(4)))
    assert in_order(seen) and sorted(count for counts in seen for count in counts) == list(range(1, 101))
    assert model.count.item() == 100
    report = step.report()
    assert (report.recordings, report.replays, report.eager_calls) == (1, 100, 0)


@pytest.mark.parametrize("verify", ["capture", "always"])
def test_threads_on_steps_of_their_own(verify: str) -> None:
    steps = [graphs.capture(Counter(), verify=verify) for _ in range(3)]
    seen = together(*(calls(step, 1000.0 * index) for index, step in enumerate(steps)))
    assert seen == [list(range(1, 26))] * 3
    assert [step.report().replays for step in steps] == [25] * 3


def test_threads_that_cross_two_steps_do_not_lock_each_other_out() -> None:
    one, other = (graphs.capture(Counter(), verify="always") for _ in range(2))

    def crossing(first: Any, second: Any) -> Callable[[], None]:
        def body() -> None:
            for index in range(10):
                first(torch.full((index % 3 + 1,), 1.0))
                second(torch.full((index % 3 + 1,), 1.0))
                first.report()

        return body

    together(crossing(one, other), crossing(other, one), crossing(one, other))
    assert one.count.item() == other.count.item() == 30


def test_a_verified_step_inside_a_verified_step_from_two_threads() -> None:
    inner = graphs.capture(Counter(), verify="always")

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)[0] * 2

    outers = [graphs.capture(Outer(), verify="always") for _ in range(2)]

    def body(step: Any) -> Callable[[], None]:
        def run() -> None:
            for index in range(8):
                assert step(torch.full((2,), float(index))).tolist() == [4.0 * index + 2] * 2
                inner(torch.ones(2))

        return run

    together(*map(body, outers))
    assert inner.count.item() == 32


def test_threads_with_new_keys_record_each_once() -> None:
    step = graphs.capture(lambda x: x * 2)

    def body() -> None:
        for size in range(1, 9):
            assert step(torch.ones(size)).tolist() == [2.0] * size

    together(body, body, body, body)
    report = step.report()
    assert (report.recordings, report.replays) == (8, 32)


def test_recordings_dropped_while_others_replay() -> None:
    model = Counter()
    step = graphs.capture(model)

    def dropping() -> None:
        for _ in range(10):
            step.invalidate()

    together(calls(step, 0.0), calls(step, 1000.0), dropping)
    assert model.count.item() == 50 and step.report().replays == 50


def test_refusals_are_counted_from_every_thread() -> None:
    step = graphs.capture(lambda x: x * x.sum().item(), passes="off")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotReplayed)
        together(*[lambda: [step(torch.ones(2)) for _ in range(10)]] * 3)
    (refusal,) = step.report().refusals
    assert refusal.count == step.report().eager_calls == 30


def test_an_error_in_one_thread_leaves_the_step_to_the_others() -> None:
    def picky(x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] == 1:
            raise ValueError("too short")
        return x * 2

    step = graphs.capture(picky)

    def failing() -> None:
        for _ in range(5):
            with pytest.raises(ValueError, match="too short"):
                step(torch.ones(1))

    def working() -> None:
        for _ in range(5):
            assert step(torch.ones(2)).tolist() == [2, 2]

    together(failing, working, failing, working)
    assert step.report().replays == 10


def _queues() -> tuple[Callable[[Tensor], Tensor], Callable[[], None]]:
    asked, answered = queue.Queue[Any](), queue.Queue[Any]()

    def work() -> None:
        while (request := asked.get()) is not None:
            with torch.no_grad():
                answered.put(request())

    def step(x: Tensor) -> Tensor:
        asked.put(lambda: x * 2)
        return answered.get(timeout=LIMIT) + 1  # type: ignore[no-any-return]

    threading.Thread(target=work, daemon=True).start()
    return step, lambda: asked.put(None)


def _condition() -> tuple[Callable[[Tensor], Tensor], Callable[[], None]]:
    held: dict[str, Any] = {"asked": None, "answer": None}
    condition = threading.Condition()

    def work() -> None:
        while True:
            with condition:
                condition.wait_for(lambda: held["asked"] is not None)
                if held["asked"] == "end":
                    return
                with torch.no_grad():
                    held["answer"], held["asked"] = held["asked"] * 2, None
                condition.notify_all()

    def ask(what: Any) -> None:
        with condition:
            held["asked"] = what
            condition.notify_all()

    def step(x: Tensor) -> Tensor:
        ask(x)
        with condition:
            assert condition.wait_for(lambda: held["answer"] is not None, LIMIT)
            answer, held["answer"] = held["answer"], None
        return answer + 1  # type: ignore[no-any-return]

    threading.Thread(target=work, daemon=True).start()
    return step, lambda: ask("end")


def _pool() -> tuple[Callable[[Tensor], Tensor], Callable[[], None]]:
    pool = concurrent.futures.ThreadPoolExecutor(1)
    return lambda x: pool.submit(lambda: x * 2).result(LIMIT) + 1, pool.shutdown


@pytest.mark.parametrize("made", [_queues, _condition, _pool], ids=lambda made: made.__name__.strip("_"))
@pytest.mark.filterwarnings("ignore::graphs.dispatch.call_log.NotReplayed")
def test_a_step_that_another_thread_works_for_is_eager_by_name(
    made: Callable[[], tuple[Callable[[Tensor], Tensor], Callable[[], None]]],
) -> None:
    step, end = made()
    captured = graphs.capture(step)
    try:
        with torch.no_grad():
            assert [captured(torch.full((1,), float(i))).item() for i in range(5)] == [1, 3, 5, 7, 9]
    finally:
        end()
    assert {refusal.reason for refusal in captured.report().refusals} == {"side-effect"}


class _Worker:
    """A thread that adds one to a tensor whenever it is woken by a lock, and wakes whoever waits by another."""

    def __init__(self) -> None:
        self.total = torch.zeros(3)
        self.wake, self.done = threading.Lock(), threading.Lock()
        self.wake.acquire()
        self.done.acquire()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while self.wake.acquire(timeout=LIMIT):
            self.total += 1
            self.done.release()


def test_a_worker_that_is_woken_by_a_lock_works_once_in_each_call() -> None:
    worker = _Worker()

    def step(x: Tensor) -> Tensor:
        worker.wake.release()
        assert worker.done.acquire(timeout=LIMIT)
        return x * 2

    captured = graphs.capture(step)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotReplayed)
        for index in range(3):
            captured(torch.ones(3))
            assert worker.total.tolist() == [index + 1] * 3
    assert {refusal.reason for refusal in captured.report().refusals} == {"side-effect"}


def test_a_lock_around_the_step_says_nothing() -> None:
    lock = threading.Lock()

    def step(x: Tensor) -> Tensor:
        lock.acquire()
        try:
            return x * 2
        finally:
            lock.release()

    captured = graphs.capture(step)
    with torch.no_grad():
        for _ in range(3):
            captured(torch.ones(3))
    assert captured.report().replays == 3


def test_a_step_is_traced_on_a_thread_that_ends_and_then_on_another() -> None:
    program = """
import threading, torch, graphs
def decides(x):
    return (x * 2 if x.sum() > 0 else x - 1) + int(x[0])
def work():
    step = graphs.capture(decides)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(step(torch.ones(2)), decides(torch.ones(2)))
    assert step.report().replays == 3
for _ in range(2):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    work()
print("done")
"""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=300)
    assert run.stdout == "done\n", run.stderr
