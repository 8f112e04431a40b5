"""How a value is used that the rewriter did not come to, a copied tensor for example: guessed from the source of the program."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from graphs.auditing.remedies import ADDRESSING, ARITHMETIC, BOUND, CONTROL_FLOW, UNSUPPORTED
from graphs.auditing.source.dataflow import POSITIONS, SIZES, Flow, numbers_written, tree_of
from graphs.observation.host_reads import HostRead
from graphs.observation.operations import Operation, TensorUse

_OPERANDS = frozenset("other value alpha beta exponent fill_value scalar min max eps p weight".split())  # noqa: SIM905
"""Arguments of operators that calculate with a number."""
_ASKED = {
    **dict.fromkeys(("__bool__", "__contains__"), CONTROL_FLOW),
    **dict.fromkeys(("__format__", "__repr__"), UNSUPPORTED),
    **dict.fromkeys(SIZES | {"one_hot"}, BOUND),  # one_hot checks its classes on a CPU, and counts them anywhere
    **dict.fromkeys(POSITIONS - {"narrow"}, ADDRESSING),
}
"""Functions of torch that say by themselves what they need a number for."""


def uses_of(read: HostRead, operations: Sequence[Operation]) -> set[str]:
    """The classes of a value's uses that can be told, in a step with these operators."""
    if read.function in _ASKED:
        return {_ASKED[read.function]}
    later = [operation for operation in operations[read.index :] if operation.frame[0] == read.frame[0]]
    flow = Flow(read.frame, read.function, _scaling(read.frame[0], later))
    if not flow.classes and read.value is None and flow.calculates:  # copied as a tensor
        return {ARITHMETIC}
    return flow.classes


def _scaling(file: str, operations: Sequence[Operation]) -> frozenset[int]:
    """Lines with an operator that takes a number, as an operand, which is not written there."""
    tree, lines = tree_of(file), set()
    for operation in operations:
        operands = [number for name, value in operation.named() if name in _OPERANDS for number in _numbers(value)]
        line = operation.frame[1]
        if operands and line not in lines and not numbers_written(tree, line).issuperset(operands):
            lines.add(line)
    return frozenset(lines)


def _numbers(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple) and not isinstance(value, TensorUse):
        for item in value:
            yield from _numbers(item)
    elif type(value) in (int, float):
        yield value
