"""A bare ``torch.cuda.CUDAGraph`` of a step, checked: what a captured step is measured against."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from graphs.bench.decode.llama import Decoding
from graphs.bench.harness.rows import WrongResult

Tensor = torch.Tensor
SAME_KERNELS = {torch.float32: 1e-4, torch.bfloat16: 1e-2}  # of the largest value: summation order at most
OTHER_KERNELS = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # a compiler that fuses rounds in other places


def bare_graph(fn: Callable[[], Tensor], warm_up: int = 3) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Record ``fn`` after ``warm_up`` calls on another stream. Returns the graph and its static output.

    What ``fn`` writes in place is written by the warm-up too: the caller puts it back.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(warm_up):
            fn()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        output = fn()
    return graph, output


def bare_step(model: Callable[..., Any], decoding: Decoding) -> torch.cuda.CUDAGraph:
    """A bare graph of one decode step of ``model``; the cache is left as it was.

    Raises:
        WrongResult: its logits are not those of the step.
    """
    decoding.reset()
    expected = decoding.first_step(model).clone()
    decoding.reset()
    graph, logits = bare_graph(functools.partial(decoding.first_step, model))
    decoding.reset()
    graph.replay()
    same_output(logits, expected, "a bare graph of the Llama step")
    decoding.reset()
    return graph


def same_output(found: Tensor, expected: Tensor, what: str, limits: dict[torch.dtype, float] = SAME_KERNELS) -> None:
    """Raise `WrongResult` where two results differ by more than their share of the largest expected value."""
    limit = limits[expected.dtype] * float(expected.abs().max())
    error = float((found.float() - expected.float()).abs().max())
    if not error <= limit:
        raise WrongResult(f"{what} differs from its reference by {error:.3g}, limit {limit:.3g}")
