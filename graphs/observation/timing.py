"""Host and device time of one call, in microseconds."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_CYCLES_PER_US = 2000  # above the clock of every current GPU, so that a pause is never too short


@dataclass(frozen=True)
class CallTime:
    """Medians of one call: ``host_us`` until it returns, ``device_us`` of its device work with the host ahead."""

    host_us: float
    device_us: float | None


def time_call(
    fn: Callable[[], Any],
    device: torch.device,
    *,
    before: Callable[[], Any] = lambda: None,
    runs: int = 3,
    warm_up: int = 0,
    watch: Callable[[], Any] = lambda: None,
    enough: float = math.inf,
) -> CallTime:
    """Median host and device time of ``fn`` over ``runs`` calls, after ``warm_up`` unmeasured ones.

    Device time is taken between two events around the call, queued behind a pause on the device that is longer than
    the call's host time: the device then never waits for the host, and the gaps of eager launching are not counted.

    Args:
        before: called before each run and not measured, for example to restore state.
        watch: called after each run, for a progress bar.
        enough: seconds after which no further run begins: what takes long by itself is not made exact by repetition.
    """
    for _ in range(warm_up):
        before()
        fn()
        watch()
    hosts, devices = [], []
    started = time.perf_counter()
    for index in range(runs):
        if index and time.perf_counter() - started > enough:
            break
        before()
        hosts.append(_host_us(fn, device))
        if device.type == "cuda":
            before()
            devices.append(_device_us(fn, device, hosts[-1]))
        watch()
    return CallTime(statistics.median(hosts), statistics.median(devices) if devices else None)


def _host_us(fn: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    fn()
    return (time.perf_counter() - start) * 1e6


def _device_us(fn: Callable[[], Any], device: torch.device, host_us: float) -> float:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(int((host_us * 1.5 + 50) * _CYCLES_PER_US))
    first.record()
    fn()
    last.record()
    torch.cuda.synchronize(device)
    return float(first.elapsed_time(last)) * 1e3
