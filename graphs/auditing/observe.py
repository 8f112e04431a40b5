"""Running consecutive steps to look at them, and leaving no trace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from graphs.auditing.compare_steps import differences
from graphs.auditing.source.assignment_sites import executed_code, line_that_sets
from graphs.auditing.source.line_timing import Place, time_places
from graphs.errors import Site
from graphs.first_call.observe import taking_names
from graphs.objects.cells import Difference
from graphs.observation.eager_trace import trace_eager
from graphs.observation.operations import EagerTrace
from graphs.python_reads.code_reads import CodeReads, observed
from graphs.rehearsal.rehearsal import Rehearsal
from graphs.rehearsal.step import Checkpoint, Step
from passes.core.source_location import raised_at

_COST_RUNS = 5


@dataclass
class Run:
    """One watched step.

    Attributes:
        trace: what it did; as far as it came, where it raised.
        output: what it returned.
        changed: what it changed in Python state.
        error, raised_at: what it raised, and the user's line.
    """

    trace: EagerTrace
    output: Any
    changed: list[Difference]
    error: Exception | None = None
    raised_at: tuple[str, int] = ("", 0)


@dataclass
class Observation:
    """What was seen of a step.

    Attributes:
        runs: consecutive steps from the present state on: two, or three where the first two differ.
        costs: microseconds per step of calls that may hold the host up.
        assignments: the lines that set the Python values that change, by path.
        complete: False where too much hangs on the model to see every change of Python state.
    """

    step: Step
    runs: list[Run] = field(default_factory=list)
    costs: dict[Place, float] = field(default_factory=dict)
    assignments: dict[str, Site] = field(default_factory=dict)
    complete: bool = True

    def pairs(self) -> list[tuple[Run, Run]]:
        """Consecutive steps."""
        return list(zip(self.runs, self.runs[1:], strict=False))


def observe(step: Step) -> Observation:
    """Run a step a few times, watched, then timed, and put everything back that can be.

    Raises:
        Exception: what the first run raises. A later run that raises ends the observation, and is part of it.
    """
    seen, rehearsal = Observation(step), Rehearsal(Checkpoint(step), EagerTrace(), is_there=True)
    seen.complete = rehearsal.start.python.complete
    rehearsal.covering(lambda: _watch(seen, rehearsal))
    if not any(_is_irreversible(run) for run in seen.runs):  # else each further run would leave more behind
        rehearsal.run(lambda: _measure(seen, rehearsal))
    return seen


def _watch(seen: Observation, rehearsal: Rehearsal) -> None:
    """Run until two consecutive steps are alike, three at most: the first may have initialised something."""
    first = rehearsal.first
    while len(seen.runs) < 3:
        trace = first if not seen.runs else EagerTrace(written=first.written, generators=first.generators)
        run = _run(seen.step, trace, rehearsal.start, may_raise=not seen.runs)
        seen.runs.append(run)
        if run.error is not None or _is_irreversible(run):
            return
        if len(seen.runs) == 2 and not run.changed and not differences(seen.runs[0].trace, run.trace):
            return


def _run(step: Step, trace: EagerTrace, start: Checkpoint, *, may_raise: bool) -> Run:
    before = Checkpoint(step)
    reads = CodeReads(before=taking_names(step, before, start))
    try:
        output, _ = trace_eager(observed(step.run, reads), step.call.tensors, into=trace)
    except Exception as error:
        if may_raise:
            raise
        return Run(trace, None, before.differences(), error, raised_at(error))
    return Run(trace, output, before.differences())


def _repeats(seen: Observation) -> bool:
    """Whether the step can be run twice: what sets a value in each step is found in the second."""
    return len(seen.runs) > 2 or seen.runs[-1].error is None


def _is_irreversible(run: Run) -> bool:
    return any(change.irreversible for change in run.changed)


def _measure(seen: Observation, rehearsal: Rehearsal) -> None:
    """Time the calls that were found, and look up where Python values are set."""
    run, places = seen.step.run, set(_places(seen))
    if places:
        seen.costs = time_places(run, places, seen.step.device, before=rehearsal.reset, runs=_COST_RUNS)
    paths = {change.path for one in seen.runs for change in one.changed}
    if paths:
        rehearsal.reset()
        first, second = executed_code(run), executed_code(run) if _repeats(seen) else set()
        for path in paths:
            site = line_that_sets(path, second)
            seen.assignments[path] = site if site.file else line_that_sets(path, first)


def _places(seen: Observation) -> Iterator[Place]:
    for run in seen.runs:
        yield from ((read.frame, read.function) for read in run.trace.reads)
        for refusal in run.trace.findings:
            yield (refusal.site.file, refusal.site.line), run.trace.asked[refusal.signature]
