"""Operators over numbers that only the device knows, and numbers of Python beside them.

Whole numbers are int64, fractions float64 and flags bool, as Python computes them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from passes.errors import Unremovable
from passes.host_values.emitter import Emitter

aten = torch.ops.aten
CLAMPS = {aten.maximum: aten.clamp_min.default, aten.minimum: aten.clamp_max.default}


class DeviceArithmetic:
    """Operators over numbers and 0-d tensors, in the graph that an `Emitter` builds."""

    def __init__(self, emitter: Emitter) -> None:
        self._emitter = emitter

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        return self._emitter.call(target, *args, **kwargs)

    def _missing(self, detail: str) -> Unremovable:
        return Unremovable(detail, "scalar", self._emitter.site)

    def filled(self, number: Any, like: Node, dtype: torch.dtype | None = None) -> Node:
        """A number as a 0-d tensor on the device of another."""
        dtype = dtype or (torch.float64 if isinstance(number, float) else torch.int64)
        return self._call(aten.full_like.default, like, number, dtype=dtype)

    def cast(self, value: Node, dtype: torch.dtype) -> Node:
        """A 0-d tensor in another dtype."""
        return value if value.meta["val"].dtype == dtype else self._call(aten._to_copy.default, value, dtype=dtype)

    def doubles(self, values: list[Any]) -> list[Node]:
        """Numbers and 0-d tensors, of which at least one is a tensor, as float64."""
        like = next(value for value in values if isinstance(value, Node))
        return [self.cast(v, torch.float64) if isinstance(v, Node) else self.filled(float(v), like) for v in values]

    def _zero_dim(self, tensor: Node) -> Node:
        value = tensor.meta["val"]
        kind = torch.float64 if value.dtype.is_floating_point else torch.int64
        made = tensor if value.dim() == 0 else self._call(aten.view.default, tensor, [])
        return made if value.dtype == kind else self.cast(made, kind)

    def _finite(self, value: Node, below: float = float("inf")) -> Node:
        """``value``, of which Python has none that is not finite: it raises, or gives a complex number."""
        self._emitter.require(self._call(aten.lt.Scalar, self._call(aten.abs.default, value), below))
        return value

    def _computed(self, function: Any, values: list[Any]) -> Node:
        """``function`` of numbers and 0-d tensors, in float64; one limit that is a number is no tensor of its own."""
        clamp, numbers = CLAMPS.get(function.overloadpacket), [value for value in values if not isinstance(value, Node)]
        if clamp is None or not numbers or numbers[0] != numbers[0]:
            return self._call(function, *self.doubles(values))
        (value,) = (value for value in values if isinstance(value, Node))
        return self._call(clamp, self.cast(value, torch.float64), float(numbers[0]))

    def _choice(self, holds: Any, a: Any, b: Any) -> Any:
        """``a if holds else b``, of numbers and 0-d tensors."""
        if isinstance(holds, bool):
            return a if holds else b
        if a is b or (not isinstance(a, Node) and not isinstance(b, Node) and repr(a) == repr(b)):
            return a if isinstance(a, Node) else self.filled(a, holds)
        sides = [side if isinstance(side, Node) else self.filled(side, holds) for side in (a, b)]
        return self._call(aten.where.self, holds, *sides)

    def _remainder(self, a: Node, b: Node) -> Node:
        """``a % b`` of floats: Python gives a zero the sign of ``b``."""
        made = self._call(aten.remainder.Tensor, a, b)
        zero = self._call(aten.copysign.Tensor, self._call(aten.zeros_like.default, made), b)
        return self._call(aten.where.self, self._call(aten.eq.Scalar, made, 0), zero, made)
