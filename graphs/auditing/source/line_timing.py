"""How long the host is held up at chosen lines of a step."""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any

import torch

from graphs.observation.fused_modules import unnoticed
from passes.core.composites import Calls, as_written
from passes.core.modes.patched_functions import as_torch_made
from passes.core.source_location import user_site

Place = tuple[tuple[str, int], str]
"""A line, and the name of the function of torch that it calls."""


class _Stopwatch(Calls):
    """Adds up the time of calls at some places."""

    def __init__(self, places: Collection[Place]) -> None:
        super().__init__()
        self.places, self.names = places, {name for _, name in places}
        self.seconds: dict[Place, float] = defaultdict(float)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = as_torch_made(func, sys._getframe(1))
        name = str(getattr(func, "__name__", ""))
        place = (user_site() if name in self.names else ("", 0), name)
        if place not in self.places:
            return func(*args, **(kwargs or {}))
        start = time.perf_counter()
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.seconds[place] += time.perf_counter() - start


def time_places(
    run: Callable[[], Any], places: Collection[Place], device: torch.device, *, before: Callable[[], Any], runs: int
) -> dict[Place, float]:
    """Median time of all calls at each place in one run of a step, microseconds.

    No operator is watched meanwhile, so that on a GPU the host is as far ahead as it is in an ordinary step, and the time
    of a call that needs a value is the time it waits.

    Args:
        before: puts the step's state back; called before each run and not timed.
    """
    samples: dict[Place, list[float]] = defaultdict(list)
    for _ in range(runs):
        before()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        watch = _Stopwatch(places)
        with as_written(), unnoticed(), watch:
            run()
        for place, seconds in watch.seconds.items():
            samples[place].append(seconds * 1e6)
    return {place: statistics.median(times) for place, times in samples.items()}
