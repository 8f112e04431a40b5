"""The bars that involve ``torch.compile``: one Llama step, captured eager and captured compiled."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch

import graphs
from graphs.bench.decode.bare import OTHER_KERNELS, bare_step, same_output
from graphs.bench.decode.llama import Decoding
from graphs.bench.harness.machine import describe_machine
from graphs.bench.harness.progress import Progress
from graphs.bench.harness.rows import BarRow, WrongResult
from graphs.bench.harness.sampling import Spread, Variant, ratios, wall_variants
from graphs.bench.settings import BenchSettings

STEPS = 32  # steps issued back to back between two waits
HOST_LIMIT = 10.0
WALL_LIMIT = 1.03
_FIRST_CALLS = 5  # compiling, and the recordings of reduce-overhead, take the first few


def measure_bars(model: torch.nn.Module, decoding: Decoding, settings: BenchSettings, progress: Progress) -> list[BarRow]:
    """Both bars; each compiles the model once."""
    bars = []
    for bar in (wall_bar, host_bar):
        torch.compiler.reset()
        bars.append(bar(model, decoding, settings, progress))
    torch.compiler.reset()
    return bars


def wall_bar(model: torch.nn.Module, decoding: Decoding, settings: BenchSettings, progress: Progress) -> BarRow:
    """Wall time per step of the captured compiled model, against the bare replay of a graph of the compiled model."""
    compiled = torch.compile(model)
    _compile(compiled, model, decoding, progress, "torch.compile")
    step = graphs.capture(compiled)
    decoding.reset()
    decoding.same_step(step, 3)
    _replayed(step)
    graph = bare_step(compiled, decoding)
    back_to_back = {
        "captured": Variant(functools.partial(decoding.same_step, step, STEPS), decoding.reset),
        "bare": Variant(functools.partial(_repeat, graph.replay, STEPS), decoding.reset),
    }
    synced = {
        "captured": Variant(functools.partial(decoding.first_step, step), decoding.reset),
        "bare": Variant(graph.replay, decoding.reset),
    }
    with progress.case(f"captured compiled Llama step and its bare replay, {STEPS} at a time", 4 * (settings.runs + 1)) as tick:
        times = wall_variants(back_to_back, settings.device, runs=settings.runs, tick=tick)
        waits = wall_variants(synced, settings.device, runs=settings.runs, tick=tick)
    sides = {name: Spread.of(seconds, 1e6 / STEPS) for name, seconds in times.items()}
    sides |= {f"{name}, waited for": Spread.of(seconds, 1e6) for name, seconds in waits.items()}
    return BarRow(
        name=f"captured torch.compile step over bare replay, wall time per step (batch {decoding.batch})",
        bar=f"at most {WALL_LIMIT:g}x",
        unit="x",
        measured=Spread.of(ratios(times["captured"], times["bare"])),
        limit=WALL_LIMIT,
        at_least=False,
        sides=sides,
        device=describe_machine(settings.device).device,
    )


def host_bar(model: torch.nn.Module, decoding: Decoding, settings: BenchSettings, progress: Progress) -> BarRow:
    """Host time per step of ``torch.compile(mode="reduce-overhead")`` against the captured eager model."""
    step = graphs.capture(model)
    decoding.reset()
    decoding.same_step(step, 3)
    _replayed(step)
    reduced = torch.compile(model, mode="reduce-overhead")
    _compile(reduced, model, decoding, progress, "torch.compile(mode='reduce-overhead')")
    sides: dict[str, list[float]] = {"reduce-overhead": [], "captured": []}
    with progress.case(f"Llama step, reduce-overhead and captured, {STEPS} in a row", 2 * (settings.runs + 1)) as tick:
        for turn in range(settings.runs + 1):  # the first turn is the warm-up
            for name, callee, before in (
                ("reduce-overhead", reduced, torch.compiler.cudagraph_mark_step_begin),
                ("captured", step, _nothing),
            ):
                found = statistics.median(decoding.host_microseconds(callee, STEPS, before))
                sides[name] += [found] if turn else []
                tick()
    return BarRow(
        name=f"reduce-overhead over captured eager Llama step, host (batch {decoding.batch})",
        bar=f"at least {HOST_LIMIT:g}x",
        unit="x",
        measured=Spread.of(ratios(sides["reduce-overhead"], sides["captured"])),
        limit=HOST_LIMIT,
        at_least=True,
        sides={name: Spread.of(samples) for name, samples in sides.items()},
        device=describe_machine(settings.device).device,
    )


def _compile(compiled: Callable[..., Any], model: torch.nn.Module, decoding: Decoding, progress: Progress, name: str) -> None:
    """Call a compiled model until it has settled, and compare it with the model.

    Raises:
        WrongResult: it still compiles at each call (so its times would be those of eager), or its logits are wrong.
    """
    decoding.reset()
    expected = decoding.first_step(model)
    with progress.case(f"compiling the Llama step with {name}", _FIRST_CALLS) as tick:
        for _ in range(_FIRST_CALLS):
            _next_step(decoding)
            found = decoding.first_step(compiled).clone()
            tick()
    _next_step(decoding)
    try:
        with torch.compiler.set_stance("fail_on_recompile"):
            decoding.first_step(compiled)
    except RuntimeError as error:
        raise WrongResult(f"{name} compiles anew at each call: {error}") from error
    same_output(found, expected, name, OTHER_KERNELS)


def _next_step(decoding: Decoding) -> None:
    """Reset the cache and tell reduce-overhead that the outputs of the step before are not needed."""
    torch.compiler.cudagraph_mark_step_begin()
    decoding.reset()


def _nothing() -> None:
    """What has to be done between two captured steps."""


def _replayed(step: Any) -> None:
    report = step.report()
    if not report.replays or report.refusals:
        raise WrongResult(f"the step was not replayed:\n{report}")


def _repeat(call: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        call()
