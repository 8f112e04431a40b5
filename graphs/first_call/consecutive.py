"""Run B: the consecutive step, which has to be the same in everything that a recording keeps."""

from __future__ import annotations

from typing import Any, NamedTuple

from graphs.contract.outputs.template import compare_templates
from graphs.events.ranges import first_call_run
from graphs.first_call.observe import Examined, changing
from graphs.first_call.outcomes import FirstCall, raised
from graphs.observation.compare_traces import compare_traces
from graphs.recording.recorder import Recorder
from graphs.rehearsal.rehearsal import Rehearsal, Rehearsed
from graphs.state.counters import Counter


class Steadiness(NamedTuple):
    """What the first of two steps did and the second does not, or does again.

    Attributes:
        initialised: what it initialised; empty where nothing.
        advanced: the numbers of Python that each step advances.
    """

    initialised: str
    advanced: list[Counter]


@first_call_run("B", "consecutive step")
def require_steady(call: FirstCall, recorder: Recorder, seen: Examined) -> list[Counter]:
    """The numbers that every step advances; all else has to be the same in two consecutive steps.

    Raises:
        Deferred: the first step initialised something.
        Refused: it changed what it reads, and that cannot be put back.
        Refusal: two steps differ.
    """
    found = _compared(call, recorder, seen)
    if found.advanced and found.advanced != seen.counters:
        found = found._replace(initialised=found.initialised or seen.changed[0].path)
    if found.initialised:
        raise call.deferred(found.initialised)
    if found.advanced:
        call.start = call.origin
    return found.advanced


def _compared(call: FirstCall, recorder: Recorder, seen: Examined) -> Steadiness:
    step, first = call.step, call.trace
    rehearsal = Rehearsal(call.start, first)

    def again() -> Rehearsed:
        return rehearsal.watched(recorder.run, step.run, step.call.tensors, shifted=True)

    second = again()
    beyond = seen.walk.changed()
    if beyond is not None:  # it was read, and nothing that puts state back knows of it
        raise call.refused(changing(beyond), undoable=False)
    refusal = compare_traces(first, second.trace)
    if second.changes and not (second.counters and second.error is None and seen.changed and "arithmetic" in step.passes):
        raise changing(second.changes[0], refusal or next(iter(first.findings), None))
    if second.changes:
        return Steadiness("", second.counters or [])
    if second.error is not None:
        raise raised("a second run of the step", second.error) from second.error
    if seen.changed:
        return Steadiness(seen.changed[0].path, [])
    if refusal is not None:
        third = again()
        if third.error is None and not third.changes and compare_traces(second.trace, third.trace) is None:
            return Steadiness(f"a value computed once, at {refusal.site}", [])  # behind a cache that cannot be seen from here
        raise refusal
    _same_output(call, second.output)
    return Steadiness("", [])


def _same_output(call: FirstCall, second: Any) -> None:
    """Raise where the outputs of two steps are put together otherwise."""
    externals, step = list(call.trace.externals.values()), call.step
    templates = [step.template(value, step.call.tensors, externals)[0].structure for value in (call.output, second)]
    refusal = compare_templates(*templates)
    if refusal is not None:
        raise refusal
