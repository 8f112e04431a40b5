"""Numbers without a value: torch's symbols, in Python and in graphs."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Node

SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
"""The classes of numbers that only the device knows."""


def is_symbol(value: Any) -> bool:
    """Whether a value of a graph is a number that only the device knows."""
    return isinstance(value, Node) and isinstance(value.meta.get("val"), SYMBOLS)


def expression_of(value: Any) -> sympy.Basic:
    """The expression of a number, or of a node that stands for one."""
    value = value.meta["val"] if isinstance(value, Node) else value
    return value.node.expr if isinstance(value, SYMBOLS) else sympy.sympify(value)


def has_static_shape(value: Any) -> bool:
    """Whether a value is a tensor none of whose sizes is a symbol."""
    return isinstance(value, torch.Tensor) and not any(isinstance(size, torch.SymInt) for size in value.shape)
