"""What a captured call costs beyond the replay of a bare graph of the same work, held against limits.

The bare graph is an independent ``torch.cuda.CUDAGraph`` with static inputs: nothing is copied in or out, nothing is
checked. `graphs.bench.compile.compiled` holds the comparisons with ``torch.compile``.
"""

from __future__ import annotations

import functools

import torch

import graphs
from graphs.bench.compile import compiled
from graphs.bench.decode.bare import bare_graph, bare_step, same_output
from graphs.bench.decode.llama import TOY, Decoding, LlamaSize, build_llama, size_for
from graphs.bench.decode.measure import compare_tokens
from graphs.bench.harness.machine import describe_machine
from graphs.bench.harness.progress import Progress
from graphs.bench.harness.rows import BarRow
from graphs.bench.harness.sampling import Spread, Variant, host_microseconds, ratios, time_variants
from graphs.bench.settings import BenchSettings

Tensor = torch.Tensor
BATCH = 4
CALLS_PER_DRAIN = 50  # far below the depth of a launch queue, so that the host never waits
MIN_DRAINS = 8
CALL_LIMIT_US = 20.0
DEVICE_LIMIT = 1.02


def measure_bars(settings: BenchSettings, progress: Progress) -> list[BarRow]:
    """Every bar that this machine can measure."""
    bars = []
    if settings.device.type == "cuda":
        bars.append(call_bar(settings, progress))
        size = size_for(settings.device)
        decoding_of = functools.partial(Decoding, size=size, batch=BATCH, device=settings.device)
        model = build_llama(size, settings.device)
        bars.append(device_bar(model, decoding_of(model), settings, progress))
        bars += compiled.measure_bars(model, decoding_of(model), settings, progress)
    bars.append(tape_bar(settings, progress))
    return bars


def small_step(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """A handful of small kernels on four tensors: the host's part of a call is all there is to see."""
    return torch.nn.functional.silu(a * b + c) * d - a


def small_arguments(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four tensors ``[4, 256]``."""
    generator = torch.Generator(device).manual_seed(0)
    a, b, c, d = torch.randn(4, 4, 256, generator=generator, device=device)
    return a.clone(), b.clone(), c.clone(), d.clone()


def call_bar(settings: BenchSettings, progress: Progress) -> BarRow:
    """Host time of a captured call with four tensor arguments and one output, less that of a bare replay."""
    device, arguments = settings.device, small_arguments(settings.device)
    step = graphs.capture(small_step)
    same_output(step(*arguments), small_step(*arguments), "a captured call of small kernels")
    graph, _ = bare_graph(functools.partial(small_step, *arguments))
    drains = max(MIN_DRAINS, settings.runs)
    captured: list[float] = []
    bare: list[float] = []
    with progress.case(f"captured call and bare replay, {drains * CALLS_PER_DRAIN} calls each", 2 * drains + 2) as tick:
        for turn in range(drains + 1):  # the first turn is the warm-up
            for call, samples in ((functools.partial(step, *arguments), captured), (graph.replay, bare)):
                found = host_microseconds(call, device, CALLS_PER_DRAIN)
                samples += found if turn else []
                tick()
    return BarRow(
        name="captured call over bare replay, host (4 tensors in, 1 out)",
        bar=f"at most +{CALL_LIMIT_US:g} us, goal +8 us",
        unit="us",
        measured=Spread.of([a - b for a, b in zip(captured, bare, strict=True)]),
        limit=CALL_LIMIT_US,
        at_least=False,
        sides={"captured": Spread.of(captured), "bare": Spread.of(bare)},
        device=describe_machine(device).device,
    )


def device_bar(model: torch.nn.Module, decoding: Decoding, settings: BenchSettings, progress: Progress) -> BarRow:
    """Device time of a captured Llama step against the bare replay of a graph of the same model."""
    step = graphs.capture(model)
    decoding.reset()
    compare_tokens(decoding, step, 4)
    graph = bare_step(model, decoding)
    step.mode = "graph"
    variants = {
        "captured": Variant(functools.partial(decoding.first_step, step), decoding.reset),
        "bare": Variant(graph.replay, decoding.reset),
    }
    with progress.case(f"Llama step, batch {decoding.batch}, and its bare replay", 2 * (settings.runs + 3)) as tick:
        times = time_variants(variants, settings.device, runs=settings.runs, tick=tick)
    return BarRow(
        name=f"captured Llama step over bare replay, device (batch {decoding.batch})",
        bar=f"at most {DEVICE_LIMIT:g}x",
        unit="x",
        measured=Spread.of(ratios(times["captured"].device_us, times["bare"].device_us)),
        limit=DEVICE_LIMIT,
        at_least=False,
        sides={name: Spread.of(samples.device_us) for name, samples in times.items()},
        device=describe_machine(settings.device).device,
    )


def tape_bar(settings: BenchSettings, progress: Progress, size: LlamaSize = TOY) -> BarRow:
    """A CPU step from the tape against the same step eager. Measured on the CPU of every machine."""
    device = torch.device("cpu")
    model = build_llama(size, device)
    decoding = Decoding(model, size, 1, device)
    step = graphs.capture(model)
    compare_tokens(decoding, step, 4)
    step.mode = "graph"
    variants = {
        "eager": Variant(functools.partial(decoding.first_step, model), decoding.reset),
        "tape": Variant(functools.partial(decoding.first_step, step), decoding.reset),
    }
    with progress.case(f"{size.name} on the CPU, eager and from the tape", 2 * (settings.runs + 3)) as tick:
        times = time_variants(variants, device, runs=settings.runs, tick=tick)
    return BarRow(
        name=f"eager over tape replay, {size.name}, CPU (batch 1)",
        bar="faster: above 1x",
        unit="x",
        measured=Spread.of(ratios(times["eager"].host_us, times["tape"].host_us)),
        limit=1.0,
        at_least=True,
        sides={name: Spread.of(samples.host_us) for name, samples in times.items()},
        device=describe_machine(device).device,
    )
