"""Sizes of one step: what was found out at one size need not be found out again at another.

A step that went through a whole first call is told by its operators. Where a call with another batch runs the same operators,
from the same lines, on the same numbers, in which nothing differs but the size, what the first call proved holds for it as well:
that two consecutive steps are the same, and that copies of its arguments give the same step. What is left is what the size may
decide: the call is watched (run A), its recording is compared with a plain run (R, V), and where there are buckets it is proved
of each that padding stays in its rows (P), since rows that are special by their number are other rows of another bucket.
Branches on the size, constants computed from it otherwise than as a multiple, another order of operators: any of them makes it
another step, which is tried as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from graphs.observation.operations import EagerTrace, Operation, TensorUse
from graphs.rehearsal.step import Step

Tensor = torch.Tensor


class _Sizes(NamedTuple):
    """The batch when the step was tried, and now."""

    tried: int
    now: int

    def alike(self, tried: int, now: int) -> bool:
        """Whether two numbers are equal, or multiples of the sizes."""
        return tried == now or tried * self.now == now * self.tried


@dataclass(frozen=True)
class TriedStep:
    """A step that was recorded by a whole first call.

    Attributes:
        shapes: of its tensor arguments.
        rows: its bucket; None at exact sizes.
        operations: of run A.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    rows: int | None
    operations: tuple[Operation, ...]

    def covers(self, step: Step, trace: EagerTrace) -> bool:
        """Whether a call is the same step at another size."""
        sizes = self._sizes(step)
        if sizes is None or step.host or step.moving or trace.findings or len(trace.operations) != len(self.operations):
            return False
        storages: dict[int, int] = {}
        return all(
            a.func is b.func and a.frame == b.frame and _alike(a.arguments, b.arguments, sizes, storages)
            for a, b in zip(self.operations, trace.operations, strict=True)
        )

    def _sizes(self, step: Step) -> _Sizes | None:
        tensors = step.call.tensors
        if tuple(step.names) != self.names or (self.rows is None) != (step.rows is None) or step.rows not in (None, step.real):
            return None
        found = set[tuple[int, int]]()
        for shape, tensor in zip(self.shapes, tensors, strict=True):
            if len(shape) != tensor.ndim:
                return None
            found |= {(a, b) for a, b in zip(shape, tensor.shape, strict=True) if a != b}
        return _Sizes(*found.pop()) if len(found) == 1 and all(map(all, found)) else None


def tried(step: Step, trace: EagerTrace) -> TriedStep | None:
    """What to know of a step that was recorded as it is; None where what was recorded depends on more than its operators."""
    if step.compiler != "none" or step.host or step.moving or trace.findings or step.rows not in (None, step.real):
        return None
    shapes = tuple(tuple(tensor.shape) for tensor in step.call.tensors)
    return TriedStep(tuple(step.names), shapes, step.rows, tuple(trace.operations))


def _alike(a: Any, b: Any, sizes: _Sizes, storages: dict[int, int]) -> bool:
    """Whether two arguments of an operator are the same but for the size. ``storages``: which external one stands for which."""
    if type(a) is not type(b):
        return False
    if type(a) is TensorUse:
        return (
            (a.dtype, a.device, len(a.shape)) == (b.dtype, b.device, len(b.shape))
            and all(map(sizes.alike, a.shape, b.shape))
            and all(map(sizes.alike, a.strides, b.strides))
            and _same_origin(a.origin, b.origin, storages)
        )
    if isinstance(a, tuple):
        return len(a) == len(b) and all(_alike(x, y, sizes, storages) for x, y in zip(a, b, strict=True))
    if type(a) is int:
        return sizes.alike(a, b)
    return a is b or bool(a == b) or (isinstance(a, float) and a != a and b != b)


def _same_origin(a: tuple[str, int], b: tuple[str, int], storages: dict[int, int]) -> bool:
    if a[0] != "external" or b[0] != "external":
        return a == b
    return storages.setdefault(a[1], b[1]) == b[1]
