"""A step with a candidate in the model's place: made by the passes, and compared with the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

import passes
from graphs.contract.outputs.template import OutputTemplate, map_output
from graphs.errors import ChangingValue, HostSync, Refusal, RowsInteract, UnsupportedOutput, VerifyMismatch
from graphs.events.listeners import logger
from graphs.first_call.candidates import compile_rewritten
from graphs.first_call.outcomes import ran
from graphs.numerics.judge import Rerun, candidate_difference
from graphs.observation.operations import EagerTrace
from graphs.ops.mhc.tiles import few
from graphs.rehearsal.rehearsal import Rehearsal
from graphs.rehearsal.step import Step
from graphs.rewriting.rewritten_step import RewrittenStep, rewrite
from graphs.state.counters import Counter, Counters
from graphs.state.storage import storage_id

Tensor = torch.Tensor


def without_host_values(
    step: Step, rehearsal: Rehearsal, watched: EagerTrace, stand_ins: list[Tensor], counters: Sequence[Counter]
) -> Step:
    """The step with the graph that the passes make of it in the model's place.

    Raises:
        Refusal: they cannot, or (`RowsInteract`) not for padded rows.
    """

    def rewritten() -> RewrittenStep:
        advanced = Counters(counters, step.device) if counters else None
        return rewrite(step.without_candidate(), watched, stand_ins, advanced)

    try:
        candidate = rehearsal.run(rewritten)
    except Refusal:
        raise
    except Exception as error:
        raise _not_traced(watched, counters, error) from error
    if candidate.assumption is not None and step.rows is not None:
        raise RowsInteract("the step depends on host values, which padded rows take part in")
    return compile_rewritten(step, candidate)


def with_operators(step: Step, rehearsal: Rehearsal, watched: EagerTrace, stand_ins: list[Tensor]) -> Step:
    """The step as a graph with operators of this project in the place of what they compute; itself where there is none of that.

    Where a step is compiled, the passes run on what the compiler makes of it.
    """
    if step.plain is not None or not step.compiler_options.operators(step.device) or not _may_be_connected(watched):
        return step
    traced = dataclasses.replace(step, passes=())  # nothing has to be taken out of it
    try:
        candidate = compile_rewritten(step, rehearsal.run(lambda: rewrite(traced, watched, stand_ins)))
    except Exception as error:  # whatever a trace fails with, the step is recorded as it is
        reason = str(error).strip().partition("\n")[0]
        logger.warning("hyper-connections run operator by operator: the step could not be traced: %s", reason)
        return step
    made = candidate.model
    assert isinstance(made, RewrittenStep)
    is_used = any(change.by == passes.hyper_connections.__name__ for change in made.changes)
    return candidate if is_used and made.assumption is None else step


def _may_be_connected(watched: EagerTrace) -> bool:
    """Whether an operator ran that may be the product with the linear layer of a hyper-connection."""
    products = (one.arguments for one in watched.operations if one.func is torch.ops.aten.mm.default)
    return any(passes.may_be_connection(x.shape, layer.shape, few) for x, layer, *_ in products)


def _not_traced(watched: EagerTrace, counters: Sequence[Counter], error: Exception) -> Refusal:
    """The refusal for a step that cannot be traced: what was found in it stays in the way."""
    if not watched.findings:
        path = counters[0].path
        detail = f"{path} is advanced by the step, which could not be traced: {type(error).__name__}: {error}"
        return ChangingValue(detail, operator=path)
    found = watched.findings[0]
    detail = f"{found.detail}; the step could not be traced: {type(error).__name__}: {str(error).splitlines()[0]}"
    return type(found)(detail, operator=found.operator, site=found.site)


def cover(trace: EagerTrace, rewritten: Any, tensors: Sequence[Tensor]) -> bool:
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


def prepare(step: Step) -> None:
    """What a candidate needs before it is run outside of a recording."""
    if isinstance(step.model, RewrittenStep):
        step.model.prepare()


def _require_advanced(counters: Counters, expected: Sequence[int]) -> None:
    """Raise where the step has not advanced its numbers as its graph does."""
    for counter, value in zip(counters.counters, expected, strict=True):
        if counter.value != value:
            detail = f"{counter.path} is {counter.value} after the step, and {value} after its graph"
            raise VerifyMismatch(detail, operator=counter.path)


def compare_candidate(
    step: Step, rehearsal: Rehearsal, trace: EagerTrace, stand_ins: list[Tensor], externals: list[Tensor], *, check: bool
) -> OutputTemplate:
    """Run the candidate for the first time, which may compile it, and compare it with the model.

    Returns the template of its output: what the model hands through on one side of a branch, the candidate makes.
    """
    plain, counters = step.without_candidate(), step.model.counters if isinstance(step.model, RewrittenStep) else None

    def eager() -> tuple[OutputTemplate, Any, list[Tensor]]:
        expected = counters.next_values() if counters is not None else []
        returned = ran(plain, lambda: plain.run(stand_ins))
        if counters is not None:
            _require_advanced(counters, expected)
        exact = plain.template(returned, stand_ins, externals)[0]
        output = map_output(returned, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)
        return exact, output, trace.written.copies()

    exact, output, state = rehearsal.run(eager)
    if exact.hung:
        raise UnsupportedOutput("attributes are set on an output tensor, which only the step itself does", operator="output")

    def candidate() -> OutputTemplate:
        prepare(step)
        template, produced = step.template(step.run(stand_ins), stand_ins, externals)
        if template.identities != exact.identities:
            detail = "other parts of it are one object when a candidate runs in the place of the model"
            raise VerifyMismatch(detail, operator="output")
        expected, produced = template.tensors(output), template.seen(produced)
        fetched = [i for i, (a, b) in enumerate(zip(expected, produced, strict=True)) if a.device != b.device]
        if fetched:
            raise HostSync(f"output {fetched[0]} is a tensor of the host that holds values of the device", operator="output")
        rerun = Rerun(rehearsal.reset, lambda: template.tensors(plain.run(stand_ins)), trace.written)
        found = candidate_difference(expected, produced, state, rerun) if check else None
        if found is not None:
            raise VerifyMismatch(f"{found[1]} when a candidate runs in the place of the model", operator=found[0])
        return template

    return rehearsal.run(candidate)
