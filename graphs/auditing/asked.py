"""What the passes really do with a step: asked of the rewriter, so that an audit promises what a capture keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from graphs.auditing.finding import Finding
from graphs.auditing.observe import Observation
from graphs.auditing.remedies import HOST_CONSTANT
from graphs.errors import Refusal
from graphs.rehearsal.rehearsal import Rehearsal
from graphs.rehearsal.step import Checkpoint
from graphs.rewriting.rewritten_step import is_removable, rewrite

_PASSES = ("constants", "addressing", "arithmetic", "bounded", "branches")


def kept_promises(seen: Observation, found: Sequence[Finding]) -> list[Finding]:
    """The findings, with what to write instead at the line where the passes give up.

    The step is traced and rewritten as for a recording, on tensors without data, and put back. Where something else keeps it
    from being recorded, or it changes Python state, the passes are not asked: what they do then depends on how that is changed.
    """
    promised = any(one.passes and set(one.classes) != {HOST_CONSTANT} and not one.once for one in found)
    last = seen.runs[-1]
    if not promised or last.error is not None or last.changed or not is_removable(last.trace.findings):
        return list(found)
    refusal = _refusal(seen)
    if refusal is None:
        return list(found)
    line = refusal.site.file, refusal.site.line
    instead = f"no pass takes it here: {refusal.detail}; {refusal.remedy}"
    return [
        dataclasses.replace(one, passes=(), cure=instead) if one.passes and (one.file, one.line) == line else one for one in found
    ]


def _refusal(seen: Observation) -> Refusal | None:
    """What the rewriter refuses first; None where it takes every host value out, or cannot trace the step."""
    step, trace = dataclasses.replace(seen.step, passes=_PASSES), seen.runs[-1].trace
    rehearsal = Rehearsal(Checkpoint(seen.step), trace, is_there=True)
    try:
        rehearsal.run(lambda: rewrite(step, trace, step.call.tensors))
    except Refusal as refusal:
        return refusal
    except Exception:  # the user's code on tensors without data: a capture names what that raises
        return None
    return None
