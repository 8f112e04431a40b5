"""Two watched runs compared, operator by operator."""

from __future__ import annotations

from typing import Any

from graphs.errors import ChangingValue, Refusal
from graphs.observation.operations import EagerTrace


def compare_traces(first: EagerTrace, second: EagerTrace) -> Refusal | None:
    """The first operator or value that differs between two consecutive steps, as a refusal, or None."""
    for index, (a, b) in enumerate(zip(first.operations, second.operations, strict=False)):
        if a.func is not b.func:
            return ChangingValue(f"operation {index} was {a.func}, then {b.func}", operator=str(b.func), site=b.site)
        difference = _difference(a.arguments, b.arguments)
        if difference:
            return ChangingValue(f"an argument of the operator {difference}", operator=str(b.func), site=b.site)
    if len(first.operations) != len(second.operations):
        extra = max(first.operations, second.operations, key=len)[min(len(first.operations), len(second.operations))]
        detail = f"one step ran {len(first.operations)} operators, the next {len(second.operations)}"
        return ChangingValue(detail, operator=str(extra.func), site=extra.site)
    return None


def _difference(a: Any, b: Any) -> str:
    if isinstance(a, tuple) and isinstance(b, tuple):
        if len(a) == len(b) == 2 and a[0] == b[0] == "external":
            return "" if a[1] == b[1] else "reads another tensor in place than in the step before"
        if len(a) != len(b):
            return f"had {len(a)} parts, then {len(b)}"
        return next((text for x, y in zip(a, b, strict=True) if (text := _difference(x, y))), "")
    if type(a) is type(b) and (a is b or a == b or (isinstance(a, float) and a != a and b != b)):
        return ""
    return f"was {a!r}, then {b!r}"
