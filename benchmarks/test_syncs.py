"""Steps whose host syncs the passes take out: the original, the rewritten step and the one written by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from graphs.bench.harness.progress import Progress, make_console
from graphs.bench.syncs.measure import prepare
from graphs.bench.syncs.patterns import DECODE, PATTERNS, TOY_SYNCS, Pattern


@pytest.mark.parametrize("version", ["eager", "written", "by_hand"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.written.__name__)
def test_pattern(benchmark: Any, time_call: Callable[..., None], device: torch.device, pattern: Pattern, version: str) -> None:
    benchmark.group = pattern.name
    sizes = DECODE if device.type == "cuda" else TOY_SYNCS
    steps = prepare(pattern, sizes, device, "none", Progress(make_console(quiet=True)))  # compared with the original there
    with torch.no_grad():
        time_call(functools.partial(getattr(steps, version), *steps.calls[0]), device)
