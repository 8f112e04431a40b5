"""One decode step of a Llama with a static cache. Tokens of both modes are equal before anything is timed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import graphs
from graphs.bench.decode.llama import Decoding, build_llama, size_for
from graphs.bench.decode.measure import compare_tokens

Timer = Callable[..., None]
Model = tuple[torch.nn.Module, Any]


@pytest.fixture(scope="module")
def model(device: torch.device) -> Model:
    """The model, and its captured self: one for all batch sizes."""
    llama = build_llama(size_for(device), device)
    return llama, graphs.capture(llama)


@pytest.mark.parametrize("batch", [1, 4, 16], ids="batch={}".format)
def test_decode_step(benchmark: Any, time_call: Timer, model: Model, device: torch.device, batch: int, mode: str) -> None:
    llama, step = model
    benchmark.group = f"decode step, batch {batch}"
    decoding = Decoding(llama, size_for(device), batch, device)
    compare_tokens(decoding, step, 8)
    step.mode = mode
    time_call(functools.partial(decoding.first_step, step), device, decoding.reset)


@pytest.mark.parametrize("batch", [1, 4], ids="batch={}".format)
def test_generate_16_tokens(benchmark: Any, time_call: Timer, model: Model, device: torch.device, batch: int, mode: str) -> None:
    llama, step = model
    benchmark.group = f"16 greedy tokens, batch {batch}"
    decoding = Decoding(llama, size_for(device), batch, device)
    compare_tokens(decoding, step, 16)
    step.mode = mode
    time_call(functools.partial(decoding.generate, step, 16), device, decoding.reset)
