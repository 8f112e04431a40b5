"""Handing a step to a recorder, and naming the line where the device refuses."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphs.contract.slots import Contract
from graphs.errors import CaptureFailed, UnsupportedOperator
from graphs.events.ranges import first_call_run
from graphs.observation.last_operator import last_operation
from graphs.observation.operations import EagerTrace
from graphs.recording.recorder import Body, Recorder, Recording
from graphs.rehearsal.rehearsal import Runs

Tensor = torch.Tensor


@first_call_run("", "recording")
def record_body(
    body: Body,
    recorder: Recorder,
    contract: Contract,
    tensors: Sequence[Tensor],
    runs: Runs,
    *,
    owned: bool,
) -> Recording:
    """The recording of ``body``; when the device refuses, the operator at fault is found by recording once more, watched.

    Raises:
        UnsupportedOperator: an operator cannot be recorded on this device.
        CaptureFailed: the device refused.
    """
    trace = runs.first
    _require_supported(trace, recorder)
    generators = tuple(trace.generators)

    def record(given: Body) -> Recording:
        return runs.run(lambda: recorder.record(given, contract, tensors, owned=owned, generators=generators))

    try:
        return record(body)
    except UnsupportedOperator as unsupported:
        found = [o.site for o in trace.operations if str(o.func) == unsupported.operator]
        site = found[0] if found else unsupported.site
        raise UnsupportedOperator(unsupported.detail, operator=unsupported.operator, site=site) from unsupported
    except CaptureFailed as failure:
        watched, last = last_operation(body)
        try:
            record(watched)
        except CaptureFailed:
            raise CaptureFailed(failure.detail, operator=last.operator, site=last.site) from failure
        raise


def _require_supported(trace: EagerTrace, recorder: Recorder) -> None:
    for operation in trace.operations:
        why = recorder.refuses(str(operation.func))
        if why is not None:
            raise UnsupportedOperator(why, operator=str(operation.func), site=operation.site)
