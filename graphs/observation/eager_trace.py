"""Watching one step run: every operator, host syncs, host constants, what it reads in place and what it writes.

Two modes see everything on any device and need no driver: a dispatch mode sees operators (`watching`), a function mode sees the
conversions that never reach the dispatcher on CPU tensors (`conversions`: ``tolist``, ``numpy``, ``cpu``, ``print``). The watched
run is an ordinary eager run: its outputs and effects are real.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from graphs.errors import Site, StepRaises, UndeclaredWrite
from graphs.observation.conversions import Conversions
from graphs.observation.fused_modules import unnoticed
from graphs.observation.grad_questions import grad_questions
from graphs.observation.operations import EagerTrace, Operation
from graphs.observation.watching import Watching, raw_launches
from passes.core.composites import as_written, is_dynamo_there
from passes.core.source_location import is_user

Tensor = torch.Tensor


def trace_again(fn: Callable[[], Any], arguments: list[Tensor], before: EagerTrace) -> tuple[Any, EagerTrace]:
    """Watch another run of a step; what it writes beyond what ``before`` saved is put back, also when it raises.

    So are generators that it draws from and ``before`` did not. `EagerTrace.written` tells what was written. What ``before``
    is the caller's to restore.
    """
    trace = EagerTrace()
    try:
        return trace_eager(fn, arguments, before, trace)
    finally:
        trace.written.restore()
        for generator, state in trace.generators.items():
            if generator not in before.generators:
                generator.set_state(state)


def trace_eager(
    fn: Callable[[], Any], arguments: list[Tensor], before: EagerTrace | None = None, into: EagerTrace | None = None
) -> tuple[Any, EagerTrace]:
    """Run ``fn`` once, eagerly and for real, and return its output with the trace.

    Args:
        fn: the step with its arguments bound.
        arguments: the tensor arguments, so that they are not taken for externals.
        before: the trace of an earlier run of the same step. Other elements of storages that it wrote are saved there, so
            `EagerTrace.written` holds only storages that are written in addition, and checksums are not taken.
        into: the trace to fill, for callers that need it when ``fn`` raises.
    """
    trace = into if into is not None else EagerTrace()
    watch = Watching(trace, arguments, before)
    conversions = Conversions(watch)
    asking = grad_questions(conversions.asked_by, is_user) if conversions.grad_mode else contextlib.nullcontext()
    had_dynamo = is_dynamo_there()
    with as_written(), raw_launches(watch), unnoticed(), asking, conversions, watch:
        output = fn()
    trace.imported_dynamo = is_dynamo_there() and not had_dynamo
    for operator, frame, error in watch.raised:
        detail = f"the step catches the {type(error).__name__} that an operator raises with this call's data"
        trace.found(StepRaises(detail, operator=operator, site=Site.at(frame)))
    known = [trace.written, *([before.written] if before is not None else [])]
    written = trace.lent.changed(known)
    trace.written.also(written)
    for tensor in written.tensors:
        detail = f"memory of a tensor{tuple(tensor.shape)} that NumPy was given is written, which no operator says"
        trace.found(UndeclaredWrite(detail, operator="Tensor.numpy"))
    for storage in watch.checksums.changed(trace.externals, trace.written):
        by = _last_reader(trace, storage)
        detail = f"a tensor{tuple(trace.externals[storage].shape)} changed though no operator says that it writes it"
        trace.found(UndeclaredWrite(detail, operator=str(by.func), site=by.site))
    return output, trace


def _last_reader(trace: EagerTrace, storage: int) -> Operation:
    """The operator that a write to an external is most likely to come from: the last that was given it, not ATen's."""
    readers = [o for o in trace.operations if _mentions(o.arguments, ("external", storage))]
    foreign = [o for o in readers if o.func.namespace != "aten"]
    return (foreign or readers)[-1]


def _mentions(value: Any, origin: tuple[str, int]) -> bool:
    return value == origin or (isinstance(value, tuple) and any(_mentions(item, origin) for item in value))
