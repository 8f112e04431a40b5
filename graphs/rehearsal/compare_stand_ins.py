"""Comparing a run on stand-ins for the copied arguments with the run on the arguments themselves.

What a step does may depend on anything it can ask of an argument: its layout, whether two are one object, what hangs on it.
Stand-ins have all of that in common with the arguments. This is the check: the same operators ran on the same shapes and
strides with the same numbers, or the first that differs is named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphs.errors import Refusal, UnsupportedOperator
from graphs.observation.compare_traces import compare_traces
from graphs.observation.operations import EagerTrace, Operation, TensorUse
from graphs.state.storage import storage_id

Tensor = torch.Tensor
aten = torch.ops.aten
_NO_OFFSET = "leave storage_offset out: it is then the argument's own; or narrow() the argument first"


def compare_with_stand_ins(first: EagerTrace, second: EagerTrace, tensors: Sequence[Tensor], *, strides: bool) -> Refusal | None:
    """The first difference between a run on ``tensors`` and one on stand-ins for them, or None.

    Where several arguments share memory, or one is a tensor of the step's own, the first run could not tell which of them an
    operator was given; the second can. Without ``strides``, layouts are left out: a stand-in has others than its argument.
    """
    last = {storage_id(tensor): index for index, tensor in enumerate(tensors)}
    argument = [("argument", last[storage_id(tensor)]) for tensor in tensors]

    def origin(found: tuple[str, int]) -> tuple[str, int]:
        kind, which = found
        if kind == "argument":
            return argument[which]
        return ("argument", last[which]) if kind == "external" and which in last else found

    def seen(value: Any) -> Any:
        if isinstance(value, TensorUse):
            return value._replace(origin=origin(value.origin), strides=value.strides if strides else ())
        return tuple(map(seen, value)) if type(value) is tuple else value

    refusal = compare_traces(*(dataclasses.replace(trace, operations=_each(trace, seen)) for trace in (first, second)))
    if refusal is None:
        return None
    detail = f"{refusal.detail}, when the arguments were copies"
    return type(refusal)(detail, operator=refusal.operator, site=refusal.site)


def _each(trace: EagerTrace, seen: Callable[[Any], Any]) -> list[Operation]:
    return [dataclasses.replace(operation, arguments=seen(operation.arguments)) for operation in trace.operations]


def reads_by_layout(trace: EagerTrace, scattered: Sequence[int]) -> UnsupportedOperator | None:
    """A read of an argument's memory beyond its own elements, which a copy does not have; or None.

    Args:
        trace: of a run on stand-ins.
        scattered: positions of arguments between whose elements lies other memory.
    """
    for operation in trace.operations:
        if operation.func is aten.as_strided.default and _leaves_its_argument(operation, scattered):
            detail = "it may read memory around an argument, which a copy does not have"
            return UnsupportedOperator(detail, operator=str(operation.func), site=operation.site, remedy=_NO_OFFSET)
    return None


def _leaves_its_argument(operation: Operation, scattered: Sequence[int]) -> bool:
    """An offset that is named counts from the storage's begin, wherever in it an argument lies at the next call."""
    named = dict(operation.named())
    kind, index = named["self"].origin
    return kind == "argument" and (index in scattered or named.get("storage_offset") is not None)
