"""The grouped output projection: einsum, bmm and gloop, each eager and replayed.

A step is a stack of projections, each with weights of its own and together larger than the cache of a GPU, so that every
projection reads its weight from memory as it does in a model. All figures are per projection.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

import graphs
from graphs.bench.progress import Progress
from graphs.bench.rows import MODES, BenchRow, Case, WrongResult, with_capture_cost
from graphs.bench.sampling import Samples, Spread, Variant, time_variants
from graphs.bench.settings import BenchSettings
from graphs.ops import GroupedProjection, GroupedWeight, reference, weights

Tensor = torch.Tensor
PATHS = ("einsum", "bmm", "gloop")
TOLERANCE = {"einsum": 0.01, "bmm": 0.05, "gloop": 0.05}  # relative, in the Frobenius norm; measured 0.002 and 0.026
_WARM_UP = 3


@dataclass(frozen=True)
class ProjectionSize:
    """``o [M, G, K]`` times ``layers`` weights ``[G, N, K]``, at each M of ``tokens``."""

    name: str
    layers: int
    groups: int
    k: int
    n: int
    tokens: tuple[int, ...]

    def describe(self) -> str:
        """One line for the report."""
        return f"{self.name}: G={self.groups}, K={self.k}, N={self.n}, {self.layers} weights read in turn"


V4 = ProjectionSize("wo_a at the shapes of DeepSeek-V4", 32, 2, 4096, 1024, (1, 4, 16, 64, 256))
SMALL = ProjectionSize("wo_a at reduced shapes", 4, 2, 512, 256, (1, 4, 16))


def projection_size_for(settings: BenchSettings) -> ProjectionSize:
    """The shapes that a device is measured with."""
    size = V4 if settings.device.type == "cuda" else SMALL
    return ProjectionSize(size.name, size.layers, size.groups, size.k, size.n, size.tokens[:2]) if settings.quick else size


class ProjectionStack(torch.nn.Module):
    """Projections of the same input, one after the other; returns the last result."""

    def __init__(self, loaded: list[GroupedWeight], path: str) -> None:
        super().__init__()
        self.projections = torch.nn.ModuleList(GroupedProjection(weight, path=path) for weight in loaded)

    def forward(self, o: Tensor) -> Tensor:
        """``o [M, G, K]`` gives ``[M, G, N]``."""
        for projection in self.projections:
            result: Tensor = projection(o)
        return result


def measure_wo_a(settings: BenchSettings, progress: Progress, size: ProjectionSize | None = None) -> list[Case]:
    """Time the three paths at several numbers of tokens; one `Case` per path and number."""
    size = size or projection_size_for(settings)
    loaded = make_weights(size, settings.device)
    inputs = {m: activations(m, size, settings.device) for m in size.tokens}
    cases = []
    for path in PATHS:
        stack = ProjectionStack(loaded, path)
        step = graphs.capture(stack)
        for o in inputs.values():
            with torch.no_grad():
                error = compare_with_float64(stack, step, loaded, o, path)
                cases.append(_measure(step, o, path, size, error, settings, progress))
    return cases


def make_weights(size: ProjectionSize, device: torch.device) -> list[GroupedWeight]:
    """Random FP8 weights with a scale per 128x128 block, as a checkpoint holds them."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (size.groups, size.n, size.k)
    dense = (torch.randn(shape, generator=generator, device=device) / size.k**0.5 for _ in range(size.layers))
    return [weights.load(*reference.quantise_blocks(w)) for w in dense]


def activations(tokens: int, size: ProjectionSize, device: torch.device) -> Tensor:
    """Random ``o [M, G, K]`` in bfloat16."""
    generator = torch.Generator(device).manual_seed(tokens)
    return torch.randn(tokens, size.groups, size.k, generator=generator, device=device).bfloat16()


def compare_with_float64(stack: ProjectionStack, step: Any, loaded: list[GroupedWeight], o: Tensor, path: str) -> float:
    """Largest relative error of any projection eager and of the last one replayed; leaves a recording behind.

    Raises:
        WrongResult: an error above `TOLERANCE`, or graph mode did not replay.
    """
    replays = step.report().replays
    step.mode = "graph"
    replayed = step(o)
    if step.report().replays == replays:
        raise WrongResult(f"the projections of path {path} were not replayed:\n{step.report()}")
    worst = 0.0
    for index, (weight, projection) in enumerate(zip(loaded, stack.projections, strict=True)):
        assert weight.scale is not None  # `make_weights` quantises all of them
        exact = reference.project_fp64(o, reference.dequantise_blocks(weight.data, weight.scale, torch.float64))
        found = [projection(o)] + ([replayed] if index == len(loaded) - 1 else [])
        worst = max(worst, *(reference.relative_error(y, exact) for y in found))
    if not worst <= TOLERANCE[path]:
        raise WrongResult(f"path {path}, M={len(o)}: relative error {worst:.3g} against float64, limit {TOLERANCE[path]}")
    return worst


def _measure(
    step: Any, o: Tensor, path: str, size: ProjectionSize, error: float, settings: BenchSettings, progress: Progress
) -> Case:
    calls = {mode: functools.partial(_call, step, mode, o) for mode in MODES}
    variants = {mode: Variant(functools.partial(step, o), functools.partial(setattr, step, "mode", mode)) for mode in MODES}
    ticks = len(MODES) * (settings.runs + _WARM_UP)
    with progress.case(f"wo_a {path}, M={len(o)}: {size.layers} projections, {settings.runs} runs", ticks) as tick:
        times = time_variants(variants, settings.device, runs=settings.runs, warm_up=_WARM_UP, tick=tick)
    key = step.report().keys[-1]
    eager, graph = (_row(path, len(o), mode, times[mode], size, error) for mode in MODES)
    return Case(with_capture_cost(eager, graph, key.capture_seconds, key.pool_bytes), calls)


def _call(step: Any, mode: str, o: Tensor) -> None:
    step.mode = mode
    with torch.no_grad():
        step(o)


def _row(path: str, tokens: int, mode: str, times: Samples, size: ProjectionSize, error: float) -> BenchRow:
    share = 1 / size.layers
    return BenchRow(
        workload="wo_a",
        case=path,
        rows=tokens,
        mode=mode,
        operations=size.layers,
        host_us=Spread.of(times.host_us, share),
        device_us=Spread.of(times.device_us, share) if times.device_us else None,
        tokens_per_second=Spread.of([tokens * size.layers * 1e6 / us for us in times.call_us]),
        error=error,
    )
