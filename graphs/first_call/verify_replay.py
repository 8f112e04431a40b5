"""Replays compared with eager runs from the same state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import torch

from graphs.errors import VerifyMismatch
from graphs.events.ranges import first_call_run
from graphs.first_call.recorded_step import RecordedStep, sliced
from graphs.numerics import tolerance
from graphs.numerics.judge import Rerun, candidate_difference
from graphs.objects.cells import Difference
from graphs.observation.eager_trace import trace_again
from graphs.observation.operations import EagerTrace
from graphs.observation.timing import CallTime, time_call
from graphs.rehearsal.rehearsal import Rehearsal
from graphs.rehearsal.step import Checkpoint, Step

Tensor = torch.Tensor


@first_call_run("V", "first replay against R")
def verify_first_replay(
    entry: RecordedStep, tensors: Sequence[Tensor], rows: int, reference: Sequence[Tensor], state: Sequence[Tensor]
) -> None:
    """Raise unless a replay gives what the warm-up gave, in outputs and in every tensor written."""
    seen = entry.template.seen
    expected = seen(sliced(reference, entry.contract.output_dims, rows))
    produced = seen(entry.recording.replay(tensors, rows))
    found = tolerance.run_difference(expected, produced, state, entry.written.left())
    if found is not None:
        raise VerifyMismatch(f"{found[1]} in the first replay of the recording", operator=found[0])


def verify_second_replay(plain: Step, entry: RecordedStep, rehearsal: Rehearsal, stand_ins: list[Tensor]) -> None:
    """Two steps in a row, eagerly and replayed: what Python advances has to reach the second one."""
    checked = entry.checked
    assert checked is not None
    seen = entry.template.seen

    def twice() -> list[Tensor]:
        plain.produced(stand_ins, entry.externals)
        return seen(plain.produced(stand_ins, entry.externals))

    expected, state = rehearsal.run(lambda: ([out.clone() for out in twice()], entry.written.copies()))

    def replayed() -> None:
        entry.recording.replay(stand_ins, plain.real)
        checked.commit()
        produced = seen(entry.recording.replay(stand_ins, plain.real))
        if checked.valid():  # else the second step is another variant
            found = candidate_difference(expected, produced, state, Rerun(rehearsal.reset, twice, entry.written))
            if found is not None:
                raise VerifyMismatch(f"{found[1]} in the second of two steps", operator=found[0])

    rehearsal.run(replayed)


def compare_replay(step: Step, entry: RecordedStep, rows: int) -> VerifyMismatch | None:
    """Run the call eagerly and as a replay from the same state, restore the state, and tell how they differ."""
    rehearsal, tensors = rehearsal_of(step, entry), step.call.tensors
    _find_beyond(step, rehearsal)
    find_written(step, rehearsal, lambda: [tolerance.padded(entry.contract, tensors)])
    written = rehearsal.first.written

    def eager() -> list[Tensor]:
        return entry.template.tensors(step.run(tensors))

    def valid() -> bool:
        entry.recording.replay(tensors, rows)
        return entry.checked is None or entry.checked.valid()

    if entry.checked is not None and not rehearsal.run(valid):
        return None  # an eager run of another variant would write what this recording does not

    def run() -> tuple[list[Tensor], list[Tensor], list[Difference]]:
        return [out.clone() for out in eager()], written.copies(), rehearsal.start.differences()

    expected, state, changed = rehearsal.run(run)
    if changed and entry.checked is None:  # numbers that a step advances are the recording's to advance
        return VerifyMismatch(f"eager changes {changed[0].path}, which a replay does not", operator=changed[0].path)

    def compared() -> tuple[str, str] | None:
        produced = entry.template.seen(entry.recording.replay(tensors, rows))
        found = tolerance.run_difference(expected, produced, state, written.left(), entry.sentinels)
        if found is None or not entry.rounds_otherwise:
            return found
        return judged(entry, expected, produced, state, Rerun(rehearsal.reset, eager, written))

    found = rehearsal.run(compared)
    return VerifyMismatch(found[1], operator=found[0]) if found is not None else None


def judged(
    entry: RecordedStep, expected: Sequence[Tensor], produced: Sequence[Tensor], state: Sequence[Tensor], rerun: Rerun
) -> tuple[str, str] | None:
    """What a replay that rounds otherwise makes of the step, judged by its error beside eager's own."""
    return candidate_difference(
        expected, produced, state, rerun, sentinels=entry.sentinels, tolerance_factor=entry.tolerance_factor
    )


def rehearsal_of(step: Step, entry: RecordedStep) -> Rehearsal:
    """Runs from the present state, with what a recording writes saved; of large tensors once it is seen: `find_written`."""
    trace = EagerTrace()
    for tensor in [*entry.written.tensors, *(step.call.tensors[index] for index in entry.contract.written)]:
        trace.written.expect(tensor)
    return Rehearsal(Checkpoint(dataclasses.replace(step, replaced=entry.replaced), trace), trace)


def time_replay(step: Step, entry: RecordedStep, rows: int) -> CallTime:
    """The time of a replay of a call with ``rows`` real rows; the state is as before."""
    rehearsal, tensors = rehearsal_of(step, entry), step.call.tensors
    find_written(step, rehearsal, lambda: [tensors])

    def replay() -> CallTime:
        return time_call(lambda: entry.recording.replay(tensors, rows), step.device, before=rehearsal.reset)

    return rehearsal.run(replay)


def _find_beyond(step: Step, rehearsal: Rehearsal) -> None:
    """Have all that an eager run of the call writes saved, what the recording does not write as well: it is to be undone."""
    tensors, known = step.call.tensors, rehearsal.first

    def run() -> None:
        _, seen = trace_again(lambda: step.run(tensors), tensors, known)
        known.written.also(seen.written)
        rehearsal.start.covers(known)

    rehearsal.run(run)


def find_written(step: Step, rehearsal: Rehearsal, calls: Callable[[], Iterable[list[Tensor]]]) -> None:
    """Have what eager runs of ``calls`` write saved where it is not yet: a replay writes there too."""
    if rehearsal.first.written.is_partial:
        for tensors in calls():
            rehearsal.run(lambda tensors=tensors: trace_again(lambda: step.run(tensors), tensors, rehearsal.first))  # type: ignore[misc]
