"""Timing a call: how often it runs, and what is run before."""

from __future__ import annotations

import torch

from graphs.observation.timing import time_call

CPU = torch.device("cpu")


def test_each_run_is_preceded_by_what_restores_it() -> None:
    order: list[str] = []
    time_call(lambda: order.append("run"), CPU, before=lambda: order.append("before"), runs=2, warm_up=1)
    assert order == ["before", "run"] * 3


def test_a_call_that_takes_long_is_not_repeated() -> None:
    calls: list[int] = []
    took = time_call(lambda: calls.append(1), CPU, runs=3, enough=0.0)
    assert len(calls) == 1 and took.host_us > 0 and took.device_us is None
    time_call(lambda: calls.append(1), CPU, runs=3)
    assert len(calls) == 4
