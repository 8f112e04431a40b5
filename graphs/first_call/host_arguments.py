"""Small host tensors among the arguments of a step on a device: a temperature, lengths.

In eager the host reads them, or copies them to the device. A recording gives each a slot on the device, which a replay fills from
pinned memory (`graphs.recording.host_ring`). So what is recorded is the step on *device copies* of them, and it has to be shown
that it does the same there. Before the first call's runs, from one state and undone:

    A   watched, on the arguments as they are
    S   watched, on the device copies: the same operators on the same numbers, but for copies to the device, which have
        become needless, and outputs on the same devices

After it, a replay is compared with an eager run on the arguments as they are. What the step reads of a device copy on the host
(`.item()`, a branch) is what it would be of any tensor on the device: taken out by the passes, or refused by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from graphs.contract.arguments import Call, replace_tensors
from graphs.contract.slots import Traits, physical
from graphs.errors import MixedDevices, Refusal, UnsupportedOutput
from graphs.first_call.observe import irreversible_change, observe
from graphs.first_call.outcomes import Deferred, FirstCall, Refused
from graphs.first_call.record_key import record_key
from graphs.first_call.recorded_step import RecordedStep
from graphs.first_call.verify_replay import compare_replay
from graphs.observation.eager_trace import trace_again
from graphs.observation.operations import EagerTrace, Operation, TensorUse
from graphs.python_reads.code_reads import CodeReads
from graphs.recording.recorder import Recorder
from graphs.rehearsal.compare_stand_ins import compare_with_stand_ins
from graphs.rehearsal.rehearsal import Rehearsal
from graphs.rehearsal.step import Checkpoint, Step
from graphs.state.storage import storage_id

Tensor = torch.Tensor
aten = torch.ops.aten
_TO_DEVICE = "keep what the step makes of a host tensor on the device, or pass it as a device tensor"


def on_device(step: Step) -> Step:
    """The step with device copies in the place of its host arguments: one object twice is one copy twice."""
    copies = {id(step.call.tensors[index]): _copied(step.call.tensors[index], step.device) for index in step.host}
    tensors = [copies.get(id(tensor), tensor) for tensor in step.call.tensors]
    args, kwargs = replace_tensors((step.args, step.kwargs), iter(tensors))
    call = Call(tensors, step.call.opaques, step.call.signature, args, kwargs)
    return dataclasses.replace(step, call=call, args=args, kwargs=kwargs)


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    traits = Traits.of(tensor)
    with torch.inference_mode(traits.inference), torch.no_grad():
        memory = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        memory.copy_(physical(tensor))
    return traits.given_to(memory)


def record_key_on_device(step: Step, recorder: Recorder, *, owned: bool, check: bool) -> RecordedStep:
    """`record_key` for a step with host arguments. On return the state is the one before the call.

    Raises:
        Deferred, Refused: as there; the call ran for real on the arguments as they are.
    """
    origin, reads = Checkpoint(step), CodeReads()
    output, trace = observe(step, origin, reads)
    call = FirstCall(step, origin, output, trace)
    change = irreversible_change(origin)
    if change is not None:
        raise call.refused(change, undoable=False)
    if reads.refusals:
        raise call.deferred(reads.refusals[0].operator, reads.refusals[0])
    rehearsal, copied = Rehearsal(origin, trace), on_device(step)
    try:
        refusal = _in_place(step, trace) or _compare(copied, recorder, rehearsal, call)
        rehearsal.reset()
    except BaseException:  # an interrupt: the call has not taken place
        rehearsal.undo()
        raise
    if refusal is None:
        return _recorded(call, copied, recorder, owned=owned, check=check)
    raise Refused(step.run(), [refusal], call.undo)


def _recorded(call: FirstCall, copied: Step, recorder: Recorder, *, owned: bool, check: bool) -> RecordedStep:
    """The first call on device copies; where that ran the step for real, it is undone and runs on the arguments as they are."""
    step, undo = call.step, call.undo
    try:
        entry = record_key(copied, recorder, owned=owned, check=check)
    except Refused as refused:
        if refused.undo is None:
            raise
        refused.undo()
        raise Refused(step.run(), refused.refusals, undo) from refused
    except Deferred as deferred:
        deferred.undo()
        raise Deferred(step.run(), str(deferred), undo, deferred.refusal) from deferred
    entry = dataclasses.replace(entry, from_host=True)
    mismatch = compare_replay(step, entry, step.real) if check else None
    if mismatch is not None:
        raise Refused(step.run(), [mismatch], undo)
    return entry


def _in_place(step: Step, trace: EagerTrace) -> MixedDevices | None:
    """A host argument that is to be used in place, which a recording on the device cannot."""
    for index in step.host:
        if index in step.static:
            return MixedDevices("a host tensor is declared static", operator=step.names[index], remedy=_TO_DEVICE)
        if storage_id(step.call.tensors[index]) in trace.written:
            return MixedDevices("the step writes a host tensor that it is given", operator=step.names[index], remedy=_TO_DEVICE)
    return None


def _compare(copied: Step, recorder: Recorder, rehearsal: Rehearsal, call: FirstCall) -> Refusal | None:
    """Run S, and what it does otherwise than run A, as a refusal."""
    step, first = call.step, call.trace
    names = ", ".join(step.names[index] for index in step.host)
    tensors = copied.call.tensors
    try:
        ran: Any = rehearsal.run(lambda: recorder.run(lambda: trace_again(copied.run, tensors, first)))
    except Exception as error:  # an operator that takes host tensors only
        detail = f"the step raises on a device copy of it: {type(error).__name__}: {error}".splitlines()[0]
        return MixedDevices(detail, operator=names)
    result, second = ran
    found = compare_with_stand_ins(_without_devices(first), _without_devices(second), step.call.tensors, strides=True)
    if found is not None:
        detail = f"the step does otherwise with a device copy of {names}: {found.detail}"
        return MixedDevices(detail, operator=found.operator, site=found.site)
    return _on_other_devices(_made(step, call.output, first), _made(copied, result, second))


def _made(step: Step, output: Any, trace: EagerTrace) -> list[Tensor]:
    return step.template(output, step.call.tensors, list(trace.externals.values()))[1]


def _on_other_devices(expected: Sequence[Tensor], produced: Sequence[Tensor]) -> UnsupportedOutput | None:
    """An output that eager leaves on the host and a replay would make on the device."""
    if len(expected) != len(produced):
        return UnsupportedOutput("a host argument is returned as a copy of itself", operator="output", remedy=_TO_DEVICE)
    for index, (a, b) in enumerate(zip(expected, produced, strict=True)):
        if a.device != b.device:
            return UnsupportedOutput("it is made of host tensors alone", operator=f"output {index}", remedy=_TO_DEVICE)
    return None


def _without_devices(trace: EagerTrace) -> EagerTrace:
    """The trace as it reads wherever the tensors are: without copies of host tensors to a device, and without devices."""
    origins: dict[int, tuple[str, int]] = {}
    kept: list[Operation] = []

    def seen(value: Any) -> Any:
        if isinstance(value, TensorUse):
            kind, which = value.origin
            return value._replace(device="", origin=origins[which] if kind == "operation" else value.origin)
        return tuple(map(seen, value)) if type(value) is tuple else value

    for index, operation in enumerate(trace.operations):
        arguments = seen(operation.arguments)
        if _only_moves(operation):
            origins[index] = arguments[0].origin
            continue
        origins[index] = ("operation", len(kept))
        kept.append(dataclasses.replace(operation, arguments=arguments))
    return dataclasses.replace(trace, operations=kept)


def _only_moves(operation: Operation) -> bool:
    """Whether an operator copies a host tensor to a device and does nothing else."""
    if operation.func is not aten._to_copy.default or operation.arguments[0].device != "cpu":
        return False
    given = dict(operation.arguments[1:])
    device, dtype = given.get("device"), given.get("dtype")
    return device is not None and torch.device(device).type != "cpu" and dtype in (None, operation.arguments[0].dtype)
