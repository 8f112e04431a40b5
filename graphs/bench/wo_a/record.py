"""A stack of projections, recorded, and the kernels that only read its weights."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

import graphs
from graphs.bench.harness.rows import WrongResult
from graphs.bench.wo_a.bars import FLOOR
from graphs.bench.wo_a.paths import build
from graphs.ops import GroupedWeight

Tensor = torch.Tensor
T = TypeVar("T")


class ProjectionStack(torch.nn.Module):
    """Projections of the same input, one after the other; returns the last result."""

    def __init__(self, loaded: list[GroupedWeight], path: str) -> None:
        super().__init__()
        self.path = path
        self.projections = torch.nn.ModuleList(build(path, weight) for weight in loaded)
        self.weight_bytes: int = getattr(self.projections[0], "weight_bytes")  # noqa: B009 (a module's attributes are untyped)

    def forward(self, o: Tensor) -> Tensor:
        """``o [M, G, K]`` gives ``[M, G, N]``."""
        for projection in self.projections:
            result: Tensor = projection(o)
        return result


@dataclass(frozen=True)
class Recorded:
    """A recording of one call: what replays it and returns the last result, and what it cost."""

    replay: Callable[[], Tensor]
    seconds: float
    pool_bytes: int


def record(stack: ProjectionStack, o: Tensor) -> Recorded:
    """Record one call of ``stack``; its input stays where it is.

    Raises:
        WrongResult: on a CPU, if the tape was not replayed.
    """
    start = time.perf_counter()
    if not o.is_cuda:
        step = graphs.capture(stack, mode="graph")
        step(o)
        if not step.report().replays:
            step(o)
        if not step.report().replays:
            raise WrongResult(f"the projections of path {stack.path} were not replayed:\n{step.report()}")
        return Recorded(functools.partial(step, o), time.perf_counter() - start, step.report().keys[-1].pool_bytes)
    stack(o)
    before = torch.cuda.memory_reserved(o.device)
    replay = record_graph(lambda: stack(o), o.device)
    return Recorded(replay, time.perf_counter() - start, max(torch.cuda.memory_reserved(o.device) - before, 0))


def record_graph(call: Callable[[], T], device: torch.device) -> Callable[[], T]:
    """A bare device graph of ``call``, which has run before: what replays it and returns its (one and only) result."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        call()
        stream.synchronize()
        graph.capture_begin()
        try:
            result = call()
        finally:
            graph.capture_end()

    def replay() -> T:
        graph.replay()
        return result

    return replay


def read_floors(loaded: list[GroupedWeight], device: torch.device) -> dict[str, Callable[[], Any]]:
    """Replays of kernels that only read the weights, by block size; none on a CPU."""
    if device.type != "cuda":
        return {}
    from graphs.bench.wo_a.read_floor import SIZES, launch_read

    replays: dict[str, Callable[[], Any]] = {}
    for size in SIZES:
        sink = torch.zeros(loaded[0].data.nbytes // size, dtype=torch.int32, device=device)

        def read(size: int = size, sink: Tensor = sink) -> None:
            for weight in loaded:
                launch_read(weight.data, sink, size)

        replays[f"{FLOOR}, {size}"] = record_graph(read, device)
    return replays
