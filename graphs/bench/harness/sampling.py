"""Timing several variants of one call in one run: alternating, warmed up, with quartiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphs.observation.timing import time_call

Tick = Callable[[], None]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of ``runs`` samples, in the unit of the field that holds it."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, samples: Sequence[float], scale: float = 1.0) -> Spread:
        """Summarise ``samples``, each multiplied by ``scale``."""
        values = [sample * scale for sample in samples]
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return cls(middle, low, high, len(values))


@dataclass(frozen=True)
class Variant:
    """One way to do the work: ``call`` is timed, ``before`` runs ahead of it and is not."""

    call: Callable[[], Any]
    before: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Samples:
    """Host and device microseconds of each run; ``device_us`` is empty on a CPU."""

    host_us: list[float]
    device_us: list[float]

    @property
    def call_us(self) -> list[float]:
        """What a call takes when calls follow each other: the longer of host and device time, per run."""
        return [max(pair) for pair in zip(self.host_us, self.device_us, strict=True)] if self.device_us else self.host_us


def time_variants(
    variants: Mapping[str, Variant], device: torch.device, *, runs: int, warm_up: int = 3, tick: Tick = lambda: None
) -> dict[str, Samples]:
    """Time each variant ``runs`` times, taking turns, so that drift of the machine meets all of them alike."""
    result = {name: Samples([], []) for name in variants}
    for turn in range(runs + warm_up):
        for name, variant in variants.items():
            took = time_call(variant.call, device, before=variant.before, runs=1)
            tick()
            if turn >= warm_up:
                result[name].host_us.append(took.host_us)
                if took.device_us is not None:
                    result[name].device_us.append(took.device_us)
    return result


def wall_seconds(call: Callable[[], Any], device: torch.device, before: Callable[[], Any] = lambda: None) -> float:
    """Seconds from an idle device to an idle device around ``call``."""
    before()
    _drain(device)
    start = time.perf_counter()
    call()
    _drain(device)
    return time.perf_counter() - start


def wall_variants(
    variants: Mapping[str, Variant], device: torch.device, *, runs: int, warm_up: int = 1, tick: Tick = lambda: None
) -> dict[str, list[float]]:
    """Like `time_variants` for `wall_seconds`: seconds per run, the variants taking turns."""
    result: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(runs + warm_up):
        for name, variant in variants.items():
            seconds = wall_seconds(variant.call, device, variant.before)
            tick()
            if turn >= warm_up:
                result[name].append(seconds)
    return result


def host_microseconds(call: Callable[[], Any], device: torch.device, calls: int) -> list[float]:
    """Host time of each of ``calls`` calls in a row, starting from an idle device.

    ``calls`` must be small against the depth of the launch queue, or the host would wait for the device.
    """
    _drain(device)
    samples = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1e6)
    _drain(device)
    return samples


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """Run by run quotients of two variants that took turns."""
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


def _drain(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
