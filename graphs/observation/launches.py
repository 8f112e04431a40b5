"""Counting what the host submits during one call.

On a GPU: kernels, asynchronous copies and graph launches, from the profiler's record of driver calls. Profiling can
leave a residue on later launches, so `graphs.bench.experiment` counts after everything has been timed. On a CPU: the
operators that pass the dispatcher.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch

from passes.core.composites import DispatchMode

_SUBMITTING = re.compile(r"(cuda|cu|hip)(Ext)?(Module)?(Launch(Cooperative)?Kernel|GraphLaunch|Mem(cpy|set)\w*Async)")


class _OperatorCount(DispatchMode):
    """Counts the operators dispatched while it is active."""

    graphs_observer = True

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def count_launches(call: Callable[[], Any], device: torch.device) -> int | None:
    """Submissions of one ``call``, after an uncounted one; None where the profiler recorded none."""
    call()
    if device.type != "cuda":
        with _OperatorCount() as operators:
            call()
        return operators.count
    _first_profile(device)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize(device)
    return submissions({event.key: event.count for event in profile.key_averages()}) or None


@functools.cache
def _first_profile(device: torch.device) -> None:
    """The first profile of a process can come back incomplete: take one that nobody reads."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]):
        torch.zeros(1, device=device).add_(1)
        torch.cuda.synchronize(device)


def submissions(counts: dict[str, int]) -> int:
    """How many of the profiler's events, given as name -> count, hand work to the device."""
    return sum(count for name, count in counts.items() if _SUBMITTING.match(name))
