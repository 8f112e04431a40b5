"""What a captured module did, as plain data: printable, and JSON."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTH = 80  # columns of a table
_COUNTS = ("recordings", "replays", "eager_calls", "evictions", "moved")
_SHOWN = 4  # rewrites of a graph that are printed one by one


@dataclass(frozen=True)
class RefusalCount:
    """One reason why calls ran eagerly, and how many did: 0 for what was found beside another reason of the same calls.

    A call is counted under one reason. ``traceback`` is empty but for ``internal-error``. ``recorded`` counts the recordings that
    were made all the same: anew, at exact sizes or uncompiled; their calls were replayed.
    """

    reason: str
    operator: str
    file: str
    line: int
    detail: str
    remedy: str
    count: int
    traceback: str = ""
    recorded: int = 0


@dataclass(frozen=True)
class KeyReport:
    """One recording.

    Attributes:
        key: shapes of the tensor arguments at the recorded size.
        rows: the bucket, or None for exact sizes.
        replays: calls served.
        eager_host_us, replay_host_us: time on the host of one call, microseconds, median of a few.
        eager_device_us, replay_device_us: time from the first to the last device work of one call, with the host ahead;
            None on a CPU, where the host does the work.
        capture_seconds: everything that preceded the first replay: audit, warm-up, recording, verification.
        pool_bytes: memory the recording added to the module's pool (tape: fixed storage of intermediates).
        device_free_delta: free device memory before minus after, bytes; includes the driver's own, and what other processes on
            the device took meanwhile.
        padding_waste: share of the replayed rows that were padding.
        break_even_calls: calls after which the capture has paid for itself; None when a replay is not faster.
        compiler: what compiled the step before it was recorded, or ``"none"``.
        compile_seconds: the part of ``capture_seconds`` in which it was compiled.
        compiler_us: with ``compiler="auto"``, microseconds of one replay with each, of which the faster was kept.
        rewrites: how often each pass changed the graph before Inductor saw it, or, of a step that is recorded uncompiled, put an
            operator of this project in the place of many. Empty as well where a compile cache held what was compiled.
        proved: outcomes of removed host values that were forced and compared with eager, by kind: ``branch``, ``length``,
            ``number``.
        unproved: values of which no other outcome could be compared, by kind.
        capped: outcomes that were not tried, since a value had more than a few.
    """

    key: str
    rows: int | None
    replays: int
    eager_host_us: float | None
    eager_device_us: float | None
    replay_host_us: float | None
    replay_device_us: float | None
    capture_seconds: float
    pool_bytes: int
    device_free_delta: int
    padding_waste: float
    break_even_calls: int | None
    compiler: str = "none"
    compile_seconds: float = 0.0
    compiler_us: dict[str, float] = field(default_factory=dict)
    rewrites: dict[str, int] = field(default_factory=dict)
    proved: dict[str, int] = field(default_factory=dict)
    unproved: dict[str, int] = field(default_factory=dict)
    capped: int = 0


@dataclass(frozen=True)
class CaptureReport:
    """Counts of a captured module since it was made.

    Attributes:
        device: device of the recordings, or ``"none"``.
        mode: ``"graph"`` or ``"eager"``, as set now.
        recordings: recordings made and kept.
        replays: calls served by a recording.
        eager_calls: calls served by the model itself: refused, switched off, or the observed first call of a key.
        refusals: why calls were not replayed.
        keys: one entry per recording.
        evictions: recordings that were dropped to make room for others.
        moved: times that a recording was pointed at other tensors, instead of a step being recorded anew: a new cache, other
            weights.
        projection_bytes: bytes of the weights that the model's `graphs.GroupedProjection` modules hold, by path.
    """

    device: str
    mode: str
    recordings: int
    replays: int
    eager_calls: int
    refusals: tuple[RefusalCount, ...]
    keys: tuple[KeyReport, ...]
    projection_bytes: dict[str, int] = field(default_factory=dict)
    evictions: int = 0
    moved: int = 0

    def to_json(self, indent: int | None = 2) -> str:
        """The report as a JSON object with the attribute names as keys."""
        return json.dumps(dataclasses.asdict(self), indent=indent)

    def __str__(self) -> str:
        lines = [
            f"graphs: {self.recordings} recording(s) on {self.device}, {self.replays} replay(s), "
            f"{self.eager_calls} eager call(s), mode {self.mode}"
        ]
        if self.evictions:
            lines.append(f"  {self.evictions} recording(s) dropped to make room for others")
        if self.moved:
            lines.append(f"  pointed at other tensors: {self.moved}x")
        for key in self.keys:
            lines += _key_lines(key)
        if self.projection_bytes:
            held = ", ".join(f"{path} {size / 2**20:.1f} MiB" for path, size in self.projection_bytes.items())
            lines.append(f"  grouped projections hold: {held}")
        return "\n".join([*lines, *_refusal_lines(self.refusals)])


def merged(reports: Sequence[CaptureReport]) -> CaptureReport:
    """One report of what several captured steps of one model did; the first one tells the device and the mode."""
    first, recorded = reports[0], [report for report in reports if report.recordings]
    counts = {name: sum(getattr(report, name) for report in reports) for name in _COUNTS}
    return dataclasses.replace(
        first,
        device=recorded[0].device if recorded else first.device,
        refusals=tuple(refusal for report in reports for refusal in report.refusals),
        keys=tuple(key for report in reports for key in report.keys),
        **counts,
    )


def _key_lines(key: KeyReport) -> list[str]:
    rows = "exact sizes" if key.rows is None else f"bucket {key.rows}, {key.padding_waste:.0%} padding"
    never = "never pays" if key.eager_host_us is not None else "timed at another size"
    even = never if key.break_even_calls is None else f"pays after {key.break_even_calls} calls"
    lines = [f"  {key.key} ({rows}): {key.replays} replays, recorded in {key.capture_seconds:.2f} s, {even}"]
    if key.eager_host_us is not None and key.replay_host_us is not None:
        text = f"      host {key.eager_host_us:.0f} us eager, {key.replay_host_us:.0f} us replayed"
        if key.eager_device_us is not None and key.replay_device_us is not None:
            text += f"; device {key.eager_device_us:.0f} us eager, {key.replay_device_us:.0f} us replayed"
        lines.append(f"{text}; pool {key.pool_bytes / 2**20:.1f} MiB, device memory {key.device_free_delta / 2**20:.1f} MiB")
    if key.proved or key.unproved:
        texts = [", ".join(f"{count} {kind}" for kind, count in counts.items()) for counts in (key.proved, key.unproved)]
        lines.append(
            f"      outcomes forced and compared: {texts[0] or 'none'}; not comparable: {texts[1] or 'none'}; "
            f"left out: {key.capped}"
        )
    if key.compiler != "none" or key.compiler_us:
        compiled = f", compiled in {key.compile_seconds:.1f} s" if key.compiler != "none" else ""
        rewritten = "".join(f"; {name} {count}x" for name, count in key.rewrites.items())
        measured = ", ".join(f"{us:.0f} us with {name}" for name, us in key.compiler_us.items())
        lines.append(f"      compiler {key.compiler}{compiled}{rewritten}{measured and f'; a replay takes {measured}'}")
    elif key.rewrites:
        lines.append("      rewritten: " + ", ".join(f"{name} {count}x" for name, count in key.rewrites.items()))
    return lines


def _refusal_lines(refusals: tuple[RefusalCount, ...]) -> list[str]:
    lines = []
    for refusal in refusals:
        where = f" at {refusal.file}:{refusal.line}" if refusal.file else ""
        times = f"not replayed {refusal.count}x" if refusal.count else "" if refusal.recorded else "found as well"
        again = f"recorded otherwise {refusal.recorded}x" if refusal.recorded else ""
        times = ", ".join(filter(None, [times, again]))
        lines.append(f"  {times}: {refusal.reason}{where} [{refusal.operator}] {refusal.detail}")
        lines.append(f"      remedy: {refusal.remedy}")
        lines += [f"      {line}" for line in refusal.traceback.splitlines()]
    return lines


@dataclass(frozen=True)
class SizeReport:
    """One size that was to be recorded ahead of serving.

    Attributes:
        size: rows.
        recorded: whether there is a recording of it now.
        seconds: what making it took; 0 where it was there before.
        bytes: memory that the recording takes; see `SizesReport`.
        replay_us: time of one replay, microseconds: on the host, or on the device where that is longer. None where not measured.
        note: why there is no recording, or why it is not the one that was asked for; empty for most.
    """

    size: int
    recorded: bool
    seconds: float = 0.0
    bytes: int = 0
    replay_us: float | None = None
    note: str = ""


@dataclass(frozen=True)
class SizesReport:
    """What recording sizes ahead of serving took, the largest first.

    Attributes:
        device: where.
        memory_budget: bytes that all recordings of the step may take.
        estimated_seconds, estimated_bytes: what all sizes were said to take, from the first one; an estimate.
        sizes: one entry for each size.
    """

    device: str
    memory_budget: int
    estimated_seconds: float
    estimated_bytes: int
    sizes: tuple[SizeReport, ...]

    @property
    def seconds(self) -> float:
        """What making the recordings took."""
        return sum(size.seconds for size in self.sizes)

    @property
    def bytes(self) -> int:
        """Memory that the recordings take."""
        return sum(size.bytes for size in self.sizes)

    def to_json(self, indent: int | None = 2) -> str:
        """The report as a JSON object with the attribute names as keys."""
        return json.dumps(dataclasses.asdict(self), indent=indent)

    def __str__(self) -> str:
        recorded = sum(size.recorded for size in self.sizes)
        head = f"graphs: {recorded} of {len(self.sizes)} sizes recorded on {self.device}"
        told = f"  estimated from the first: {self.estimated_seconds:.2f} s, {self.estimated_bytes / 2**20:.1f} MiB"
        lines = [head, f"{'size':>10}{'seconds':>12}{'MiB':>12}{'replay us':>14}"]
        for size in self.sizes:
            replay = f"{size.replay_us:.1f}" if size.replay_us is not None else "-"
            measured = f"{size.seconds:>12.2f}{size.bytes / 2**20:>12.1f}{replay:>14}" if size.recorded else "  not recorded"
            lines.append(f"{size.size:>10}{measured}")
            lines += textwrap.wrap(size.note, WIDTH, initial_indent=" " * 12, subsequent_indent=" " * 12)
        budget = f"of a budget of {self.memory_budget / 2**20:.0f} MiB"
        return "\n".join([*lines, f"{'all':>10}{self.seconds:>12.2f}{self.bytes / 2**20:>12.1f}    {budget}", told])


@dataclass(frozen=True)
class PieceReport:
    """One graph that Dynamo traced for ``torch.compile(backend="graphs")``.

    Attributes:
        index: order of compilation in this process.
        name: ``graph frame/recompilation``, as Dynamo counts.
        operators: operators in the graph.
        ends: why Dynamo ended the graph; empty where the function returned.
        file, line: where it did.
        rewrites: what passes changed. Empty as well where a compile cache held the compiled graph.
        recordings: recordings kept, one for each value of symbolic sizes.
        replays: calls served by a recording.
        compiled_calls: calls served by the compiled function.
        refusals: why.
        moved: times that a recording was pointed at other tensors.
    """

    index: int
    name: str
    device: str
    compiler: str
    operators: int
    ends: str
    file: str
    line: int
    rewrites: tuple[str, ...]
    recordings: int
    replays: int
    compiled_calls: int
    capture_seconds: float
    pool_bytes: int
    refusals: tuple[RefusalCount, ...]
    moved: int = 0

    def __str__(self) -> str:
        lines = [
            f"{self.name}: {self.operators} operators on {self.device}, {self.compiler}; {self.recordings} recording(s) in "
            f"{self.capture_seconds:.2f} s, {self.replays} replay(s), {self.compiled_calls} compiled call(s), "
            f"pool {self.pool_bytes / 2**20:.1f} MiB",
        ]
        if self.moved:
            lines.append(f"  pointed at other tensors: {self.moved}x")
        lines += [f"  {rewrite}" for rewrite in self.rewrites[:_SHOWN]]
        left = Counter(rewrite.partition(":")[0] for rewrite in self.rewrites[_SHOWN:])
        lines += [f"  {name}: {count} more, in `rewrites`" for name, count in left.items()]
        if self.ends:
            lines.append(f"  ended by a graph break at {self.file}:{self.line}: {self.ends}")
        return "\n".join([*lines, *_refusal_lines(self.refusals)])


@dataclass(frozen=True)
class BackendReport:
    """The graphs that were compiled with ``backend="graphs"``, in order."""

    pieces: tuple[PieceReport, ...]

    def to_json(self, indent: int | None = 2) -> str:
        """The report as a JSON object with the attribute names as keys."""
        return json.dumps(dataclasses.asdict(self), indent=indent)

    def __str__(self) -> str:
        return "\n".join([f"graphs: {len(self.pieces)} compiled graph(s)", *map(str, self.pieces)])
