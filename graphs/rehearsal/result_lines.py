"""The user's line that a wrong result comes from: of the operator that made an output, or wrote a tensor last."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphs.errors import Refusal, Site, VerifyMismatch
from graphs.observation.operations import EagerTrace, Operation
from graphs.state.storage import has_storage, storage_id

Tensor = torch.Tensor


def lines_of_results(trace: EagerTrace, outputs: Sequence[Tensor], first: EagerTrace) -> dict[str, Site]:
    """Lines by what `verify.run_difference` calls a result.

    Args:
        trace: of the run that made ``outputs``.
        first: of the first run, which saved the tensors that the step writes.
    """
    found = {}
    for index, tensor in enumerate(outputs):
        kind, which = trace.origins.get(storage_id(tensor), ("", 0)) if has_storage(tensor) else ("", 0)
        if kind == "operation":
            found[f"output {index}"] = trace.operations[which].site
    for index, region in enumerate(first.written.regions):
        origin = first.origins.get(region.storage)
        writer = next((o for o in reversed(first.operations) if _writes(o, origin)), None)
        if writer is not None:
            found[f"state written by the step, tensor {index}"] = writer.site
    return found


def _writes(operation: Operation, origin: tuple[str, int] | None) -> bool:
    return any(tensor.origin == origin for tensor in operation.written())


def with_line(refusal: Refusal, trace: EagerTrace) -> Refusal:
    """A mismatch with the line of the result that differs, where it is known; another refusal as it is."""
    site = trace.made_at.get(refusal.operator)
    if not isinstance(refusal, VerifyMismatch) or refusal.site.file or site is None:
        return refusal
    return VerifyMismatch(refusal.detail, operator=refusal.operator, site=site, remedy=refusal.remedy)
