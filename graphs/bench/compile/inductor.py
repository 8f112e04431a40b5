"""The bars of the compiler integration: one decode step of a Llama at two widths, called in every compiled way there is."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

import graphs
from graphs.bench.decode.bare import OTHER_KERNELS, bare_step, same_output
from graphs.bench.decode.llama import WIDE, Decoding, LlamaSize, build_llama
from graphs.bench.harness.machine import describe_machine
from graphs.bench.harness.progress import Progress
from graphs.bench.harness.rows import BarRow, WrongResult
from graphs.bench.harness.sampling import Spread, Variant, ratios, wall_variants
from graphs.bench.settings import BenchSettings
from graphs.dynamo.backend import backend_report, graphs_backend
from graphs.errors import ConfigError
from graphs.first_call.candidates import CompiledModel

BATCH = 4
STEPS = 16  # steps of one measurement, each waited for, as a loop does that looks at every token
NARROW = dataclasses.replace(WIDE, name="narrow Llama", hidden=512, intermediate=2048, heads=8, kv_heads=2)
_FIRST_CALLS = 4  # compiling, and the recordings of reduce-overhead, take the first few
BARE, OURS = "bare graph", "bare graph of the same kernels"
CAPTURED, BACKEND = "captured", 'backend="graphs"'
REDUCED, SEARCHED = "reduce-overhead", "max-autotune"


def measure_compilers(settings: BenchSettings, progress: Progress, sizes: tuple[LlamaSize, ...] = (NARROW, WIDE)) -> list[BarRow]:
    """The bars at each width; with ``settings.quick`` at the first only.

    Raises:
        ConfigError: the device is no GPU.
        WrongResult: a compiled step gives other logits than the model, or was not replayed.
    """
    if settings.device.type != "cuda":
        raise ConfigError("--device", settings.device.type, "'cuda' for this experiment: it compares CUDA and HIP graphs")
    bars = []
    for size in sizes[: 1 if settings.quick else None]:
        torch.compiler.reset()
        with several_ways():
            bars += _bars(size, _wall_times(size, settings, progress), settings)
    torch.compiler.reset()
    return bars


def several_ways() -> AbstractContextManager[None]:
    """One function may be compiled in several ways."""
    limit: AbstractContextManager[None] = torch._dynamo.config.patch(recompile_limit=64)
    return limit


def _wall_times(size: LlamaSize, settings: BenchSettings, progress: Progress) -> dict[str, list[float]]:
    """Seconds per step, waited for, of each way to call the step; they take turns.

    Two ways are bare graphs: of what ``torch.compile`` makes of the model, and of what it makes of it with this project's
    passes, which are the kernels that the captured step and the backend replay.
    """
    model = build_llama(size, settings.device)
    decoding = Decoding(model, size, BATCH, settings.device)
    decoding.reset()
    expected = decoding.first_step(model).clone()
    step = graphs.capture(model, compiler="inductor")
    plain, ours = torch.compile(model, dynamic=False), CompiledModel(model, settings.device)
    callees: dict[str, Callable[..., Any]] = {
        BARE: plain,
        OURS: ours,
        CAPTURED: step,
        BACKEND: torch.compile(model, backend=graphs_backend, dynamic=False),
        REDUCED: torch.compile(model, mode="reduce-overhead", dynamic=False),
    }
    if settings.search:
        callees[SEARCHED] = torch.compile(model, mode="max-autotune", dynamic=False)
    with progress.case(f"compiling {size.name} at width {size.hidden} in {len(callees)} ways", len(callees)) as tick:
        for name, callee in callees.items():
            _settle(callee, decoding, expected, name)
            tick()
    _require_replays(step)
    calls: dict[str, Callable[[], Any]] = {name: functools.partial(decoding.first_step, way) for name, way in callees.items()}
    graphs_of = {name: bare_step(callees[name], decoding) for name in (BARE, OURS)}
    calls |= {name: graph.replay for name, graph in graphs_of.items()}
    waiting = {name: functools.partial(_waited_for, call, settings.device) for name, call in calls.items()}
    variants = {name: Variant(call, decoding.reset) for name, call in waiting.items()}
    title = f"{size.name} at width {size.hidden}, {STEPS} decode steps, each waited for"
    with progress.case(title, len(variants) * (settings.runs + 2)) as tick:
        return wall_variants(variants, settings.device, runs=settings.runs, warm_up=2, tick=tick)


def _settle(callee: Callable[..., Any], decoding: Decoding, expected: torch.Tensor, name: str) -> None:
    """Call until everything is compiled and recorded, and compare the logits with the model's."""
    for _ in range(_FIRST_CALLS):
        torch.compiler.cudagraph_mark_step_begin()
        decoding.reset()
        found = decoding.first_step(callee).clone()
    same_output(found, expected, f"the Llama step, {name},", OTHER_KERNELS)


def _waited_for(call: Callable[[], Any], device: torch.device) -> None:
    for _ in range(STEPS):
        call()
        torch.cuda.synchronize(device)


def _require_replays(step: Any) -> None:
    report, pieces = step.report(), backend_report()
    if report.refusals or any(key.compiler != "inductor" for key in report.keys) or not report.replays:
        raise WrongResult(f"the step was not replayed as compiled:\n{report}")
    if any(piece.refusals or not piece.replays for piece in pieces.pieces):
        raise WrongResult(f"a compiled graph was not replayed:\n{pieces}")


def _bars(size: LlamaSize, times: Mapping[str, list[float]], settings: BenchSettings) -> list[BarRow]:
    wide = size.hidden >= WIDE.hidden
    bar = functools.partial(_bar, size=size, times=times, device=describe_machine(settings.device).device)
    bars = [
        bar(CAPTURED, BARE, 1.03, at_least=False) if wide else None,
        bar(CAPTURED, OURS, 1.03, at_least=False) if wide else None,
        bar(CAPTURED, REDUCED, 0.83, at_least=False),
        bar(CAPTURED, SEARCHED, 0.83, at_least=False) if SEARCHED in times else None,
        bar(REDUCED, BACKEND, 1.0 if wide else 1.1, at_least=True),
    ]
    return [made for made in bars if made is not None]


def _bar(
    first: str, second: str, limit: float, *, at_least: bool, size: LlamaSize, times: Mapping[str, list[float]], device: str
) -> BarRow:
    return BarRow(
        name=f"{first} over {second}, Llama step at width {size.hidden}, waited for (batch {BATCH})",
        bar=f"at {'least' if at_least else 'most'} {limit:g}x",
        unit="x",
        measured=Spread.of(ratios(times[first], times[second])),
        limit=limit,
        at_least=at_least,
        sides={name: Spread.of(times[name], 1e6 / STEPS) for name in (first, second)},
        device=device,
    )
