"""The first call of a key: audit, warm-up, recording, verification, measurement.

Every run but the last is undone. The order of runs, each from the same state:

    A  watched, on the caller's stream: the call itself if nothing is recorded in the end
    B  watched, on the recording stream: the consecutive step that A is compared with
    C  watched, at the recorded size on stand-ins for the copied arguments: what the recording will read and write
    R  plain, likewise: warm-up of libraries, and the reference for the first replay
       the recording
    V  the first replay, compared with R
    P  with padding: an exact eager run with fewer rows, then replays with padded and with poisoned rows
"""

from __future__ import annotations

import dataclasses
import functools
import time
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from graphs.contract.outputs.template import OutputTemplate, compare_templates, map_output
from graphs.contract.slots import Contract, make_contract
from graphs.contract.static_tensors import StaticTensors, alone, sharing
from graphs.errors import (
    CaptureFailed,
    ChangingValue,
    HostSync,
    MovedStaticTensor,
    Refusal,
    RowsInteract,
    SideEffect,
    StepRaises,
    UnsupportedArgument,
    UnsupportedOperator,
    UnsupportedOutput,
    VerifyMismatch,
)
from graphs.first_call.candidates import compile_rewritten, record_compiled
from graphs.first_call.padding_proof import PaddingProof
from graphs.first_call.recorded_step import RecordedStep, reference_to, sliced
from graphs.guards.guard_walk import GuardWalk, guards_of
from graphs.numerics import tolerance
from graphs.numerics.judge import Rerun, candidate_difference
from graphs.objects.cells import Difference
from graphs.objects.libraries import origin_of_code
from graphs.observation.eager_trace import (
    EagerTrace,
    Operation,
    TensorUse,
    compare_traces,
    last_operation,
    trace_again,
    trace_eager,
)
from graphs.observation.timing import time_call
from graphs.python_reads.code_reads import CodeReads, observed
from graphs.python_reads.named_state import Ran
from graphs.recording.failures import RaisedWatched, StepRaised, internal_error, is_interrupt, raised_at
from graphs.recording.recorder import Recorder, Recording, ReplayRaised
from graphs.rehearsal.compare_stand_ins import compare_with_stand_ins, reads_by_layout
from graphs.rehearsal.result_lines import lines_of_results, with_line
from graphs.rehearsal.returned_tensors import adopt_returned, links_to, unobserved, unreturnable
from graphs.rehearsal.step import Checkpoint, Step
from graphs.rewriting.proof import Proof, prove, unmerged
from graphs.rewriting.rewritten_step import RewrittenStep, is_removable, rewrite
from graphs.state.counters import Counter, Counters
from graphs.state.storage import storage_id
from graphs.state.tensor_state import RandomState

Tensor = torch.Tensor
_RUNS_AGAIN = "a step is run a few times from one state before it is recorded: change what this line does in a later run"
_ENOUGH = 0.3  # seconds of timing a step, eager and replayed each; on a GPU three runs of most take less


class Deferred(Exception):
    """The call ran for real and did what the next may not do: the next call with this key is tried again.

    It initialised state, or (``refusal``) it did what no replay can stand for, such as writing a warning.
    """

    def __init__(self, output: Any, what: str, undo: Callable[[], None], refusal: Refusal | None = None) -> None:
        super().__init__(what)
        self.output, self.undo, self.refusal = output, undo, refusal


class Refused(Exception):
    """The call ran for real (``output``) and cannot be recorded (``refusals``). ``undo`` takes its effects back.

    ``undo`` is None where that is not possible: an iterator moved on.
    """

    def __init__(self, output: Any, refusals: Sequence[Refusal], undo: Callable[[], None] | None) -> None:
        super().__init__(str(refusals[0]))
        self.output, self.refusals, self.undo = output, list(refusals), undo


def record_key(step: Step, recorder: Recorder, *, owned: bool, check: bool) -> RecordedStep:
    """Record one key. On return the state is the one before the call: the caller replays.

    Raises:
        Deferred: the step initialised itself; it ran once, for real.
        Refused: the step cannot be recorded; it ran once, for real.
        RowsInteract: it cannot be recorded at ``step.rows`` rows; nothing ran, as far as state shows.
    """
    started = time.perf_counter()
    origin = Checkpoint(step)
    reads = CodeReads()
    output, trace = first_run(step, origin, reads)
    try:
        after, changed, counters, walk = _examined(step, origin, reads, output, trace)
    except (Deferred, Refused):
        raise
    except Exception as error:
        raise Refused(output, [internal_error(error)], origin.restore) from error
    except BaseException:  # an interrupt: the call has not taken place
        origin.restore()
        raise
    start = origin.with_python_of(after)  # what the step initialised stays; nothing else of it differs
    try:
        initialised, advanced = _compare_consecutive(step, recorder, start, trace, output, changed, walk)
        if advanced != counters and advanced:
            initialised = initialised or changed[0].path
        if initialised:
            after.restore()
            raise Deferred(output, initialised, origin.restore)
        if advanced:
            start = origin
        settings = {"recorder": recorder, "start": start, "trace": trace, "output": output, "owned": owned, "check": check}
        record = functools.partial(_record, counters=advanced, **settings)
        entry = record_compiled(step, trace, record)
    except (Deferred, Refused):
        raise
    except RowsInteract:
        start.restore()
        raise
    except Refusal as refusal:
        after.restore()
        refusal = with_line(refusal, trace)
        passed = step.passes and is_removable([refusal])  # of all that passes are for, this is what they could not remove
        others = [f for f in trace.findings if f.signature != refusal.signature and not (passed and is_removable([f]))]
        raise Refused(output, [refusal, *others], origin.restore) from refusal
    except ReplayRaised as error:
        detail = f"a replay of the recording raises {type(error.error).__name__}: {error.error}".splitlines()[0]
        if step.rows is not None:
            start.restore()
            raise RowsInteract(detail) from error
        after.restore()
        raise Refused(output, [with_line(VerifyMismatch(detail, operator=error.operator), trace)], origin.restore) from error
    except BaseException as error:  # whatever else a recording meets, the user gets the eager result and the reason
        if is_interrupt(error):  # then the call has not taken place
            origin.restore()
            raise
        after.restore()
        raise Refused(output, [internal_error(error)], origin.restore) from error
    start.restore()
    trace.written.release()
    entry.written.forget(step.call.tensors[index] for index in entry.contract.written)
    entry.catches = step.device.type == "cpu" and _catches(reads)  # on a device no operator raises
    links = [*entry.statics.links, *links_to(entry.template.held, start.python)]
    entry.guards = guards_of(reads, step.roots(), advanced, links, entry.uploads, entry.statics.placed)
    entry.statics.links.clear()  # they hold objects on the way, and are guarded now
    entry.capture_seconds = time.perf_counter() - started
    return entry


def _examined(
    step: Step, origin: Checkpoint, reads: CodeReads, output: Any, trace: EagerTrace
) -> tuple[Checkpoint, list[Difference], list[Counter] | None, GuardWalk]:
    """What run A left: the state after it, what it changed of Python, which of that are advancing numbers, what it can have read.

    Raises:
        Deferred, Refused: what was seen of the run alone stands in the way of a recording.
    """
    changed, counters = origin.differences(), origin.counters()
    lasting = next((change for change in changed if change.irreversible), None)
    if lasting is not None:
        raise Refused(output, [*trace.findings, _changing(lasting)], None)
    caught = next((finding for finding in trace.findings if isinstance(finding, StepRaises)), None)
    if caught is not None:  # other data may not raise
        raise Deferred(output, caught.operator, origin.restore, caught)
    if trace.findings and not (step.passes and is_removable(trace.findings)):
        raise Refused(output, trace.findings, origin.restore)
    drawn = _drawn_on_host(step, origin, trace)
    if drawn is not None:
        raise Refused(output, [drawn, *trace.findings], origin.restore)
    if reads.refusals:
        raise Deferred(output, reads.refusals[0].operator, origin.restore, reads.refusals[0])
    walk = GuardWalk(reads, step.roots())
    if walk.incomparable:
        raise Refused(output, walk.incomparable, None)
    if not origin.python.complete:
        refusal = UnsupportedArgument("too much hangs on the model to be watched for changes", operator="self")
        raise Refused(output, [refusal], origin.restore)
    after = Checkpoint(step, trace)
    for ran in origin.python.ran:
        after.python.take(ran)
    unseen = _unreturnable(step, trace, output, after)
    if unseen is not None:
        raise Refused(output, [unseen], origin.restore)
    step.held = after.python.holds
    return after, changed, counters, walk


def first_run(step: Step, origin: Checkpoint, reads: CodeReads) -> tuple[Any, EagerTrace]:
    """Run A, from ``origin``, which covers it then, with what its Python asks for. An exception it raises leaves no trace.

    Raises:
        RaisedWatched: the step raised an exception.
        StepRaised: and what it did cannot be undone, or it raised what no `except Exception` takes for a failure (`SystemExit`):
            that was the call.
        KeyboardInterrupt: the call was interrupted; so does what a signal's handler raises.
    """
    trace = EagerTrace()
    reads.before = functools.partial(_take_named, origin)
    try:
        output, _ = trace_eager(observed(step.run, reads), step.call.tensors, into=trace)
    except BaseException as error:
        origin.covers(trace)
        if is_interrupt(error):
            origin.restore()
            raise
        if not isinstance(error, Exception) or any(change.irreversible for change in origin.differences()):
            raise StepRaised(error) from None
        origin.restore()
        raise RaisedWatched(error) from error
    origin.covers(trace)
    return output, trace


def _take_named(origin: Checkpoint, frame: types.FrameType) -> None:
    """Have ``origin`` cover what a function names that starts for the first time, and the class whose method it is."""
    code, owner = frame.f_code, None
    if code.co_argcount and origin_of_code(code, frame.f_globals) == "library":
        first = frame.f_locals.get(code.co_varnames[0])
        owner = first if issubclass(type(first), type) else type(first)
    origin.python.take(Ran(code, frame.f_globals, owner))


def _catches(reads: CodeReads) -> bool:
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


def lasting_change(origin: Checkpoint) -> ChangingValue | None:
    """What changed since ``origin`` and cannot be undone, an iterator that moved on; or None."""
    lasting = next((change for change in origin.differences() if change.irreversible), None)
    return _changing(lasting) if lasting is not None else None


def _changing(change: Difference, refusal: Refusal | None = None) -> ChangingValue:
    detail = f"{change.path} was {change.before}, then {change.after}; a replay would not change it"
    return ChangingValue(detail, operator=change.path, site=refusal.site if refusal is not None else None)


def _compare_consecutive(
    step: Step,
    recorder: Recorder,
    start: Checkpoint,
    first: EagerTrace,
    output: Any,
    changed: list[Difference],
    walk: GuardWalk,
) -> tuple[str, list[Counter]]:
    """Run B: the next step from the same tensors, with Python state one step further.

    Returns what the step initialised in its first run, or an empty string, and the numbers that it advances.

    Raises:
        Refused: it changed what it reads, and that cannot be put back.
    """
    second, changes, error, result, counters = _again(step, recorder, start, first)
    beyond = walk.changed()
    if beyond is not None:  # it was read, and nothing that puts state back knows of it
        raise Refused(output, [_changing(beyond)], None)
    refusal = compare_traces(first, second)
    if changes and not (counters and error is None and changed and "arithmetic" in step.passes):
        raise _changing(changes[0], refusal or next(iter(first.findings), None))
    if changes:
        return "", counters or []
    if error is not None:
        raise _raised("a second run of the step", error) from error
    if changed:
        return changed[0].path, []
    if refusal is not None:
        third, changes, error, *_ = _again(step, recorder, start, first)
        if error is None and not changes and compare_traces(second, third) is None:
            return f"a value computed once, at {refusal.site}", []  # behind a cache that cannot be seen from here
        raise refusal
    externals, tensors = list(first.externals.values()), step.call.tensors
    templates = [step.template(value, tensors, externals)[0].structure for value in (output, result)]
    refusal = compare_templates(*templates)
    if refusal is not None:
        raise refusal
    return "", []


def _again(
    step: Step, recorder: Recorder, start: Checkpoint, first: EagerTrace
) -> tuple[EagerTrace, list[Difference], BaseException | None, Any, list[Counter] | None]:
    start.restore()
    settled = start.python.shifted()
    trace, result, error = EagerTrace(), None, None
    try:
        result, trace = recorder.run(lambda: trace_again(step.run, step.call.tensors, first))  # type: ignore[misc]
    except BaseException as raised:  # the user's step may fail in its second run; the caller looks for the reason
        if is_interrupt(raised):
            raise
        error = raised
    changes = [*settled(), *start.differences()]
    counters = start.counters()
    start.restore()
    return trace, changes, error, result, counters


def _record(
    step: Step,
    recorder: Recorder,
    start: Checkpoint,
    trace: EagerTrace,
    output: Any,
    *,
    owned: bool,
    check: bool,
    counters: Sequence[Counter] = (),
) -> RecordedStep:
    """C, R, the recording, V and P. Raises a `Refusal`; the caller restores the state.

    Where the step has a candidate for its model, C and P still run the model, and R and the recording the candidate.
    """
    tensors, plain = step.call.tensors, step.without_candidate()
    in_place = {*step.static, *sharing(tensors, trace.written.tensors)}
    moving = (
        [index for index in in_place & step.moving if alone(index, tensors, _not_given(trace, tensors))]
        if step.rows is None
        else []
    )
    static = sorted(in_place - {*moving})
    contract = make_contract(step.names, tensors, static, step.padding, step.batch_dims, step.rows, moving, step.host)
    stand_ins = contract.arrange(contract.filled(tensors), tensors)
    externals, template, watched = _stand_in_run(plain, recorder, start, trace, contract, stand_ins, output, counters)
    if moving and (watched.findings or counters or plain is not step):
        raise MovedStaticTensor("it is written, and lies elsewhere at each call", operator=step.names[moving[0]])
    if watched.findings or counters:
        step = _without_host_values(step, start, watched, stand_ins, counters)
        if _covers(trace, step.model, tensors):
            return _record(plain, recorder, start, trace, output, owned=owned, check=check, counters=counters)
        externals = list(trace.externals.values())
    proof = Proof()
    if plain is not step:
        template = _compare_candidate(step, start, trace, stand_ins, externals, check=check)
        proof = prove(step, start, trace, stand_ins, template) if check else Proof()
        if unmerged(step, proof):
            return _record(plain, recorder, start, trace, output, owned=owned, check=check, counters=counters)
        step, plain = dataclasses.replace(step, form=template), dataclasses.replace(plain, form=template)
    probe = PaddingProof(plain, contract, start, trace, externals) if step.rows is not None else None
    _reset(step, start)
    reference: list[Tensor] = _guarded(step, lambda: recorder.run(lambda: step.produced(stand_ins, externals)))
    contract.write_back(stand_ins, tensors)
    state = trace.written.copies()
    dims = (None,) * len(reference) if probe is None else probe.output_dims(reference)
    contract = dataclasses.replace(contract, output_dims=dims)
    free = _free_memory(step.device)
    start.restore()
    recording = _recorded(step, recorder, contract, externals, start, trace, owned=owned)
    checked = step.model.checked(recording, _draws(step.device, trace)) if isinstance(step.model, RewrittenStep) else None
    recording = checked or recording
    entry = RecordedStep(
        recording,
        contract,
        template,
        _statics(step, contract, externals, trace, start),
        [reference_to(opaque) for opaque in step.call.opaques],
        externals,
        trace.written,
        ", ".join(f"{n}{list(t.shape)}" for n, t in zip(step.names, stand_ins, strict=True)) or "no tensor arguments",
        device_free_delta=free - _free_memory(step.device),
        candidate=None if plain is step else step.model,
        checked=checked,
        uploads=_uploads(step),
        proof=proof,
        on_device=step.device.type == "cuda",
        generators=[*trace.generators] if _draws(step.device, trace) is not None else None,
        bumped=_bumped(trace, tensors),
        bumped_arguments=[
            i for i in contract.static if storage_id(tensors[i]) in trace.written and not tensors[i].is_inference()
        ],
    )
    if check:
        start.restore()
        _verify_first_replay(entry, tensors, step.real, reference, state)
        if counters:
            _verify_second_replay(plain, entry, start, stand_ins)
    if probe is not None:
        probe.prove(entry)
    timed = functools.partial(time_call, device=step.device, before=start.restore, enough=_ENOUGH)
    entry.eager, entry.replay = timed(lambda: plain.run(stand_ins)), timed(lambda: recording.replay(tensors, step.real))
    return entry


def _stand_in_run(
    step: Step,
    recorder: Recorder,
    start: Checkpoint,
    first: EagerTrace,
    contract: Contract,
    stand_ins: list[Tensor],
    output: Any,
    counters: Sequence[Counter],
) -> tuple[list[Tensor], OutputTemplate, EagerTrace]:
    """Run C. Returns the tensors the recording reads in place, the template of its output, and what was seen.

    Only here is an argument told apart from the step's own tensor that it happens to be, and a padded batch from the
    call's: the same tensors must be written, and at exact sizes the same operators run on the same numbers and layouts.
    """
    start.restore()
    result, trace = _guarded(step, lambda: recorder.run(lambda: trace_again(lambda: step.run(stand_ins), stand_ins, first)))
    changed = start.differences() if start.counters() != list(counters) else []
    start.restore()
    adopt_returned(trace, result, start.python)
    if changed:
        detail = f"{changed[0].path} is changed when the arguments are copies: the step asks which object an argument is"
        raise RowsInteract(detail) if step.rows is not None else ChangingValue(detail, operator=changed[0].path)
    differing = RowsInteract if step.rows is not None else ChangingValue
    expected = {storage_id(stand_ins[index]) for index in contract.written}
    if any(storage_id(tensor) not in expected for tensor in trace.written.tensors):
        raise differing("a tensor is written only when the arguments are copies or padded")
    refusal: Refusal | None = reads_by_layout(trace, contract.scattered(step.call.tensors))
    if refusal is None and step.rows is None:  # padded, a copy may become a view
        refusal = compare_with_stand_ins(first, trace, step.call.tensors, strides=contract.keeps_strides)
    elif refusal is None and step.rows == 1 and compare_with_stand_ins(first, trace, step.call.tensors, strides=False):
        raise RowsInteract("another layout of the arguments gives other numbers, and a single row proves no more", unproved=True)
    if refusal is not None:
        raise refusal
    externals = list(trace.externals.values())
    template = step.template(result, stand_ins, externals)[0]
    first.made_at = lines_of_results(trace, template.tensors(result), first)
    exact = step.template(output, step.call.tensors, list(first.externals.values()))[0]
    refusal = compare_templates(exact.structure, template.structure, arguments=False)
    if refusal is not None:
        raise differing(refusal.detail)
    return externals, template, trace


def _not_given(trace: EagerTrace, tensors: Sequence[Tensor]) -> list[Tensor]:
    """What a step reads in place and is not given."""
    given = {storage_id(tensor) for tensor in tensors}
    return [tensor for storage, tensor in trace.externals.items() if storage not in given]


def _statics(step: Step, contract: Contract, externals: list[Tensor], trace: EagerTrace, start: Checkpoint) -> StaticTensors:
    tensors = step.call.tensors
    copied = {storage_id(tensors[index]) for index in contract.written}
    return StaticTensors(
        [(index, step.names[index], tensors[index]) for index in contract.static],
        externals,
        [tensor for tensor in trace.written.tensors if storage_id(tensor) not in copied],
        start.python.owners,
        contract.longest,
        contract.written,
        [index for index, _ in contract.same],
        tensors,
    )


def _reset(step: Step, start: Checkpoint) -> None:
    """The state before the call, for a run of the step or of its candidate."""
    start.restore()
    if isinstance(step.model, RewrittenStep):
        step.model.prepare()


def _uploads(step: Step) -> list[Tensor]:
    """Host tensors that a rewritten graph uploaded once: writing to one of them makes the recording out of date."""
    return list(step.model.uploaded) if isinstance(step.model, RewrittenStep) else []


def _bumped(trace: EagerTrace, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of the step's own that it writes, as it has them: autograd counts their writes."""
    given = {storage_id(tensor) for tensor in tensors}
    return [
        tensor
        for storage, tensor in trace.externals.items()
        if storage in trace.written and storage not in given and not tensor.is_inference()
    ]


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


def _draws(device: torch.device, trace: EagerTrace) -> Callable[[], RandomState] | None:
    """What saves the random generators before a replay that may have to be undone; None where the step draws nothing."""
    seeded = any(torch.Tag.nondeterministic_seeded in operation.func.tags for operation in trace.operations)
    return (lambda: RandomState(device, {g: g.get_state() for g in trace.generators})) if seeded else None


def _without_host_values(
    step: Step, start: Checkpoint, watched: EagerTrace, stand_ins: list[Tensor], counters: Sequence[Counter]
) -> Step:
    """The step with the graph that the passes make of it in the model's place."""
    start.restore()
    try:
        candidate = rewrite(step.without_candidate(), watched, stand_ins, Counters(counters, step.device) if counters else None)
    except Refusal:
        raise
    except Exception as error:
        if not watched.findings:
            path = counters[0].path
            detail = f"{path} is advanced by the step, which could not be traced: {type(error).__name__}: {error}"
            raise ChangingValue(detail, operator=path) from error
        found = watched.findings[0]
        detail = f"{found.detail}; the step could not be traced: {type(error).__name__}: {str(error).splitlines()[0]}"
        raise type(found)(detail, operator=found.operator, site=found.site) from error
    finally:
        start.restore()
    if candidate.assumption is not None and step.rows is not None:
        raise RowsInteract("the step depends on host values, which padded rows take part in")
    return compile_rewritten(step, candidate)


def _covers(trace: EagerTrace, rewritten: Any, tensors: Sequence[Tensor]) -> bool:
    """Have ``trace`` cover what a rewritten graph reaches that the eager run did not, on a side of a branch not taken.

    Returns whether it writes an argument that was not known to be written.
    """
    for tensor in rewritten.held:
        trace.externals.setdefault(storage_id(tensor), tensor)
    for tensor in rewritten.held_written:
        trace.written.save(tensor)
    arguments = [tensors[index] for index in rewritten.written]
    unknown = [tensor for tensor in arguments if storage_id(tensor) not in trace.written]
    for tensor in unknown:
        trace.written.save(tensor)
    return bool(unknown)


def _compare_candidate(
    step: Step, start: Checkpoint, trace: EagerTrace, stand_ins: list[Tensor], externals: list[Tensor], *, check: bool
) -> OutputTemplate:
    """Run the candidate for the first time, which may compile it, and compare it with the model.

    Returns the template of its output: what the model hands through on one side of a branch, the candidate makes.
    """
    plain = step.without_candidate()
    start.restore()
    returned = _guarded(plain, lambda: plain.run(stand_ins))
    exact = plain.template(returned, stand_ins, externals)[0]
    if exact.hung:
        raise UnsupportedOutput("attributes are set on an output tensor, which only the step itself does", operator="output")
    identities = exact.identities
    output = map_output(returned, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)
    state = trace.written.copies()
    _reset(step, start)
    template, produced = step.template(step.run(stand_ins), stand_ins, externals)
    if template.identities != identities:
        raise VerifyMismatch(
            "other parts of it are one object when a candidate runs in the place of the model", operator="output"
        )
    expected, produced = template.tensors(output), template.seen(produced)
    fetched = [i for i, (a, b) in enumerate(zip(expected, produced, strict=True)) if a.device != b.device]
    if fetched:
        raise HostSync(f"output {fetched[0]} is a tensor of the host that holds values of the device", operator="output")
    rerun = Rerun(start.restore, lambda: template.tensors(plain.run(stand_ins)), trace.written)
    found = candidate_difference(expected, produced, state, rerun) if check else None
    if found is not None:
        raise VerifyMismatch(f"{found[1]} when a candidate runs in the place of the model", operator=found[0])
    return template


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _guarded(step: Step, run: Callable[[], Any]) -> Any:
    """``run()``; a step may well refuse a padded batch, and then it is recorded at its exact sizes."""
    try:
        return run()
    except BaseException as error:
        if is_interrupt(error):
            raise
        text = f"raised {type(error).__name__}: {error}"
        if step.rows is None:
            raise _raised("a warm-up run of the step", error) from error
        raise RowsInteract(f"a run with {step.rows} rows {text}") from error


def _raised(run: str, error: BaseException) -> CaptureFailed:
    """The refusal for a step that raises when it runs once more, with the line that does."""
    detail = f"{run} raised {type(error).__name__}: {error}".splitlines()[0]
    return CaptureFailed(detail, operator=type(error).__name__, site=raised_at(error), remedy=_RUNS_AGAIN)


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def _recorded(
    step: Step,
    recorder: Recorder,
    contract: Contract,
    externals: list[Tensor],
    start: Checkpoint,
    trace: EagerTrace,
    *,
    owned: bool,
) -> Recording:
    """The recording; when the device refuses, the operator at fault is found by recording once more, watched."""

    def body(tensors: Sequence[Tensor]) -> list[Tensor]:
        return step.produced(tensors, externals)

    for operation in trace.operations:
        why = recorder.refuses(str(operation.func))
        if why is not None:
            raise UnsupportedOperator(why, operator=str(operation.func), site=operation.site)
    generators = tuple(trace.generators)
    try:
        return recorder.record(body, contract, step.call.tensors, owned=owned, generators=generators)
    except UnsupportedOperator as unsupported:
        found = [o.site for o in trace.operations if str(o.func) == unsupported.operator]
        site = found[0] if found else unsupported.site
        raise UnsupportedOperator(unsupported.detail, operator=unsupported.operator, site=site) from unsupported
    except CaptureFailed as failure:
        start.restore()
        watched, last = last_operation(body)
        try:
            recorder.record(watched, contract, step.call.tensors, owned=owned, generators=generators)
        except CaptureFailed:
            raise CaptureFailed(failure.detail, operator=last.operator, site=last.site) from failure
        raise
    finally:
        start.restore()


def _verify_first_replay(
    entry: RecordedStep, tensors: Sequence[Tensor], rows: int, reference: Sequence[Tensor], state: Sequence[Tensor]
) -> None:
    seen = entry.template.seen
    expected = seen(sliced(reference, entry.contract.output_dims, rows))
    produced = seen(entry.recording.replay(tensors, rows))
    found = tolerance.run_difference(expected, produced, state, entry.written.tensors)
    if found is not None:
        raise VerifyMismatch(f"{found[1]} in the first replay of the recording", operator=found[0])


def _verify_second_replay(plain: Step, entry: RecordedStep, start: Checkpoint, stand_ins: list[Tensor]) -> None:
    """Two steps in a row, eagerly and replayed: what Python advances has to reach the second one."""
    assert entry.checked is not None
    seen = entry.template.seen

    def twice() -> list[Tensor]:
        plain.produced(stand_ins, entry.externals)
        return seen(plain.produced(stand_ins, entry.externals))

    start.restore()
    expected = [out.clone() for out in twice()]
    state = entry.written.copies()
    start.restore()
    entry.recording.replay(stand_ins, plain.real)
    entry.checked.commit()
    produced = seen(entry.recording.replay(stand_ins, plain.real))
    if entry.checked.valid():  # else the second step is another variant
        found = candidate_difference(expected, produced, state, Rerun(start.restore, twice, entry.written))
        if found is not None:
            raise VerifyMismatch(f"{found[1]} in the second of two steps", operator=found[0])
    start.restore()


def compare_replay(step: Step, entry: RecordedStep, rows: int) -> VerifyMismatch | None:
    """Run the call eagerly and as a replay from the same state, restore the state, and tell how they differ."""
    trace = EagerTrace()
    for tensor in [*entry.written.tensors, *(step.call.tensors[index] for index in entry.contract.written)]:
        trace.written.save(tensor)
    start = Checkpoint(step, trace)

    def run() -> list[Tensor]:
        return entry.template.tensors(step.run(step.call.tensors))

    try:
        if entry.checked is not None:  # an eager run of another variant would write what this recording does not
            entry.recording.replay(step.call.tensors, rows)
            held = entry.checked.valid()
            start.restore()
            if not held:
                return None
        expected = [out.clone() for out in run()]
        state = trace.written.copies()
        start.restore()
        produced = entry.template.seen(entry.recording.replay(step.call.tensors, rows))
        found = tolerance.run_difference(expected, produced, state, trace.written.tensors, entry.sentinels)
        if found is not None and entry.rounds_otherwise:
            rerun = Rerun(start.restore, run, trace.written)
            found = candidate_difference(
                expected, produced, state, rerun, sentinels=entry.sentinels, tolerance_factor=entry.tolerance_factor
            )
        return VerifyMismatch(found[1], operator=found[0]) if found is not None else None
    finally:
        start.restore()
