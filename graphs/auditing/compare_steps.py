"""Everything that differs between two consecutive steps, operator by operator."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from graphs.objects.cells import same
from graphs.observation.operations import EagerTrace, Operation, TensorUse

_TOO_LONG = 4_000_000  # pairs of operators that alignment may look at


@dataclass(frozen=True)
class Change:
    """One thing about an operator call that was not the same in two consecutive steps.

    Attributes:
        kind: ``"scalar"``, ``"shape"``, ``"address"``, ``"constant"`` (host data that became a tensor) or ``"operators"``
            (they ran in one of the steps only).
        operator, argument: the operator, and the name of its argument.
        before, after: the values; for operators, how many of a row ran in each step.
        frame: file and line of the user's program.
        index: place of the operator in the second step.
        follows: True where the step itself made the tensor, or the view of it, or a number is a size of such a tensor: the
            reason is an earlier change, other operators or a data-dependent size.
    """

    kind: str
    operator: str
    argument: str
    before: Any
    after: Any
    frame: tuple[str, int]
    index: int
    follows: bool = False


def differences(first: EagerTrace, second: EagerTrace) -> list[Change]:
    """Every change between the operators of two steps, in the order of the second."""
    rows = list(_aligned(first.operations, second.operations))
    moved = {i: j for a, b, c, d, equal in rows if equal for i, j in zip(range(a, b), range(c, d), strict=True)}
    changes: list[Change] = []
    for a, b, c, d, equal in rows:
        if equal:
            for i, j in zip(range(a, b), range(c, d), strict=True):
                changes += _operation_changes(first.operations[i], second.operations[j], j, moved)
        else:
            one = second.operations[c] if c < d else first.operations[a]
            changes.append(Change("operators", str(one.func), "", b - a, d - c, one.frame, c))
    return changes


def _aligned(first: Sequence[Operation], second: Sequence[Operation]) -> Iterator[tuple[int, int, int, int, bool]]:
    """Rows ``first[a:b]``, ``second[c:d]`` in order; the last item tells whether they are the same operators and lines."""
    a, b = ([(operation.func, operation.frame) for operation in operations] for operations in (first, second))
    shorter = min(len(a), len(b))
    head = next((i for i in range(shorter) if a[i] != b[i]), shorter)
    tail = next((i for i in range(shorter - head) if a[-1 - i] != b[-1 - i]), shorter - head)
    yield 0, head, 0, head, True
    middle = a[head : len(a) - tail], b[head : len(b) - tail]
    if len(middle[0]) * len(middle[1]) > _TOO_LONG:
        yield head, len(a) - tail, head, len(b) - tail, False
    else:
        for tag, i, j, k, m in difflib.SequenceMatcher(None, *middle, autojunk=False).get_opcodes():
            yield head + i, head + j, head + k, head + m, tag == "equal"
    yield len(a) - tail, len(a), len(b) - tail, len(b), True


def _operation_changes(a: Operation, b: Operation, index: int, moved: dict[int, int]) -> Iterator[Change]:
    found = [
        (name, kind, x, y, follows)
        for (name, before), (_, after) in zip(a.named(), b.named(), strict=False)
        for kind, x, y, follows in _value_changes(before, after, moved)
    ]
    grown = {
        pair
        for _, kind, x, y, follows in found
        if kind == "shape" and follows
        for pair in zip(x.shape, y.shape, strict=False)
        if pair[0] != pair[1]
    }
    for name, kind, x, y, follows in found:
        constant = kind == "scalar" and b.func._schema.name == "aten::lift_fresh"
        follows = follows or (kind == "scalar" and (x, y) in grown)
        yield Change("constant" if constant else kind, str(b.func), name, x, y, b.frame, index, follows)


def _value_changes(a: Any, b: Any, moved: dict[int, int]) -> Iterator[tuple[str, Any, Any, bool]]:
    """Kind, before, after and whether it only follows from something else."""
    if isinstance(a, TensorUse) and isinstance(b, TensorUse):
        same_origin = a.origin == b.origin or _moved(a, b, moved)
        follows = same_origin or _unmatched(a, b, moved)
        if (a.shape, a.strides, a.dtype, a.device) != (b.shape, b.strides, b.dtype, b.device):
            yield "shape", a, b, follows
        elif not same_origin:
            yield "address", a, b, follows
    elif type(a) is tuple and type(b) is tuple and len(a) == len(b):
        for x, y in zip(a, b, strict=True):
            yield from _value_changes(x, y, moved)
    elif not same(a, b):
        yield "scalar", a, b, False


def _moved(a: TensorUse, b: TensorUse, moved: dict[int, int]) -> bool:
    """Whether two tensors were made by what is the same operator of two steps."""
    return a.origin[0] == b.origin[0] == "operation" and moved.get(a.origin[1]) == b.origin[1]


def _unmatched(a: TensorUse, b: TensorUse, moved: dict[int, int]) -> bool:
    """Whether one of two tensors was made by an operator that ran in one of the steps only."""
    gone = a.origin[0] == "operation" and a.origin[1] not in moved
    return gone or (b.origin[0] == "operation" and b.origin[1] not in moved.values())
