"""What differs between consecutive steps, as findings: one for each line and argument, and for each Python value."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from graphs.auditing.compare_steps import Change, differences
from graphs.auditing.finding import Finding, finding
from graphs.auditing.observe import Observation, Run
from graphs.auditing.remedies import CHANGING_VALUE, CONTROL_FLOW, HOST_CONSTANT, NO_PASS
from graphs.errors import Site
from graphs.objects.cells import Difference
from graphs.observation.operations import TensorUse

Frame = tuple[str, int]


def change_findings(seen: Observation) -> list[Finding]:
    """What is not the same in the last two steps, and what was not in the two before.

    The latter is marked ``once``, unless a value that the host read differed too: then it may come back.
    """
    found: dict[object, Finding] = {}
    for later, pair in enumerate(reversed(seen.pairs())):
        stable = seen.runs[-1].error is None and not changed_reads(*pair)
        for key, changes in _by_argument(differences(pair[0].trace, pair[1].trace), pair[1]).items():
            if key not in found:
                once = later > 0 and stable and not _comes_back(changes[0], seen.runs)
                found[key] = _operator_finding(pair, changes, once)
    stable = seen.runs[-1].error is None
    for later, run in enumerate(reversed(seen.runs)):
        for key, differing in _by_line(run.changed, seen.assignments).items():
            if key not in found:
                found[key] = _attribute_finding(differing, seen.assignments, once=later > 0 and stable)
    return list(found.values())


def _comes_back(change: Change, runs: Sequence[Run]) -> bool:
    """Whether operators of a line ran in the second of three steps and not in the third, or the other way round."""
    ran = [any(operation.frame == change.frame for operation in run.trace.operations) for run in runs[-2:]]
    return change.kind == "operators" and ran[0] != ran[-1]


def changed_reads(first: Run, second: Run) -> list[tuple[Any, Any, Frame]]:
    """Values that the host read which were not the same in two steps: before, after, and the line."""
    before, after = _values(first), _values(second)
    return [(a, b, place[0]) for place in before for a, b in zip(before[place], after.get(place, ()), strict=False) if a != b]


def _values(run: Run) -> dict[tuple[Frame, str], list[Any]]:
    values: dict[tuple[Frame, str], list[Any]] = {}
    for read in run.trace.reads:
        values.setdefault((read.frame, read.function), []).append(read.value)
    return values


def _by_argument(changes: Iterable[Change], second: Run) -> dict[object, list[Change]]:
    grouped: dict[object, list[Change]] = {}
    for change in changes:
        if change.kind == "operators" and second.error is not None and change.index >= len(second.trace.operations):
            continue  # the rest of a step that raised
        grouped.setdefault((change.kind, change.frame, change.operator, change.argument), []).append(change)
    return grouped


def _operator_finding(pair: tuple[Run, Run], changes: Sequence[Change], once: bool) -> Finding:
    change = changes[0]
    read, attribute = _causes(pair, change)
    classes, why = _class_of(change, read, [difference for run in pair for difference in run.changed])
    detail = _text(change)
    if attribute:
        detail += f", as {attribute}"
    elif read is not None:
        detail += f"; decided by the value read in line {read[1]}" if change.kind == "operators" else f", read in line {read[1]}"
    follows = change.follows or (read is not None and not attribute)
    return finding(
        f"changing-{change.kind}",
        change.operator,
        Site.at(change.frame),
        detail,
        classes,
        why=NO_PASS["once"] if once else NO_PASS["follows"] if follows else why,
        calls=len(changes),
        follows=follows,
        once=once,
    )


def _causes(pair: tuple[Run, Run], change: Change) -> tuple[Frame | None, str]:
    """The line that read the changed value on the host, and the Python attribute that holds it, where they can be told."""
    reads = changed_reads(*pair)
    if change.kind == "operators":
        lines = {frame for _, _, frame in reads}
        earlier = [read.frame for read in pair[1].trace.reads if read.index < change.index and read.frame in lines]
        return (earlier[-1] if earlier else None), ""
    if change.kind != "scalar":
        return None, ""
    values = (repr(change.before), repr(change.after))
    attribute = next((d.path for run in pair for d in run.changed if (d.before, d.after) == values), "")
    frame = next((frame for a, b, frame in reads if (change.before, change.after) in _numbers(a, b)), None)
    return frame, attribute


def _numbers(a: Any, b: Any) -> list[tuple[Any, Any]]:
    return list(zip(a, b, strict=False)) if isinstance(a, list) and isinstance(b, list) else [(a, b)]


def _class_of(change: Change, read: Frame | None, attributes: Sequence[Difference]) -> tuple[tuple[str, ...], str]:
    """Classes, and why no pass applies."""
    if change.kind == "operators":
        return (CONTROL_FLOW,), "" if read is not None else NO_PASS["operators"]
    if change.kind == "constant":
        return (HOST_CONSTANT, CHANGING_VALUE), NO_PASS["constant"]
    if change.kind == "scalar":
        held = [one for one in attributes if (one.before, one.after) == (repr(change.before), repr(change.after))]
        counted = any(_advance(one) is not None for one in held or attributes)  # or calculated from one that counts
        return (CHANGING_VALUE,), "" if counted else NO_PASS["attribute"]
    return (CHANGING_VALUE,), NO_PASS[change.kind]


def _advance(difference: Difference) -> int | None:
    """By how much an integer advanced; None for anything else."""
    numbers = [text for text in (difference.before, difference.after) if text.lstrip("-").isdigit()]
    return int(numbers[1]) - int(numbers[0]) if len(numbers) == 2 else None


def _text(change: Change) -> str:
    a, b = change.before, change.after
    if change.kind == "operators":
        return f"{a} operators ran here in one step, {b} in the next"
    if change.kind == "address":
        return f"{change.argument} is another tensor in each step"
    if isinstance(a, TensorUse) and isinstance(b, TensorUse):
        unlike = next(name for name in a._fields if getattr(a, name) != getattr(b, name))
        return f"{unlike} of {change.argument}: {getattr(a, unlike)}, then {getattr(b, unlike)}"
    return f"{change.argument}: {a}, then {b}"


def _by_line(changed: Iterable[Difference], assignments: dict[str, Site]) -> dict[object, list[Difference]]:
    """Attributes that one line sets, in many layers perhaps, together."""
    grouped: dict[object, list[Difference]] = {}
    for difference in changed:
        site = assignments.get(difference.path, Site())
        pattern = re.sub(r"\d+", "*", difference.path)
        grouped.setdefault((pattern, site), []).append(difference)
    return grouped


def _attribute_finding(differing: Sequence[Difference], assignments: dict[str, Site], *, once: bool) -> Finding:
    one = differing[0]
    before, after = (re.sub(" at 0x.*", "", text) for text in (one.before, one.after))
    detail = f"{before}, then {after}" if before != after else f"another {after.removeprefix('a ')} in each step"
    if len(differing) > 1:
        detail += f"; and {len(differing) - 1} more like it"
    evenly = all(_advance(d) is not None for d in differing)
    why = NO_PASS["irreversible"] if one.irreversible else "" if evenly else NO_PASS["attribute"]
    if before.startswith("tensor") and after.startswith("tensor"):
        why = NO_PASS["address" if before == after else "shape"]
    return finding(
        "changing-attribute",
        one.path,
        assignments.get(one.path, Site()),
        detail,
        (CHANGING_VALUE,),
        why=NO_PASS["once"] if once else why,
        calls=len(differing),
        once=once,
    )
