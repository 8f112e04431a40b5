"""An observation of a step, as findings: what, where, of which class, with which remedy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from graphs.auditing.asked import kept_promises
from graphs.auditing.changes import change_findings, changed_reads
from graphs.auditing.finding import Finding, finding
from graphs.auditing.observe import Observation, Run
from graphs.auditing.remedies import ARITHMETIC, BOUND, CHANGING_VALUE, CONTROL_FLOW, HOST_CONSTANT, NO_PASS, UNKNOWN, UNSUPPORTED
from graphs.auditing.report import Audit
from graphs.auditing.source.value_uses import uses_of
from graphs.contract.arguments import map_leaves
from graphs.contract.eligibility import inadmissible
from graphs.contract.outputs.template import compare_templates
from graphs.errors import (
    DataDependentShape,
    HostConstant,
    HostSync,
    Refusal,
    Site,
    UnsupportedArgument,
    UnsupportedOperator,
    UnsupportedOutput,
)
from graphs.observation.host_reads import FILLS, HostRead
from graphs.observation.operations import EagerTrace
from graphs.recording.vendor import current_vendor
from graphs.state.storage import RESIZING

_SHOWN = 3  # values of one line that a finding quotes
_WIDTH = 48  # characters of one value


def diagnose(seen: Observation) -> Audit:
    """Every finding of an observed step, in the order of the step; what has no line comes last."""
    changes = change_findings(seen)
    refusals = list(_refusal_findings(seen, changes))
    uploads = {(one.file, one.line) for one in refusals if one.kind == HostConstant.reason}
    changes = [one for one in changes if one.kind != "changing-constant" or (one.file, one.line) not in uploads]
    found = [*_read_findings(seen), *refusals, *changes, *_outcome_findings(seen)]
    order = _line_order(seen)
    found.sort(key=lambda one: _position(one, order))
    found = kept_promises(seen, found)
    device = seen.step.device
    cost = "host waits" if device.type == "cuda" else "time of calls"
    return Audit(str(device), len(seen.runs[-1].trace.operations), len(seen.runs), cost, tuple(found))


def _line_order(seen: Observation) -> dict[tuple[str, int], int]:
    """Lines in the order in which steps come to them first; the last step counts most."""
    order: dict[tuple[str, int], int] = {}
    for run in reversed(seen.runs):
        reached = [(read.frame, read.index) for read in run.trace.reads]
        reached += [(operation.frame, index) for index, operation in enumerate(run.trace.operations)]
        for frame, index in sorted(reached, key=lambda pair: pair[1]):
            order.setdefault(frame, index)
    return order


def _position(one: Finding, order: dict[tuple[str, int], int]) -> float:
    """Where a finding stands; a line without operators stands before the next one of its file that has some."""
    here = order.get((one.file, one.line))
    if here is not None:
        return here
    return (
        min((index for (file, line), index in order.items() if file == one.file and line > one.line), default=float("inf")) - 0.5
    )


def _read_findings(seen: Observation) -> Iterator[Finding]:
    """One finding for each line and function by which the host gets values of tensors."""
    groups: dict[tuple[str, str, tuple[str, int]], dict[int, list[HostRead]]] = {}
    for index, run in enumerate(seen.runs):
        for read in run.trace.reads:
            groups.setdefault((read.operator, read.function, read.frame), {}).setdefault(index, []).append(read)
    for by_run in groups.values():
        latest = max(by_run)
        reads, trace = by_run[latest], seen.runs[latest].trace
        kind, classes, why = _kind_of(reads[0], trace, seen.runs[latest].output)
        once = latest == 0 and _is_stable(seen)
        yield finding(
            kind,
            reads[0].operator,
            reads[0].site,
            _values(by_run),
            classes,
            why=NO_PASS["once"] if once else why,
            function=reads[0].function,
            calls=len(reads),
            cost_us=seen.costs.get((reads[0].frame, reads[0].function)),
            once=once,
        )


def _is_stable(seen: Observation) -> bool:
    """Whether what happened in the first step only will not happen again: there were three, and no value read differed."""
    return len(seen.runs) == 3 and seen.runs[-1].error is None and not changed_reads(*seen.runs[:2])


def _kind_of(read: HostRead, trace: EagerTrace, output: Any) -> tuple[str, set[str], str]:
    """Kind, classes, and why no pass applies."""
    if (DataDependentShape.reason, read.operator, *read.frame) in trace.counts:
        return DataDependentShape.reason, {BOUND}, ""
    if read.function == "__bool__":
        return "data-dependent-branch", {CONTROL_FLOW}, ""
    if "_check_errors" in read.operator:
        return HostSync.reason, {UNSUPPORTED}, NO_PASS["check"]
    if read.operator in map(str, FILLS):
        return HostSync.reason, {ARITHMETIC}, ""
    uses = uses_of(read, trace.operations)
    if not uses.classes and _returned(read.value, output):
        return HostSync.reason, {UNSUPPORTED}, NO_PASS["output"]
    if UNSUPPORTED in uses.classes or (read.value is None and not uses.classes):
        return HostSync.reason, {*uses.classes, UNSUPPORTED}, NO_PASS["conversion"]
    return HostSync.reason, uses.classes or ({ARITHMETIC} if uses.uploads else {UNKNOWN}), ""


def _returned(value: Any, output: Any) -> bool:
    """Whether a step returns the number that was read."""
    leaves: list[Any] = []
    map_leaves(output, leaves.append)
    returned = [leaf for leaf in leaves if isinstance(leaf, (bool, int, float))]
    return bool(returned) and set(value if isinstance(value, list) else [value]) <= set(returned)


def _values(by_run: dict[int, list[HostRead]]) -> str:
    """The values read: of a line that reads one, in each step; of others, the first few of the last step."""
    latest = by_run[max(by_run)]
    if latest[0].value is None:
        return "checked on the host" if "_check_errors" in latest[0].operator else "copied to the host"
    if all(len(reads) == 1 for reads in by_run.values()):
        texts = [_short(reads[0].value) for _, reads in sorted(by_run.items())]
        return texts[0] if len(set(texts)) == 1 else ", then ".join(texts)
    more = ", ..." if len(latest) > _SHOWN else ""
    return ", ".join(_short(read.value) for read in latest[:_SHOWN]) + more


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."


def _refusal_findings(seen: Observation, changes: Sequence[Finding]) -> Iterator[Finding]:
    """What is wrong with operators and arguments, other than what the host reads."""
    known: set[object] = set()
    read_first = _uploads(seen)
    changing = {(one.file, one.line): one.detail for one in changes if one.kind == "changing-constant" and not one.once}
    for index, run in reversed(list(enumerate(seen.runs))):
        for refusal in [*run.trace.findings, *_unsupported(run)]:
            line = refusal.site.file, refusal.site.line
            if isinstance(refusal, (HostSync, DataDependentShape)) or (refusal.reason, line) in known:
                continue
            known.add((refusal.reason, line))
            once = index == 0 and _is_stable(seen)
            if not isinstance(refusal, HostConstant):
                yield _of_refusal(seen, run, refusal, (UNSUPPORTED,), refusal.remedy, once=once)
            elif line in read_first:
                yield _of_refusal(seen, run, refusal, (ARITHMETIC,), "", once=once, detail=read_first[line])
            elif line in changing:
                both, data = (HOST_CONSTANT, CHANGING_VALUE), changing[line]
                yield _of_refusal(seen, run, refusal, both, NO_PASS["constant"], detail=data)
            else:
                yield _of_refusal(seen, run, refusal, (HOST_CONSTANT,), "", once=once)
    refusal_of_call = inadmissible(seen.step.call)
    if refusal_of_call is not None:
        yield _of_refusal(seen, seen.runs[-1], refusal_of_call, (UNSUPPORTED,), refusal_of_call.remedy)


def _uploads(seen: Observation) -> dict[tuple[str, int], str]:
    """Lines that make a tensor of a number that the host has just read from one."""
    reads = {(read.frame, read.function): (read, run.trace) for run in seen.runs for read in run.trace.reads}
    lines = {}
    for read, trace in reads.values():
        if read.value is not None:
            lines.update(
                dict.fromkeys(uses_of(read, trace.operations).uploads, f"made of the value read in line {read.frame[1]}")
            )
    return lines


def _of_refusal(
    seen: Observation,
    run: Run,
    refusal: Refusal,
    classes: tuple[str, ...],
    why: str,
    *,
    once: bool = False,
    detail: str = "",
) -> Finding:
    function = run.trace.asked.get(refusal.signature, "")
    return finding(
        refusal.reason,
        refusal.operator,
        refusal.site,
        detail or refusal.detail,
        classes,
        why=NO_PASS["once"] if once else why,
        function=function,
        calls=run.trace.counts.get(refusal.signature, 1),
        cost_us=seen.costs.get(((refusal.site.file, refusal.site.line), function)),
        once=once,
    )


def _unsupported(run: Run) -> Iterator[UnsupportedOperator]:
    refuses = current_vendor().refuses
    for operation in run.trace.operations:
        why = refuses(str(operation.func))
        if operation.func in RESIZING:
            why = "a recording holds tensors at fixed storage and cannot resize them"
        if why is not None:
            yield UnsupportedOperator(why, operator=str(operation.func), site=operation.site)


def _outcome_findings(seen: Observation) -> Iterator[Finding]:
    """How the steps ended: what they returned, what they raised, and whether all their state could be seen."""
    if not seen.complete:
        refusal = UnsupportedArgument("too much hangs on the model to be watched for changes", operator="self")
        yield _of_refusal(seen, seen.runs[0], refusal, (UNSUPPORTED,), refusal.remedy)
    last = seen.runs[-1]
    if last.error is not None:
        which = f"step {len(seen.runs)} raised {type(last.error).__name__}"
        detail = f"{which}: {last.error}".splitlines()[0]
        why = "a step has to run again with the same arguments; see what changes"
        yield finding("step-raised", type(last.error).__name__, Site.at(last.raised_at), detail, (UNSUPPORTED,), why=why)
        return
    try:
        templates = [
            seen.step.template(run.output, seen.step.call.tensors, list(run.trace.externals.values()))[0].structure
            for run in seen.runs[-2:]
        ]
    except UnsupportedOutput as refusal:
        yield _of_refusal(seen, last, refusal, (UNSUPPORTED,), refusal.remedy)
        return
    differing = compare_templates(*templates) if len(templates) == 2 else None
    if differing is not None:
        yield finding("changing-output", "output", Site(), differing.detail, (CHANGING_VALUE,), why=NO_PASS["output"])
