"""Steps whose host syncs the passes take out: against the same step written without any, and against the original.

Two bars for each pattern of `graphs.bench.syncs.patterns`. *Device*: what the recorded, rewritten step costs on the device,
over the recording of the version by hand. *Wall*: eager original over captured step, in a loop that waits for each step,
against what the removed syncs predict. An eager step is a chain of segments with a sync behind each but the last: a segment
takes as long as the longer of its device work and the issuing of its launches, and each sync adds a round trip. With the
device time spread evenly over the launches that is::

    eager = max(device, launches * issue) + (syncs + 1) * drain    # all constants measured in the same run
    captured = call + device + drain
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

import graphs
from graphs.bench.harness.machine import describe_machine
from graphs.bench.harness.progress import Progress
from graphs.bench.harness.rows import BarRow, WrongResult
from graphs.bench.harness.sampling import Spread, Variant, ratios, time_variants, wall_variants
from graphs.bench.settings import BenchSettings
from graphs.bench.syncs.patterns import DECODE, PATTERNS, TOY_SYNCS, Pattern, SyncSizes
from graphs.config import Compiler
from graphs.observation.launches import count_launches

Tensor = torch.Tensor
DEVICE_LIMIT = 1.15
PREDICTED_SHARE = 0.75  # of the predicted factor that has to be reached: the model knows no queue
CALLS = 12  # calls that are compared before anything is timed; also those of one wall measurement
COMPILERS: tuple[Compiler, ...] = ("none", "inductor")
_LAUNCHES = 400


@dataclasses.dataclass(frozen=True)
class Constants:
    """What the host needs to issue one small kernel, to wait for an idle device, and for one captured call, microseconds."""

    issue_us: float
    drain_us: float
    call_us: float


@dataclasses.dataclass
class Steps:
    """One pattern ready to be timed, with the arguments of `CALLS` calls."""

    pattern: Pattern
    eager: torch.nn.Module
    written: Any
    by_hand: Any
    calls: list[tuple[Tensor, ...]]


def measure_syncs(settings: BenchSettings, progress: Progress) -> list[BarRow]:
    """Every bar. On a CPU, where nothing waits, only the first: the time of the tapes.

    Raises:
        WrongResult: a version computes something else than the original, or was not replayed.
    """
    on_gpu = settings.device.type == "cuda"
    sizes = DECODE if on_gpu else TOY_SYNCS
    constants = measure_constants(settings.device) if on_gpu else None
    bars = []
    for pattern in PATTERNS:
        for compiler in COMPILERS if on_gpu and not settings.quick else COMPILERS[:1]:
            steps = prepare(pattern, sizes, settings.device, compiler, progress)
            bars.append(rewritten_bar(steps, compiler, settings, progress))
            if constants is not None and compiler == "none":
                bars.append(factor_bar(steps, constants, settings, progress))
            del steps
    return bars


def measure_constants(device: torch.device) -> Constants:
    """Medians over runs: launches and captured calls in a row without waiting, and a read of a number that is ready."""
    x = torch.zeros(8, device=device)
    step: Any = graphs.capture(lambda x: x + 1)
    step(x)

    def median_us(call: Callable[[], Any], calls: int) -> float:
        return statistics.median(_mean_us(call, calls, device) for _ in range(9))

    issue, drain = median_us(lambda: x.add_(1), _LAUNCHES), median_us(lambda: x[0].item(), 20)
    return Constants(issue, max(0.0, drain - issue), median_us(lambda: step(x), 20))


def _mean_us(call: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Microseconds of the host per call, of calls in a row that begin with an idle device."""
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) * 1e6 / calls


def prepare(pattern: Pattern, sizes: SyncSizes, device: torch.device, compiler: Compiler, progress: Progress) -> Steps:
    """The three versions with the same weights, recorded, and compared over `CALLS` calls.

    Raises:
        WrongResult: see `measure_syncs`.
    """
    torch.manual_seed(0)
    with torch.device(device):
        eager = pattern.written(sizes).eval()
        steps = [pattern.written(sizes).eval(), pattern.by_hand(sizes).eval()]
    for step in steps:
        share_parameters(step, eager)
    written, by_hand = (graphs.capture(step, compiler=compiler) for step in steps)
    generator = torch.Generator(device).manual_seed(1)
    calls = [pattern.arguments(sizes, generator, call) for call in range(CALLS)]
    with progress.case(f"{pattern.name}, recording and comparing", CALLS) as tick, torch.no_grad():
        for call in calls:
            expected = eager(*call)
            for version, captured in (("rewritten", written), ("by hand", by_hand)):
                _same(captured(*call), expected, f"{pattern.name}, {version},")
            tick()
    for recorded in (written, by_hand):
        _require_replays(recorded, pattern.name)
    return Steps(pattern, eager, written, by_hand, calls)


def share_parameters(step: torch.nn.Module, other: torch.nn.Module) -> None:
    """Use the same weights; caches stay each step's own."""
    for name, parameter in other.named_parameters():
        setattr(step, name, parameter)


def _same(found: Tensor, expected: Tensor, what: str) -> None:
    if not found.is_floating_point():
        if not torch.equal(found, expected):
            raise WrongResult(f"{what} gives {found.tolist()}, expected {expected.tolist()}")
        return
    limit = (2e-2 if expected.dtype == torch.bfloat16 else 1e-4) * float(expected.abs().max())
    error = float((found.float() - expected.float()).abs().max())
    if not error <= limit:
        raise WrongResult(f"{what} differs from the original by {error:.3g}, limit {limit:.3g}")


def _require_replays(step: Any, name: str) -> None:
    report = step.report()
    if report.refusals or len(report.keys) != 1:
        raise WrongResult(f"{name} was not recorded once and for all:\n{report}")


def rewritten_bar(steps: Steps, compiler: Compiler, settings: BenchSettings, progress: Progress) -> BarRow:
    """Device time (host time on a CPU) of the rewritten step over that of the one by hand."""
    variants = {
        name: Variant(_replay_of(step, steps.calls[0]))
        for name, step in (("rewritten", steps.written), ("by hand", steps.by_hand))
    }
    title = f"{steps.pattern.name}, rewritten and by hand, compiler {compiler}"
    with progress.case(title, 2 * (settings.runs + 3)) as tick, torch.no_grad():
        times = time_variants(variants, settings.device, runs=settings.runs, tick=tick)
    sides = {name: samples.device_us or samples.host_us for name, samples in times.items()}
    return BarRow(
        name=f"rewritten over by hand, {'device' if settings.device.type == 'cuda' else 'tape'}: {steps.pattern.name}"
        + (f", compiler={compiler}" if compiler != "none" else ""),
        bar=f"at most {DEVICE_LIMIT:g}x",
        unit="x",
        measured=Spread.of(ratios(sides["rewritten"], sides["by hand"])),
        limit=DEVICE_LIMIT,
        at_least=False,
        sides={name: Spread.of(samples) for name, samples in sides.items()},
        device=describe_machine(settings.device).device,
    )


def _replay_of(step: Any, arguments: tuple[Tensor, ...]) -> Callable[[], Any]:
    """The replay inside a call, without the host's wait for its answer: that is no device time, and is in the wall time."""
    ((entry, rows),) = step._graphs_recordings.routes.by_signature.values()
    return functools.partial(entry.recording.replay, list(arguments), rows)


def factor_bar(steps: Steps, constants: Constants, settings: BenchSettings, progress: Progress) -> BarRow:
    """Wall time of the eager original over the captured step, each step waited for, against the prediction."""
    device = settings.device
    variants = {"eager": steps.eager, "captured": steps.written}
    timed = {name: Variant(functools.partial(_loop, step, steps.calls, device)) for name, step in variants.items()}
    syncs = count_syncs(functools.partial(steps.eager, *steps.calls[0]), device)
    with progress.case(f"{steps.pattern.name}, eager and captured", 2 * (settings.runs + 1)) as tick, torch.no_grad():
        walls = wall_variants(timed, device, runs=settings.runs, tick=tick)
        single = {"device": Variant(_replay_of(steps.written, steps.calls[0]))}
        times = time_variants(single, device, runs=5)
        launches = count_launches(functools.partial(steps.eager, *steps.calls[0]), device) or 0
    predicted = predicted_factor(statistics.median(times["device"].device_us), launches, syncs, constants)
    costs = f"issue {constants.issue_us:.1f} us, drain {constants.drain_us:.1f} us, captured call {constants.call_us:.1f} us"
    detail = f"{syncs} syncs, {launches} launches, {costs}"
    return BarRow(
        name=f"eager original over captured, wall: {steps.pattern.name} ({detail}; predicted {predicted:.2f}x)",
        bar=f"at least {PREDICTED_SHARE:g} of the predicted {predicted:.2f}x",
        unit="x",
        measured=Spread.of(ratios(walls["eager"], walls["captured"])),
        limit=PREDICTED_SHARE * predicted,
        at_least=True,
        sides={name: Spread.of(seconds, 1e6 / CALLS) for name, seconds in walls.items()},
        device=describe_machine(device).device,
    )


def predicted_factor(device_us: float, launches: int, syncs: int, constants: Constants) -> float:
    """Eager over captured, from the formula above; the recording's device time stands for both, since it does the same work."""
    eager = max(device_us, launches * constants.issue_us) + (syncs + 1) * constants.drain_us
    return eager / (constants.call_us + device_us + constants.drain_us)


def _loop(step: Callable[..., Any], calls: list[tuple[Tensor, ...]], device: torch.device) -> None:
    for call in calls:
        step(*call)
        torch.cuda.synchronize(device)


def count_syncs(call: Callable[[], Any], device: torch.device) -> int:
    """How often one eager call makes the host wait, as torch's own debug mode counts it."""
    torch.cuda.synchronize(device)
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as seen, torch.no_grad():
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing CUDA operation" in str(one.message) for one in seen)
