"""The grouped output projection: every path and every installed peer, eager and replayed, in one run.

An operation is one of a stack of projections, each with weights of its own and together larger than the cache of a GPU, so that
every projection reads its weight from memory as it does in a model. All figures are per projection. On a GPU graph mode is a bare
device graph of the stack (what a captured call adds to one is another experiment); on a CPU it is the operator tape.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from graphs.bench.choices import OURS, PATHS, PEERS
from graphs.bench.harness.progress import Progress
from graphs.bench.harness.rows import MODES, BarRow, BenchRow, Case, WrongResult, with_capture_cost
from graphs.bench.harness.sampling import Samples, Spread, Variant, time_variants
from graphs.bench.settings import BenchSettings
from graphs.bench.wo_a.bars import FLOOR, bars_of
from graphs.bench.wo_a.paths import TOLERANCE, absent
from graphs.bench.wo_a.record import ProjectionStack, Recorded, read_floors, record
from graphs.ops import GroupedWeight
from graphs.ops.wo_a import reference, weights

Tensor = torch.Tensor
CASE_SECONDS = 2.5  # one G and M is measured no longer than this, with fewer runs where it has to be
FEWEST_RUNS = 7
_WARM_UP = 2


@dataclass(frozen=True)
class Selection:
    """``o [M, G, K]`` times ``layers(G)`` weights ``[G, N, K]``, for each G, M and path."""

    name: str
    groups: tuple[int, ...]
    k: int
    n: int
    tokens: tuple[int, ...]
    paths: tuple[str, ...]
    layers: Callable[[int], int]

    def describe(self) -> str:
        """One line for the report."""
        layers = ", ".join(f"{self.layers(groups)} (G={groups})" for groups in self.groups)
        return f"{self.name}: K={self.k}, N={self.n}, weights read in turn: {layers}"


def _layers(groups: int) -> int:
    return 32 if groups <= 2 else 16


V4 = Selection("wo_a at the shapes of DeepSeek-V4", (2, 8, 16), 4096, 1024, (1, 4, 16, 64, 256, 1024), PATHS, _layers)
SMALL = Selection("wo_a at reduced shapes", (2, 8), 512, 256, (1, 4, 16), PATHS, lambda groups: 4 if groups <= 2 else 2)


def selection_for(settings: BenchSettings, experiment: str = "wo_a") -> Selection:
    """What is measured: all of it by itself, our own paths at the smallest G as a part of ``all``; less where asked for."""
    full = V4 if settings.device.type == "cuda" else SMALL
    whole = experiment == "wo_a"
    groups = settings.groups or (full.groups if whole else full.groups[:1])
    tokens = settings.tokens or (full.tokens[:2] if settings.quick else full.tokens)
    paths = settings.paths or (full.paths if whole else OURS)
    return Selection(full.name, groups, full.k, full.n, tokens, paths, full.layers)


class Measured(NamedTuple):
    """What a run found: rows, the bars they are held to, and what was left out."""

    cases: list[Case]
    bars: list[BarRow]
    notes: list[str]


def measure_wo_a(settings: BenchSettings, progress: Progress, selection: Selection) -> Measured:
    """Time every path that is there at every G and M.

    Raises:
        WrongResult: a path of ours computes something else, or was not replayed. A peer of which that is true is left out.
    """
    measured = Measured([], [], [])
    paths = [path for path in selection.paths if absent(path, settings.device) is None]
    for groups in selection.groups:
        loaded = make_weights(selection, groups, settings.device)
        stacks = [ProjectionStack(loaded, path) for path in paths]
        for tokens in selection.tokens:
            with torch.no_grad():
                o = activations(tokens, groups, selection.k, settings.device)
                found = _measure(stacks, loaded, o, settings, progress)
            measured.cases.extend(found.cases)
            measured.bars.extend(found.bars)
            measured.notes.extend(found.notes)
    return measured


def make_weights(selection: Selection, groups: int, device: torch.device) -> list[GroupedWeight]:
    """Random FP8 weights with a scale per 128x128 block, as a checkpoint holds them."""
    generator = torch.Generator(device).manual_seed(groups)
    shape = (groups, selection.n, selection.k)
    dense = (torch.randn(shape, generator=generator, device=device) / selection.k**0.5 for _ in range(selection.layers(groups)))
    return [weights.load(*reference.quantise_blocks(w)) for w in dense]


def activations(tokens: int, groups: int, k: int, device: torch.device) -> Tensor:
    """Random ``o [M, G, K]`` in bfloat16."""
    generator = torch.Generator(device).manual_seed(tokens)
    return torch.randn(tokens, groups, k, generator=generator, device=device).bfloat16()


def exact_results(loaded: list[GroupedWeight], o: Tensor) -> dict[int, Tensor]:
    """The projection in float64 by the first and by the last weight."""
    results = {}
    for index in {0, len(loaded) - 1}:
        weight = loaded[index]
        assert weight.scale is not None  # `make_weights` quantises all of them
        results[index] = reference.project_fp64(o, reference.dequantise_blocks(weight.data, weight.scale, torch.float64))
    return results


def check(stack: ProjectionStack, replayed: Tensor, o: Tensor, exact: Mapping[int, Tensor]) -> float:
    """Largest relative error against float64 of what was called and what was replayed.

    Raises:
        WrongResult: an error above `TOLERANCE`.
    """
    last = len(stack.projections) - 1
    results = [(stack.projections[index](o), y) for index, y in exact.items()] + [(replayed, exact[last])]
    worst = max(reference.relative_error(found, expected) for found, expected in results)
    if not worst <= TOLERANCE[stack.path]:
        limit = TOLERANCE[stack.path]
        raise WrongResult(f"path {stack.path}, M={len(o)}: relative error {worst:.3g} against float64, limit {limit}")
    return worst


@dataclass(frozen=True)
class Prepared:
    """A path at one G and M, ready to be timed."""

    stack: ProjectionStack
    first_call: float
    recorded: Recorded
    error: float

    @property
    def path(self) -> str:
        """Its name."""
        return self.stack.path


def _prepare(stack: ProjectionStack, o: Tensor, exact: Mapping[int, Tensor]) -> Prepared | str:
    """Call, record and check; for a peer that fails in any of these, the reason."""
    try:
        first_call = _first_call(stack, o)
        recorded = record(stack, o)
        return Prepared(stack, first_call, recorded, check(stack, recorded.replay(), o, exact))
    except Exception as error:  # another project's code: its failure must not cost the other rows
        if stack.path not in PEERS:
            raise
        return f"{stack.path} was left out at G={o.shape[1]} M={len(o)}: {type(error).__name__}: {str(error)[:200]}"


def _measure(
    stacks: list[ProjectionStack], loaded: list[GroupedWeight], o: Tensor, settings: BenchSettings, progress: Progress
) -> Measured:
    """One G and M: all paths and modes take turns, so that every ratio is of one time."""
    exact = exact_results(loaded, o)
    tried = [_prepare(stack, o, exact) for stack in stacks]
    del exact
    ready = [found for found in tried if isinstance(found, Prepared)]
    calls: dict[str, Callable[[], Any]] = {}
    for one in ready:
        calls[key(one.path, "eager")] = functools.partial(one.stack, o)
        calls[key(one.path, "graph")] = one.recorded.replay
    calls |= read_floors(loaded, o.device)
    name = f"wo_a, G={o.shape[1]}, M={len(o)}: {', '.join(one.path for one in ready)}"
    with progress.case(name, settings.runs) as tick:
        times = time_calls(calls, settings, tick)
    cases = [_case(one, o, times, calls) for one in ready]
    cases += [Case((row,), {}) for row in _floor_row(times, o, loaded)]
    bars = _bars(ready, o, times, settings.device)
    return Measured(cases, bars, [found for found in tried if isinstance(found, str)])


def _case(one: Prepared, o: Tensor, times: Mapping[str, Samples], calls: Mapping[str, Callable[[], Any]]) -> Case:
    made = functools.partial(_row, one.path, len(one.stack.projections), one.stack.weight_bytes, o)
    eager, graph = (made(mode, times[key(one.path, mode)], one.error, one.first_call) for mode in MODES)
    counted: tuple[str, ...] = MODES
    if o.is_cuda:  # a device graph is submitted at once; what a tape dispatches has to be counted
        graph, counted = dataclasses.replace(graph, launches=1), MODES[:1]
    rows = with_capture_cost(eager, graph, one.recorded.seconds, one.recorded.pool_bytes)
    return Case(rows, {mode: calls[key(one.path, mode)] for mode in counted})


def _bars(ready: list[Prepared], o: Tensor, times: Mapping[str, Samples], device: torch.device) -> list[BarRow]:
    """Errors and sizes; on a GPU, which the limits on times are meant for, times too."""
    taken: dict[str, list[float]] = {}
    if o.is_cuda:
        share = 1 / len(ready[0].stack.projections) if ready else 1.0
        named: dict[str, str] = {one.path: key(one.path, "graph") for one in ready}
        named |= {FLOOR: floor for floor in _fastest_floor(times)}  # noqa: B035 (none or one)
        taken = {path: [us * share for us in times[name].call_us] for path, name in named.items()}
    errors = {one.path: one.error for one in ready}
    return bars_of(o.shape[1], len(o), taken, errors, {one.path: one.stack.weight_bytes for one in ready}, str(device))


def time_calls(
    calls: Mapping[str, Callable[[], Any]], settings: BenchSettings, tick: Callable[[], None] = lambda: None
) -> dict[str, Samples]:
    """Samples of each call, all taking turns, ``settings.runs`` times or as often as `CASE_SECONDS` allow."""
    variants = {name: Variant(call) for name, call in calls.items()}
    start = time.perf_counter()
    time_variants(variants, settings.device, runs=0, warm_up=_WARM_UP)
    turn = (time.perf_counter() - start) / _WARM_UP
    runs = min(settings.runs, max(FEWEST_RUNS, int(CASE_SECONDS / turn)))
    return time_variants(variants, settings.device, runs=runs, warm_up=0, tick=tick)


def key(path: str, mode: str) -> str:
    """The name of one path in one mode among the things that take turns."""
    return f"{path}, {mode}"


def _fastest_floor(times: Mapping[str, Samples]) -> list[str]:
    """The name of the fastest of the kernels that only read; nothing where there are none."""
    floors = [name for name in times if name.startswith(FLOOR)]
    return [min(floors, key=lambda name: Spread.of(times[name].call_us).median)] if floors else []


def _floor_row(times: Mapping[str, Samples], o: Tensor, loaded: list[GroupedWeight]) -> list[BenchRow]:
    return [_row(FLOOR, len(loaded), loaded[0].data.nbytes, o, "graph", times[name]) for name in _fastest_floor(times)]


def _first_call(stack: ProjectionStack, o: Tensor) -> float:
    """Seconds of the first call with this M: compilation and tuning, as far as no cache on disk had them."""
    start = time.perf_counter()
    stack.projections[0](o)
    if o.is_cuda:
        torch.cuda.synchronize(o.device)
    return time.perf_counter() - start


def _row(
    path: str,
    layers: int,
    weight_bytes: int,
    o: Tensor,
    mode: str,
    times: Samples,
    error: float | None = None,
    first_call: float = 0.0,
) -> BenchRow:
    return BenchRow(
        workload="wo_a",
        case=path,
        rows=len(o),
        mode=mode,
        operations=layers,
        host_us=Spread.of(times.host_us, 1 / layers),
        device_us=Spread.of(times.device_us, 1 / layers) if times.device_us else None,
        tokens_per_second=Spread.of([len(o) * layers * 1e6 / us for us in times.call_us]),
        error=error,
        groups=o.shape[1],
        weight_bytes=weight_bytes,
        first_call_seconds=first_call,
    )
