"""How a number that the host read is used: told from the source of the program, else from later operators."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from graphs.auditing.remedies import ADDRESSING, ARITHMETIC, BOUND, CONTROL_FLOW, UNSUPPORTED
from graphs.auditing.source.dataflow import POSITIONS, SIZES, Flow, numbers_written, scope_of, tree_of
from graphs.observation.host_reads import HostRead
from graphs.observation.operations import Operation, TensorUse

_ROLES = {
    ADDRESSING: frozenset(("index", "start", "storage_offset", "shifts", "diagonal", "offset")),
    BOUND: frozenset("size sizes split_size split_sizes shape length end k repeats steps output_size n m pad".split()),  # noqa: SIM905
    ARITHMETIC: frozenset("other value alpha beta exponent fill_value scalar min max eps p weight".split()),  # noqa: SIM905
}
_ASKED = {
    **dict.fromkeys(("__bool__", "__contains__"), CONTROL_FLOW),
    **dict.fromkeys(("__format__", "__repr__"), UNSUPPORTED),
    **dict.fromkeys(SIZES | {"one_hot"}, BOUND),  # one_hot checks its classes on a CPU, and counts them anywhere
    **dict.fromkeys(POSITIONS - {"narrow"}, ADDRESSING),
}
"""Functions of torch that say by themselves what they need a number for."""
_COMMON = (-2, -1, 0, 1, 2)
"""Numbers that so many arguments hold that finding one says nothing."""


@dataclass
class Uses:
    """The classes of a number's uses, empty where they cannot be told, and the lines that make a tensor of it."""

    classes: set[str] = field(default_factory=set)
    uploads: set[tuple[str, int]] = field(default_factory=set)


def uses_of(read: HostRead, operations: Sequence[Operation]) -> Uses:
    """How a number is used that was read in a step with these operators."""
    if read.function in _ASKED:
        return Uses({_ASKED[read.function]})
    file, line = read.frame
    later = [operation for operation in operations[read.index :] if operation.frame[0] == file]
    flow = Flow(read.frame, read.function, _scaling(file, later))
    uploads = {(file, line) for line in flow.uploads}
    if flow.classes or uploads:
        return Uses(flow.classes, uploads)
    if read.value is None:  # copied as a tensor
        return Uses({ARITHMETIC} if flow.calculates else set())
    following = next((o for o in later if not o.func._schema.name.endswith("_local_scalar_dense")), None)
    if following is not None and following.frame == read.frame:
        found = _roles(read, [following], common=True)
        if found:
            return Uses(found)
    scope = scope_of(tree_of(file), line)
    if isinstance(scope, ast.Module):
        return Uses()
    first, last = getattr(scope, "lineno", 0), getattr(scope, "end_lineno", 0)
    return Uses(_roles(read, [operation for operation in later if first <= operation.frame[1] <= last], common=False))


def _scaling(file: str, operations: Sequence[Operation]) -> frozenset[int]:
    """Lines with an operator that takes a number, as an operand, which is not written there."""
    tree, lines = tree_of(file), set()
    for operation in operations:
        operands = [number for name, value in operation.named() if name in _ROLES[ARITHMETIC] for number in _numbers(value)]
        line = operation.frame[1]
        if operands and line not in lines and not numbers_written(tree, line).issuperset(operands):
            lines.add(line)
    return frozenset(lines)


def _roles(read: HostRead, operations: Sequence[Operation], *, common: bool) -> set[str]:
    """Classes of the arguments, of these operators, that hold the value; ``common`` numbers only if asked for."""
    values = {v for v in (read.value if isinstance(read.value, list) else [read.value]) if type(v) in (int, float)}
    typed = {(type(value), value) for value in values if common or value not in _COMMON}
    held = {
        name
        for operation in operations
        for name, value in operation.named()
        if any((type(number), number) in typed for number in _numbers(value))
    }
    return {role for role, names in _ROLES.items() if names & held}


def _numbers(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple) and not isinstance(value, TensorUse):
        for item in value:
            yield from _numbers(item)
    elif type(value) in (int, float):
        yield value
