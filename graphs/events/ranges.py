"""Ranges in a profiler's trace, and a replay that somebody looks at."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, Protocol, TypeVar

import torch

from graphs.events.kinds import Replayed, size_text
from graphs.events.listeners import emit, logger
from graphs.objects.torch_fast_paths import profiler

P = ParamSpec("P")
R = TypeVar("R")


class Counted(Protocol):
    """A recording that counts the calls it has served."""

    replays: int


@contextlib.contextmanager
def marked(text: str, asked: bool | None) -> Iterator[None]:
    """A range named ``text`` in the traces that are being made.

    Args:
        asked: True for NVTX whether or not a profiler is known to run (one outside of this process is not); None for a range
            of PyTorch's profiler while that runs; False for none.
    """
    with contextlib.ExitStack() as ranges:
        if asked is not False and profiler._is_profiler_enabled:
            ranges.enter_context(torch.profiler.record_function(text))
        if asked and (torch.version.cuda or torch.version.hip):  # other builds have no NVTX
            torch.cuda.nvtx.range_push(text)
            ranges.callback(torch.cuda.nvtx.range_pop)
        yield


@contextlib.contextmanager
def attended_replay(
    lock: AbstractContextManager[Any],
    recording: Counted,
    asked: bool | None,
    *,
    step: str,
    key: str,
    rows: int | None,
    real_rows: int,
) -> Iterator[None]:
    """Around a replay that holds ``lock``: its range, and the event, once the recording has served the call.

    Args:
        asked: see `marked`.
        step, key, rows, real_rows: as `Replayed` has them.
    """
    started = time.perf_counter()
    with marked(f"graphs::replay {step} {size_text(key, rows)}".strip(), asked), lock:
        before = recording.replays
        yield
        served = recording.replays > before
    if served:
        emit(Replayed(step=step, key=key, rows=rows, real_rows=real_rows, seconds=time.perf_counter() - started))


def recording_range(step: str, key: str, rows: int | None, asked: bool | None) -> AbstractContextManager[None]:
    """The range around everything that precedes the first replay of a recording."""
    return marked(f"graphs::record {step} {size_text(key, rows)}".strip(), asked)


def first_call_run(letter: str, what: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Log, at level DEBUG, each time that a run of a first call is over, with what it took.

    Args:
        letter: its name in `graphs.first_call.record_key`; empty for what is no run of the step.
        what: what it is for.
    """

    def decorated(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def logged(*args: P.args, **kwargs: P.kwargs) -> R:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                logger.debug(
                    "first call, %s: %.4f s", f"run {letter} ({what})" if letter else what, time.perf_counter() - started
                )

        return logged

    return decorated
