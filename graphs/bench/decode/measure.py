"""Decoding with a Hugging Face Llama, eager against replayed: same tokens first, then times."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

import graphs
from graphs.bench.decode.llama import Decoding, LlamaSize, build_llama, size_for
from graphs.bench.harness.progress import Progress
from graphs.bench.harness.rows import MODES, BenchRow, Case, WrongResult, with_capture_cost
from graphs.bench.harness.sampling import Samples, Spread, Variant, time_variants, wall_variants
from graphs.bench.settings import BenchSettings

_WARM_UP = 3


def measure_decode(settings: BenchSettings, progress: Progress) -> list[Case]:
    """Time decode steps at several batch sizes; one `Case` per batch size."""
    size = size_for(settings.device)
    model = build_llama(size, settings.device)
    step = graphs.capture(model)
    steps = 8 if settings.quick else 32
    return [_measure_batch(model, step, size, batch, steps, settings, progress) for batch in batch_sizes(settings)]


def batch_sizes(settings: BenchSettings) -> tuple[int, ...]:
    """The batch sizes of a run."""
    sizes = (1, 4, 16, 64) if settings.device.type == "cuda" else (1, 4, 16)
    return sizes[:2] if settings.quick else sizes


def _measure_batch(
    model: torch.nn.Module, step: Any, size: LlamaSize, batch: int, steps: int, settings: BenchSettings, progress: Progress
) -> Case:
    decoding = Decoding(model, size, batch, settings.device)
    compare_tokens(decoding, step, steps)
    one = {mode: functools.partial(decoding.first_step, step) for mode in MODES}
    loop = {mode: functools.partial(decoding.generate, step, steps) for mode in MODES}
    ticks = len(MODES) * (2 * settings.runs + _WARM_UP + 1)
    with progress.case(f"decode, batch {batch}: {size.name}, {steps} tokens, {settings.runs} runs", ticks) as tick:
        times = time_variants(_variants(decoding, step, one), settings.device, runs=settings.runs, warm_up=_WARM_UP, tick=tick)
        loops = wall_variants(_variants(decoding, step, loop), settings.device, runs=settings.runs, tick=tick)
    hosts = _host_times(decoding, step, steps, settings.runs)
    times = {mode: Samples(hosts[mode], times[mode].device_us) for mode in MODES}
    key = step.report().keys[-1]
    eager, graph = (_row(size.name, batch, mode, times[mode], [batch * steps / s for s in loops[mode]]) for mode in MODES)
    rows = with_capture_cost(eager, graph, key.capture_seconds, key.pool_bytes)
    return Case(rows, {mode: functools.partial(_counted, decoding, step, mode) for mode in MODES})


def compare_tokens(decoding: Decoding, step: Any, steps: int) -> None:
    """Decode ``steps`` tokens in both modes; leaves a recording behind.

    Raises:
        WrongResult: the tokens differ, or graph mode did not replay.
    """
    tokens = {}
    replays = step.report().replays
    for mode in MODES:
        decoding.reset()
        step.mode = mode
        tokens[mode] = decoding.generate(step, steps)
    report = step.report()
    if report.replays - replays < steps:
        raise WrongResult(f"only {report.replays - replays} of {steps} decode steps were replayed:\n{report}")
    wrong = (tokens["eager"] != tokens["graph"]).nonzero()
    if len(wrong):
        sequence, position = wrong[0].tolist()
        eager, graph = (int(tokens[mode][sequence, position]) for mode in MODES)
        raise WrongResult(
            f"batch {decoding.batch}: token {position} of sequence {sequence} is {eager} eager and {graph} replayed "
            f"({len(wrong)} of {tokens['eager'].numel()} tokens differ)"
        )


def _variants(decoding: Decoding, step: Any, calls: Mapping[str, Callable[[], Any]]) -> dict[str, Variant]:
    return {mode: Variant(call, functools.partial(_prepare, decoding, step, mode)) for mode, call in calls.items()}


def _host_times(decoding: Decoding, step: Any, steps: int, runs: int) -> dict[str, list[float]]:
    """Host time per step in a decode loop: of each of ``runs`` loops, the median of its steps, the modes taking turns."""
    result: dict[str, list[float]] = {mode: [] for mode in MODES}
    for turn in range(runs + 1):  # the first turn is the warm-up
        for mode in MODES:
            step.mode = mode
            found = statistics.median(decoding.host_microseconds(step, steps))
            result[mode] += [found] if turn else []
    return result


def _prepare(decoding: Decoding, step: Any, mode: str) -> None:
    step.mode = mode
    decoding.reset()


def _counted(decoding: Decoding, step: Any, mode: str) -> None:
    step.mode = mode
    decoding.first_step(step)


def _row(case: str, batch: int, mode: str, times: Samples, rates: list[float]) -> BenchRow:
    return BenchRow(
        workload="decode",
        case=case,
        rows=batch,
        mode=mode,
        operations=1,
        host_us=Spread.of(times.host_us),
        device_us=Spread.of(times.device_us) if times.device_us else None,
        tokens_per_second=Spread.of(rates),
    )
