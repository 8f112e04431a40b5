"""The first call of a key: observe, rehearse, record, verify, measure.

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
from collections import Counter as Counts
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from graphs.compiler_options import REWRITES
from graphs.contract.outputs.template import OutputTemplate
from graphs.contract.slots import Contract, make_contract
from graphs.contract.static_tensors import StaticTensors, alone, sharing
from graphs.errors import MovedStaticTensor
from graphs.events.ranges import first_call_run
from graphs.first_call.candidate_step import compare_candidate, cover, prepare, with_operators, without_host_values
from graphs.first_call.candidates import record_compiled
from graphs.first_call.consecutive import require_steady
from graphs.first_call.observe import catches, examine, observe
from graphs.first_call.outcomes import FirstCall, ran
from graphs.first_call.padding_proof import PaddingProof
from graphs.first_call.recorded_step import RecordedStep, reference_to
from graphs.first_call.stand_in_run import OnStandIns, run_on_stand_ins
from graphs.first_call.verify_replay import verify_first_replay, verify_second_replay
from graphs.guards.guard_walk import guards_of
from graphs.guards.python_guards import Guards
from graphs.observation.operations import EagerTrace
from graphs.observation.timing import time_call
from graphs.python_reads.code_reads import CodeReads
from graphs.recording.recorder import Recorder
from graphs.rehearsal.record_body import record_body
from graphs.rehearsal.rehearsal import Rehearsal
from graphs.rehearsal.returned_tensors import links_to
from graphs.rehearsal.step import Checkpoint, Step
from graphs.rehearsal.tried_step import TriedStep, tried
from graphs.rewriting.proof import Proof, prove, unmerged
from graphs.rewriting.rewritten_step import RewrittenStep
from graphs.state.counters import Counter
from graphs.state.storage import storage_id
from graphs.state.tensor_state import RandomState

Tensor = torch.Tensor
_ENOUGH = 0.3  # seconds of timing a step, eager and replayed each; on a GPU three runs of most take less


def record_key(step: Step, recorder: Recorder, *, owned: bool, check: bool, known: Sequence[RecordedStep] = ()) -> RecordedStep:
    """Record one key. On return the state is the one before the call: the caller replays.

    Args:
        known: recordings of steps that were tried: of a further size of one, A, R, the recording, V and P are all.

    Raises:
        Deferred: the step initialised itself; it ran once, for real.
        Refused: the step cannot be recorded; it ran once, for real.
        RowsInteract: it cannot be recorded at ``step.rows`` rows; nothing ran, as far as state shows.
    """
    started = time.perf_counter()
    origin, reads = Checkpoint(step), CodeReads()
    output, trace = observe(step, origin, reads)
    call = FirstCall(step, origin, output, trace)
    with call.counts():
        like, beside = _like(step, trace, reads, known)
        seen = examine(call, reads, beside)
        if like is not None and not seen.changed:
            entry = _record_further(call, recorder, like, owned=owned, check=check)
            return _guarded(entry, call, reads, [], started, beside)
        advanced = require_steady(call, recorder, seen)
        record = functools.partial(_record, call, recorder=recorder, counters=advanced, owned=owned, check=check)
        return _guarded(record_compiled(step, trace, record), call, reads, advanced, started)


def _like(
    step: Step, trace: EagerTrace, reads: CodeReads, known: Sequence[RecordedStep]
) -> tuple[TriedStep | None, Guards | None]:
    """The step that was tried of which a call is another size, and guards of a recording of it that answer for the call too."""
    tried = {id(one.tried): one.tried for one in known if one.tried is not None}
    like = next((one for one in tried.values() if one.covers(step, trace)), None)
    if like is None:
        return None, None
    serving = (one.guards.serving(reads) for one in known if one.tried is like)
    return like, next((guards for guards in serving if guards is not None), None)


def _guarded(
    entry: RecordedStep,
    call: FirstCall,
    reads: CodeReads,
    advanced: Sequence[Counter],
    started: float,
    beside: Guards | None = None,
) -> RecordedStep:
    """The recording with the guards that it is allowed to be replayed under; those ``beside`` it has in common with others."""
    step, statics = call.step, entry.statics
    call.trace.written.release()
    entry.written.forget(step.call.tensors[index] for index in entry.contract.written)
    links = [*statics.links, *links_to(entry.template.held, call.start.python)]
    opaques = list(zip(step.opaque_names, step.call.opaques, strict=True))
    asked = [*{id(tensor): tensor for tensor in call.trace.placed}.values()]
    guards = guards_of(reads, step.roots(), advanced, links, entry.uploads, statics.placed, opaques, asked, beside)
    statics.links.clear()  # they hold objects on the way, and are guarded now
    caught = step.device.type == "cpu" and catches(reads)  # on a device no operator raises
    seconds = time.perf_counter() - started
    asks = bool(asked)
    return dataclasses.replace(
        entry, guards=guards, catches=caught, capture_seconds=seconds, asks_memory=asks, replaced=step.replaced
    )


class _Body(NamedTuple):
    """What is to be recorded: the model, or a candidate for it, that was compared with the model."""

    step: Step
    externals: list[Tensor]
    template: OutputTemplate
    proof: Proof


def _record(
    call: FirstCall, step: Step, *, recorder: Recorder, counters: Sequence[Counter], owned: bool, check: bool
) -> RecordedStep:
    """C, R, the recording, V and P. Raises a `Refusal`; the state is as ``call.start`` on return.

    Where the step has a candidate for its model, C and P still run the model, and R and the recording the candidate.
    """
    rehearsal, tensors, plain = Rehearsal(call.start, call.trace), step.call.tensors, step.without_candidate()
    contract, moving = _contract(step, call)
    stand_ins = contract.arrange(contract.filled(tensors), tensors)
    seen = run_on_stand_ins(call, plain, recorder, rehearsal, contract, stand_ins, counters)
    if moving and (seen.trace.findings or counters or plain is not step):
        raise MovedStaticTensor("it is written, and lies elsewhere at each call", operator=step.names[moving[0]])
    body = _body(step, rehearsal, seen, stand_ins, counters, check=check)
    if body is None:  # more is known of the step now
        return _record(call, plain, recorder=recorder, counters=counters, owned=owned, check=check)
    if body.step is not step or plain is not step:
        plain = dataclasses.replace(plain, form=body.template)
    padding = PaddingProof(plain, contract, rehearsal, body.externals) if step.rows is not None else None
    reference, state = rehearsal.run(lambda: _warm_up(body, recorder, contract, stand_ins, call.trace))
    dims = (None,) * len(reference) if padding is None else padding.output_dims(reference)
    entry = _recorded(body, recorder, dataclasses.replace(contract, output_dims=dims), rehearsal, stand_ins, owned=owned)
    if check:
        rehearsal.run(lambda: verify_first_replay(entry, tensors, step.real, reference, state))
        if counters:
            verify_second_replay(plain, entry, rehearsal, stand_ins)
    if padding is not None and not step.is_dummy:
        rehearsal.run(lambda: padding.prove(entry))
    between = rehearsal.reset if counters else rehearsal.rewind
    timed = functools.partial(time_call, device=step.device, before=between, enough=_ENOUGH)
    eager = rehearsal.run(lambda: timed(lambda: plain.run(stand_ins)))
    replay = rehearsal.run(lambda: timed(lambda: entry.recording.replay(tensors, step.real)))
    as_it_is = entry.checked is None and entry.candidate is None and not counters
    known = tried(step, call.trace) if as_it_is else None
    return dataclasses.replace(entry, eager=eager, replay=replay, tried=known)


def _record_further(call: FirstCall, recorder: Recorder, like: TriedStep, *, owned: bool, check: bool) -> RecordedStep:
    """R, the recording, V and P of a step that was tried at another size. Raises and leaves the state as `_record` does."""
    step, trace, rehearsal = call.step, call.trace, Rehearsal(call.start, call.trace)
    tensors, given = step.call.tensors, {storage_id(tensor) for tensor in step.call.tensors}
    contract, _ = _contract(step, call)
    stand_ins = contract.arrange(contract.filled(tensors), tensors)
    externals = [tensor for storage, tensor in trace.externals.items() if storage not in given]
    template = step.template(call.output, tensors, externals)[0]
    body = _Body(step, externals, template, Proof())
    padding = PaddingProof(step, contract, rehearsal, externals) if step.rows is not None else None
    reference, state = rehearsal.run(lambda: _warm_up(body, recorder, contract, stand_ins, trace))
    dims = (None,) * len(reference) if padding is None else padding.output_dims(reference)
    entry = _recorded(body, recorder, dataclasses.replace(contract, output_dims=dims), rehearsal, stand_ins, owned=owned)
    if check:
        rehearsal.run(lambda: verify_first_replay(entry, tensors, step.real, reference, state))
    if padding is not None and not step.is_dummy:
        rehearsal.run(lambda: padding.prove(entry))
    return dataclasses.replace(entry, tried=like)


def _contract(step: Step, call: FirstCall) -> tuple[Contract, list[int]]:
    """Which arguments are copied, and which of those are written and lie elsewhere at each call.

    Read in place are also arguments that are tensors of the step's own, which it knows again: their copies it would not.
    """
    tensors, trace = step.call.tensors, call.trace
    own = {id(owner.value) for owner in call.start.python.owners} if step.rows is None else set[int]()
    known = [index for index, tensor in enumerate(tensors) if id(tensor) in own]
    in_place = {*step.static, *sharing(tensors, trace.written.tensors), *known}
    given = {storage_id(tensor) for tensor in tensors}
    others = [tensor for storage, tensor in trace.externals.items() if storage not in given]
    moving = [index for index in in_place & step.moving if alone(index, tensors, others)] if step.rows is None else []
    static = sorted(in_place - {*moving})
    return make_contract(step.names, tensors, static, step.padding, step.batch_dims, step.rows, moving, step.host), moving


def _body(
    step: Step, rehearsal: Rehearsal, seen: OnStandIns, stand_ins: list[Tensor], counters: Sequence[Counter], *, check: bool
) -> _Body | None:
    """What is to be recorded; None where something was learned on the way that run C has to know."""
    trace, externals = rehearsal.first, seen.externals
    if seen.trace.findings or counters:
        step = without_host_values(step, rehearsal, seen.trace, stand_ins, counters)
    else:
        step = with_operators(step, rehearsal, seen.trace, stand_ins)
    if isinstance(step.model, RewrittenStep):
        if cover(trace, step.model, step.call.tensors):
            return None
        externals = list(trace.externals.values())
    if step.plain is None:
        return _Body(step, externals, seen.template, Proof())
    template = compare_candidate(step, rehearsal, trace, stand_ins, externals, check=check)
    proof = prove(step, rehearsal, stand_ins, template) if check else Proof()
    if unmerged(step, proof):
        return None
    return _Body(dataclasses.replace(step, form=template), externals, template, proof)


@first_call_run("R", "warm-up and reference")
def _warm_up(
    body: _Body, recorder: Recorder, contract: Contract, stand_ins: list[Tensor], trace: EagerTrace
) -> tuple[list[Tensor], list[Tensor]]:
    """Run R: the outputs, and copies of all that was written.

    Raises:
        VerifyMismatch: what is recorded assumes what does not hold for the very call that it is made for.
    """
    step = body.step
    prepare(step)
    reference: list[Tensor] = ran(step, lambda: recorder.run(lambda: step.produced(stand_ins, body.externals)))
    if isinstance(step.model, RewrittenStep):
        step.model.require_held()
    contract.write_back(stand_ins, step.call.tensors)
    return reference, trace.written.copies()


def _recorded(
    body: _Body, recorder: Recorder, contract: Contract, rehearsal: Rehearsal, stand_ins: list[Tensor], *, owned: bool
) -> RecordedStep:
    """The recording, with everything that a replay needs."""
    step, tensors, trace, free = body.step, body.step.call.tensors, rehearsal.first, _free_memory(body.step.device)

    def run(given: Sequence[Tensor]) -> list[Tensor]:
        return step.produced(given, body.externals)

    recording = record_body(run, recorder, contract, tensors, rehearsal, owned=owned)
    draws = _draws(step.device, trace)
    checked = step.model.checked(recording, draws) if isinstance(step.model, RewrittenStep) else None
    return RecordedStep(
        checked or recording,
        contract,
        body.template,
        _statics(body, contract, rehearsal),
        [reference_to(opaque) for opaque in step.call.opaques],
        body.externals,
        trace.written,
        step.shapes(stand_ins),
        device_free_delta=free - _free_memory(step.device),
        candidate=None if step.plain is None else step.model,
        checked=checked,
        uploads=_uploads(step),
        rewrites=_rewrites(step),
        proof=body.proof,
        on_device=step.device.type == "cuda",
        left_open=step.rows is not None and step.is_dummy,
        generators=[*trace.generators] if draws is not None else None,
        bumped=_bumped(trace, tensors),
        bumped_arguments=[
            i for i in contract.static if storage_id(tensors[i]) in trace.written and not tensors[i].is_inference()
        ],
    )


def _statics(body: _Body, contract: Contract, rehearsal: Rehearsal) -> StaticTensors:
    step, tensors = body.step, body.step.call.tensors
    copied = {storage_id(tensors[index]) for index in contract.written}
    return StaticTensors(
        [(index, step.names[index], tensors[index]) for index in contract.static],
        body.externals,
        [tensor for tensor in rehearsal.first.written.tensors if storage_id(tensor) not in copied],
        rehearsal.start.python.owners,
        contract.longest,
        contract.written,
        [index for index, _ in contract.same],
        tensors,
    )


def _uploads(step: Step) -> list[Tensor]:
    """Host tensors that a rewritten graph uploaded once: writing to one of them makes the recording out of date."""
    return list(step.model.uploaded) if isinstance(step.model, RewrittenStep) else []


def _rewrites(step: Step) -> dict[str, int]:
    """How often passes put an operator of this project in the place of many, in a step that is recorded uncompiled."""
    changes = step.model.changes if isinstance(step.model, RewrittenStep) else []
    return dict(Counts(change.by for change in changes if change.by in REWRITES))


def _is_counted(tensor: Tensor, trace: EagerTrace) -> bool:
    """Whether autograd counts the step's writes of a tensor."""
    return storage_id(tensor) in trace.written and not tensor.is_inference()


def _bumped(trace: EagerTrace, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of the step's own that it writes, as it has them: autograd counts their writes."""
    given = {storage_id(tensor) for tensor in tensors}
    return [
        tensor
        for storage, tensor in trace.externals.items()
        if storage in trace.written and storage not in given and not tensor.is_inference()
    ]


def _draws(device: torch.device, trace: EagerTrace) -> Callable[[], RandomState] | None:
    """What saves the random generators before a replay that may have to be undone; None where the step draws nothing."""
    seeded = any(torch.Tag.nondeterministic_seeded in operation.func.tags for operation in trace.operations)
    return (lambda: RandomState(device, {g: g.get_state() for g in trace.generators})) if seeded else None


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
