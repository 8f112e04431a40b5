"""Options and fixtures of the suites: ``pytest benchmarks --graphs-mode=eager|graph|both [--graphs-device=auto|cpu|cuda]``."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from graphs.bench.choices import DEVICES
from graphs.bench.harness.machine import describe_machine
from graphs.bench.settings import BenchSettings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROUNDS = 30
WARM_UP = 3
MODES = {"eager": ("eager",), "graph": ("graph",), "both": ("eager", "graph")}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the two options."""
    group = parser.getgroup("graphs")
    group.addoption("--graphs-mode", choices=tuple(MODES), default="both", help="modes to time (default: both)")
    group.addoption("--graphs-device", choices=DEVICES, default="auto", help="device to time on (default: auto)")


def pytest_configure() -> None:
    """Time operators on the CPU with one thread: toy sizes gain nothing from more, and scatter."""
    torch.set_num_threads(1)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise a case that takes ``mode``."""
    if "mode" in metafunc.fixturenames:
        metafunc.parametrize("mode", MODES[metafunc.config.getoption("--graphs-mode")])


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Add device, driver and versions to the JSON of pytest-benchmark, as ``machine_info.graphs``."""
    machine_info["graphs"] = dataclasses.asdict(describe_machine(device_of(config)))


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """The device that everything runs on."""
    return device_of(pytestconfig)


def device_of(config: pytest.Config) -> torch.device:
    """What ``--graphs-device`` asks for."""
    return BenchSettings.resolve(config.getoption("--graphs-device")).device


@pytest.fixture
def time_call(benchmark: Any) -> Callable[..., None]:
    """``time_call(call, device, before)``: rounds from an idle device to an idle device; ``before`` is not timed."""

    def measure(call: Callable[[], Any], device: torch.device, before: Callable[[], Any] = lambda: None) -> None:
        def prepare() -> None:
            before()
            drain(device)

        def timed() -> None:
            call()
            drain(device)

        benchmark.pedantic(timed, setup=prepare, rounds=ROUNDS, warmup_rounds=WARM_UP)

    return measure


@pytest.fixture
def time_host(benchmark: Any) -> Callable[..., None]:
    """``time_host(call, device)``: time until ``call`` returns, each round from an idle device."""

    def measure(call: Callable[[], Any], device: torch.device) -> None:
        if device.type == "cuda":
            benchmark.pedantic(call, setup=functools.partial(drain, device), rounds=10 * ROUNDS, warmup_rounds=WARM_UP)
        else:  # no queue to drain, so a round can hold many calls
            benchmark.pedantic(call, rounds=ROUNDS, iterations=20, warmup_rounds=WARM_UP)

    return measure


def drain(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
