"""The grouped projection by path, groups and tokens. Every case is within its tolerance of float64 before it is timed.

``python -m graphs bench wo_a`` prints one table of all of it, with ratios from one run; here single cases can be picked by
their id (``"benchmarks/test_wo_a.py::test_projections[graph-M=4-G=2-fused]"``) and compared between runs by pytest-benchmark.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from graphs.bench.choices import PATHS
from graphs.bench.settings import BenchSettings
from graphs.bench.wo_a.measure import Selection, activations, check, exact_results, make_weights, selection_for
from graphs.bench.wo_a.paths import absent
from graphs.bench.wo_a.record import ProjectionStack, record
from graphs.ops import GroupedWeight

Timer = Callable[..., None]
Weights = Callable[[int], list[GroupedWeight]]
SIZES = [(tokens, groups) for groups in (2, 8, 16) for tokens in (1, 4, 16, 64, 256, 1024)]  # weights of one G at a time


@pytest.fixture(scope="module")
def selection(device: torch.device) -> Selection:
    """The shapes for this device."""
    return selection_for(BenchSettings(device))


@pytest.fixture(scope="module")
def loaded(device: torch.device, selection: Selection) -> Weights:
    """Weights of G groups, made once and shared by the paths; those of one G at a time."""
    return functools.lru_cache(maxsize=1)(lambda groups: make_weights(selection, groups, device))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("tokens", "groups"), SIZES, ids=[f"M={tokens}-G={groups}" for tokens, groups in SIZES])
def test_projections(
    benchmark: Any,
    time_call: Timer,
    loaded: Weights,
    selection: Selection,
    device: torch.device,
    groups: int,
    tokens: int,
    path: str,
    mode: str,
) -> None:
    if groups not in selection.groups or tokens not in selection.tokens:
        pytest.skip(f"too large for {device}: {selection.name}")
    why = absent(path, device)
    if why:
        pytest.skip(f"{path}: {why}")
    weights = loaded(groups)
    benchmark.group = f"{len(weights)} projections, G={groups}, M={tokens}"
    stack = ProjectionStack(weights, path)
    o = activations(tokens, groups, selection.k, device)
    with torch.no_grad():
        made = record(stack, o)
        benchmark.extra_info["error"] = check(stack, made.replay(), o, exact_results(weights, o))
        benchmark.extra_info["weight_bytes"] = stack.weight_bytes
        time_call(functools.partial(stack, o) if mode == "eager" else made.replay, device)
