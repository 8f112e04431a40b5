"""Run A: the call itself, watched, and what stands in the way of a recording already."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from graphs.errors import ChangingValue, Refusal, SideEffect, StepRaises, UnsupportedArgument
from graphs.events.ranges import first_call_run
from graphs.first_call.outcomes import FirstCall
from graphs.guards.guard_walk import GuardWalk
from graphs.guards.python_guards import Guards
from graphs.objects.cells import Difference
from graphs.objects.libraries import origin_of_code
from graphs.observation.eager_trace import trace_eager
from graphs.observation.operations import EagerTrace, Operation, TensorUse
from graphs.python_reads.code_reads import CodeReads, observed
from graphs.python_reads.named_state import Ran
from graphs.python_reads.replaced import Replaced
from graphs.recording.failures import RaisedWatched, StepRaised, is_interrupt
from graphs.rehearsal.rehearsal import Rehearsal
from graphs.rehearsal.returned_tensors import adopt_returned, unobserved, unreturnable
from graphs.rehearsal.step import Checkpoint, Step
from graphs.rewriting.rewritten_step import is_removable
from graphs.state.counters import Counter

Tensor = torch.Tensor


class Examined(NamedTuple):
    """What run A left.

    Attributes:
        changed: of Python.
        counters: which of that are whole numbers that advance; None where something else changed.
        walk: the values that it can have read.
    """

    changed: list[Difference]
    counters: list[Counter] | None
    walk: GuardWalk


@first_call_run("A", "observed")
def observe(step: Step, origin: Checkpoint, reads: CodeReads) -> tuple[Any, EagerTrace]:
    """Run A, from ``origin``, which covers it then, with what its Python asks for. An exception it raises leaves no trace.

    Raises:
        RaisedWatched: the step raised an exception.
        StepRaised: and what it did cannot be undone, or it raised what no `except Exception` takes for a failure (`SystemExit`):
            that was the call.
        KeyboardInterrupt: the call was interrupted; so does what a signal's handler raises.
        WritesError: what an operator's author says of what it writes is not legal; all of the run was undone.
    """
    rehearsal = Rehearsal(origin, trace := EagerTrace(), is_there=True)
    reads.before = taking_names(step, origin)
    try:
        output, _ = trace_eager(observed(step.run, reads), step.call.tensors, into=trace)
    except BaseException as error:
        origin.covers(trace)
        if is_interrupt(error):
            rehearsal.undo()
            raise
        if any(change.irreversible for change in origin.differences()):
            raise StepRaised(error) from None
        if not isinstance(error, Exception):
            raise StepRaised(error, rehearsal.undo) from None
        rehearsal.undo()
        raise RaisedWatched(error) from error
    origin.covers(trace)
    if trace.written.misdeclared is not None:
        rehearsal.undo()
        raise trace.written.misdeclared
    return output, trace


def taking_names(step: Step, *states: Checkpoint) -> Callable[[types.FrameType], None]:
    """Has ``states`` cover what a function names that starts for the first time, and the class whose method it is.

    To be called before its first line runs: see `CodeReads`.
    """
    replaced = Replaced(step.replaced, states[0].python.classes)

    def take(frame: types.FrameType) -> None:
        code, space, owner = frame.f_code, frame.f_globals, None
        origin, roots = origin_of_code(code, space), replaced.looked_up_by(code, space)
        if code.co_argcount and origin == "library":
            first = frame.f_locals.get(code.co_varnames[0])
            owner = first if issubclass(type(first), type) else type(first)
        for state in states:
            state.python.enter(roots)
            if origin != "torch":
                state.python.take(Ran(code, space, owner))

    return take


def examine(call: FirstCall, reads: CodeReads, beside: Guards | None = None) -> Examined:
    """What run A left, as far as the run alone tells; ``call`` knows the state after it from then on.

    Args:
        beside: see `GuardWalk`; the walk is then about the rest, unless something changed.

    Raises:
        Deferred, Refused: it stands in the way of a recording.
    """
    step, origin, trace = call.step, call.origin, call.trace
    changed, counters = origin.differences(), origin.counters()
    irreversible = next((change for change in changed if change.irreversible), None)
    if irreversible is not None:
        raise call.refused(*trace.findings, changing(irreversible), undoable=False)
    caught = next((finding for finding in trace.findings if isinstance(finding, StepRaises)), None)
    if caught is not None:  # other data may not raise
        raise call.deferred(caught.operator, caught)
    if trace.findings and not (step.passes and is_removable(trace.findings)):
        raise call.refused(*trace.findings)
    drawn = _drawn_on_host(step, origin, trace)
    if drawn is not None:
        raise call.refused(drawn, *trace.findings)
    if trace.imported_dynamo:
        raise call.deferred("torch.compile")
    if reads.refusals:
        raise call.deferred(reads.refusals[0].operator, reads.refusals[0])
    walk = _walk(call, reads, beside if not changed else None)
    if walk.incomparable:
        raise call.refused(*walk.incomparable, undoable=False)
    if not origin.python.complete:
        raise call.refused(UnsupportedArgument("too much hangs on the model to be watched for changes", operator="self"))
    _look_back(call, changed)
    return Examined(changed, counters, walk)


def _walk(call: FirstCall, reads: CodeReads, beside: Guards | None) -> GuardWalk:
    """A look at what the step can have read, but for what the guards ``beside`` are about."""
    walk = GuardWalk(reads, call.step.roots(), beside=beside)
    return walk if walk.fits else GuardWalk(reads, call.step.roots())


def _look_back(call: FirstCall, changed: Sequence[Difference]) -> None:
    """Save the state that the call left, and see that a replay can hand out what it returned."""
    step, origin = call.step, call.origin
    after = Checkpoint(step, call.trace) if changed else origin.later(step, call.trace)
    for one in origin.python.ran if changed else ():
        after.python.take(one)
    unseen = _unreturnable(step, call.trace, call.output, after)
    if unseen is not None:
        raise call.refused(unseen)
    step.held = after.python.holds
    call.after, call.start = after, origin.with_python_of(after)


def catches(reads: CodeReads) -> bool:
    """Whether a function of the step has a handler of exceptions; a `with` counts as one, and before Python 3.11 any function."""
    codes = [code for code, _ in reads.codes.values()]
    return not reads.complete or any(getattr(code, "co_exceptiontable", True) for code in codes)


def _unreturnable(step: Step, trace: EagerTrace, output: Any, after: Checkpoint) -> Refusal | None:
    """Why no replay can hand out what run A returned; None where one can."""
    arguments = {id(value) for value in (*step.call.tensors, *step.call.opaques)}

    def given(value: Any) -> bool:
        return id(value) in arguments or (not isinstance(value, tuple) and after.python.holds(value))

    refusal = unreturnable(output, given)
    if refusal is None:
        adopt_returned(trace, output, after.python)
        refusal = unobserved(trace, output)
    return refusal


def irreversible_change(origin: Checkpoint) -> ChangingValue | None:
    """What changed since ``origin`` and cannot be undone, an iterator that moved on; or None."""
    change = next((one for one in origin.differences() if one.irreversible), None)
    return changing(change) if change is not None else None


def changing(change: Difference, refusal: Refusal | None = None) -> ChangingValue:
    """The refusal for a Python value that a step changes, at the line of ``refusal``."""
    detail = f"{change.path} was {change.before}, then {change.after}; a replay would not change it"
    return ChangingValue(detail, operator=change.path, site=refusal.site if refusal is not None else None)


def _drawn_on_host(step: Step, origin: Checkpoint, trace: EagerTrace) -> SideEffect | None:
    """The operator by which a step on a device draws from a generator of the host: a replay would not."""
    if step.device.type == "cpu" or not origin.host_has_drawn():
        return None
    seeded = [one for one in trace.operations if torch.Tag.nondeterministic_seeded in one.func.tags]
    found = next((one for one in seeded if not _is_on(step.device, one)), None)
    detail = "the step draws random numbers on the host; a replay would neither draw them again nor advance the generator"
    where = {"operator": str(found.func), "site": found.site} if found is not None else {"operator": "torch.get_rng_state"}
    return SideEffect(detail, remedy="draw them on the device, or outside of the step, and pass them as arguments", **where)


def _is_on(device: torch.device, operation: Operation) -> bool:
    """Whether an operation names the device, or a tensor there."""
    leaves = tree_leaves(operation.arguments, is_leaf=lambda value: isinstance(value, TensorUse))
    kinds = [
        leaf.device if isinstance(leaf, TensorUse) else leaf.type
        for leaf in leaves
        if isinstance(leaf, (TensorUse, torch.device))
    ]
    return device.type in kinds
