"""What the passes really do with a step: asked of the rewriter, so that an audit promises what a capture keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

import passes
from graphs.auditing.finding import Finding
from graphs.auditing.observe import Observation
from graphs.auditing.remedies import ARITHMETIC, BOUND, CLASS_OF, NO_PASS, UNSUPPORTED
from graphs.errors import Refusal
from graphs.observation.host_reads import HostRead
from graphs.observation.operations import EagerTrace
from graphs.rehearsal.rehearsal import Rehearsal
from graphs.rehearsal.step import Checkpoint
from graphs.rewriting.python_stores import Stored
from graphs.rewriting.rewritten_step import host_values, is_removable, refusal_of

_PASSES = ("constants", "addressing", "arithmetic", "bounded", "branches")
_MADE_OF_NUMBERS = str(torch.ops.aten.scalar_tensor.default)
_TEXT = ("format", "str")
Read = tuple[str, str, tuple[str, int]]
"""Operator, function of torch, and line by which the host gets values."""


@dataclass(frozen=True)
class Fate:
    """What becomes of the values that the host reads at one line.

    Attributes:
        classes: how they are used.
        why: why no pass takes them, where a use is refused.
        complete: whether all uses were come to.
    """

    classes: frozenset[str]
    why: str = ""
    complete: bool = True


@dataclass(frozen=True)
class Answer:
    """What the rewriter says of an observed step; empty where it cannot be asked.

    Attributes:
        fates: of the values that it knows.
        uploads: lines that make a tensor of such a value, and the lines that read it.
        refusal: what keeps the step from being recorded, if nothing but host values does.
    """

    fates: dict[Read, Fate] = field(default_factory=dict)
    uploads: dict[tuple[str, int], int] = field(default_factory=dict)
    refusal: Refusal | None = None

    def fate(self, read: HostRead) -> Fate | None:
        """What becomes of what is read as ``read`` is; None where the rewriter did not come to it."""
        return self.fates.get(_key(read))

    def kept(self, found: Sequence[Finding]) -> list[Finding]:
        """The findings, with what to write instead at the line where the passes give up."""
        if self.refusal is None:
            return list(found)
        line = self.refusal.site.file, self.refusal.site.line
        instead = _instead(self.refusal, line)
        return [
            dataclasses.replace(one, passes=(), cure=instead) if one.passes and (one.file, one.line) == line else one
            for one in found
        ]


def ask(seen: Observation) -> Answer:
    """Trace and rewrite the step as for a recording, on tensors without data, and put everything back.

    Of a step that changes Python state its first run is followed, which is the one that the trace repeats.
    """
    run = seen.runs[0] if seen.runs[0].changed else seen.runs[-1]
    if run.error is not None or not (run.trace.reads or run.trace.findings):
        return Answer()
    step, trace = dataclasses.replace(seen.step, passes=_PASSES), run.trace
    rehearsal = Rehearsal(Checkpoint(seen.step), trace, is_there=True)
    try:
        values, reason = rehearsal.run(lambda: host_values(step, trace, step.call.tensors))
    except Exception:  # the user's code on tensors without data: a capture names what that raises
        return Answer()
    by_call = {(read.operator, read.frame, read.index): _key(read) for read in run.trace.reads}
    told: dict[Read, list[passes.HostValue]] = {}
    for value in values:
        told.setdefault(by_call[value.read.operator, value.read.site, value.read.call], []).append(value)
    fates = {key: _fate(here, run.trace, reason) for key, here in told.items()}
    uploads = {use.site: value.read.site[1] for value in values for use in value.uses if use.operator == _MADE_OF_NUMBERS}
    alone = not seen.runs[-1].changed and is_removable(run.trace.findings)
    return Answer(fates, uploads, refusal_of(reason, run.trace) if reason is not None and alone else None)


def _key(read: HostRead) -> Read:
    return read.operator, read.function, read.frame


def _fate(values: Sequence[passes.HostValue], trace: EagerTrace, stopped: passes.Unremovable | None) -> Fate:
    """What becomes of values that are read at one line."""
    classes = {CLASS_OF[use.by] for value in values for use in value.uses}
    complete = stopped is None or (isinstance(stopped, Stored) and bool(classes))  # what is stored shows when the step has run
    reason = next((value.refusal for value in values if value.refusal is not None), None)
    if reason is None:
        unused = complete and not classes
        return Fate(frozenset({ARITHMETIC} if unused else classes), complete=complete)
    if reason.operator == "output":
        return Fate(frozenset({*classes, UNSUPPORTED}), NO_PASS["output"])
    if reason.operator in _TEXT or isinstance(reason, Stored):
        return Fate(frozenset({*classes, UNSUPPORTED}), NO_PASS["conversion"])
    where = BOUND if isinstance(reason, passes.NoBound) else UNSUPPORTED
    return Fate(frozenset({*classes, where}), _instead(refusal_of(reason, trace), values[0].read.site))


def _instead(refusal: Refusal, line: tuple[str, int]) -> str:
    """What to write instead of what the passes cannot do, for a finding at a line."""
    where = "here" if (refusal.site.file, refusal.site.line) == line else f"in line {refusal.site.line}"
    return f"no pass takes it {where}: {refusal.detail}; {refusal.remedy}"
