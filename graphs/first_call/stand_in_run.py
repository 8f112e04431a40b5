"""Run C: the step at its recorded size, on stand-ins for the arguments that a recording copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from graphs.contract.outputs.template import OutputTemplate, compare_templates
from graphs.contract.slots import Contract
from graphs.errors import ChangingValue, Refusal, RowsInteract
from graphs.events.ranges import first_call_run
from graphs.first_call.outcomes import FirstCall, raised_again
from graphs.observation.operations import EagerTrace
from graphs.recording.recorder import Recorder
from graphs.rehearsal.compare_stand_ins import compare_with_stand_ins, reads_by_layout
from graphs.rehearsal.rehearsal import Rehearsal, Rehearsed
from graphs.rehearsal.result_lines import lines_of_results
from graphs.rehearsal.returned_tensors import adopt_returned
from graphs.rehearsal.step import Step
from graphs.state.counters import Counter
from graphs.state.storage import storage_id

Tensor = torch.Tensor


class OnStandIns(NamedTuple):
    """What run C tells.

    Attributes:
        externals: the tensors that the recording reads in place.
        template: of the recording's output.
        trace: its operators.
    """

    externals: list[Tensor]
    template: OutputTemplate
    trace: EagerTrace


@first_call_run("C", "on stand-ins")
def run_on_stand_ins(
    call: FirstCall,
    step: Step,
    recorder: Recorder,
    rehearsal: Rehearsal,
    contract: Contract,
    stand_ins: list[Tensor],
    counters: Sequence[Counter],
) -> OnStandIns:
    """Run C, compared with run A.

    Only here is an argument told apart from the step's own tensor that it happens to be, and a padded batch from the
    call's: the same tensors must be written, and at exact sizes the same operators run on the same numbers and layouts.

    Raises:
        Refusal: it does otherwise.
    """
    seen = rehearsal.watched(recorder.run, lambda: step.run(stand_ins), stand_ins)
    if seen.error is not None:
        raise raised_again(step, seen.error) from seen.error
    adopt_returned(seen.trace, seen.output, rehearsal.start.python)
    differing = RowsInteract if step.rows is not None else ChangingValue
    if seen.counters != list(counters) and seen.changes:
        path = seen.changes[0].path
        detail = f"{path} is changed when the arguments are copies: the step asks which object an argument is"
        raise RowsInteract(detail) if step.rows is not None else ChangingValue(detail, operator=path)
    written = {storage_id(stand_ins[index]) for index in contract.written}
    if any(storage_id(tensor) not in written for tensor in seen.trace.written.tensors):
        raise differing("a tensor is written only when the arguments are copies or padded")
    refusal = _otherwise(call.trace, seen.trace, step, contract)
    if refusal is not None:
        raise refusal
    externals = list(seen.trace.externals.values())
    template = step.template(seen.output, stand_ins, externals)[0]
    refusal = _other_output(call, step, seen, template)
    if refusal is not None:
        raise differing(refusal.detail)
    return OnStandIns(externals, template, seen.trace)


def _otherwise(first: EagerTrace, trace: EagerTrace, step: Step, contract: Contract) -> Refusal | None:
    """What run C does otherwise than run A."""
    tensors = step.call.tensors
    refusal: Refusal | None = reads_by_layout(trace, contract.scattered(tensors))
    if refusal is None and step.rows is None:  # padded, a copy may become a view
        return compare_with_stand_ins(first, trace, tensors, strides=contract.keeps_strides)
    if refusal is None and step.rows == 1 and compare_with_stand_ins(first, trace, tensors, strides=False):
        return RowsInteract("another layout of the arguments gives other numbers, and a single row proves no more", unproved=True)
    return refusal


def _other_output(call: FirstCall, step: Step, seen: Rehearsed, template: OutputTemplate) -> Refusal | None:
    """Whether the output of run C is put together otherwise than that of run A."""
    first = call.trace
    first.made_at = lines_of_results(seen.trace, template.tensors(seen.output), first)
    exact: tuple[OutputTemplate, Any] = step.template(call.output, step.call.tensors, list(first.externals.values()))
    return compare_templates(exact[0].structure, template.structure, arguments=False)
