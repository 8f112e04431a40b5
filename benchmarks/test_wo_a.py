"""The grouped projection by path and number of tokens. Every case is within its tolerance of float64 before it is timed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import graphs
from graphs.bench.settings import BenchSettings
from graphs.bench.wo_a import (
    PATHS,
    ProjectionSize,
    ProjectionStack,
    activations,
    compare_with_float64,
    make_weights,
    projection_size_for,
)
from graphs.ops import GroupedWeight

Timer = Callable[..., None]
Weights = tuple[ProjectionSize, list[GroupedWeight]]


@pytest.fixture(scope="module")
def loaded(device: torch.device) -> Weights:
    """Shapes and weights for this device, shared by the paths."""
    size = projection_size_for(BenchSettings(device))
    return size, make_weights(size, device)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tokens", [1, 16])
def test_projections(
    benchmark: Any, time_call: Timer, loaded: Weights, device: torch.device, tokens: int, path: str, mode: str
) -> None:
    size, weights = loaded
    benchmark.group = f"{size.layers} projections, M={tokens}, {path}"
    stack = ProjectionStack(weights, path)
    step = graphs.capture(stack)
    o = activations(tokens, size, device)
    with torch.no_grad():
        compare_with_float64(stack, step, weights, o, path)
        step.mode = mode
        time_call(functools.partial(step, o), device)
