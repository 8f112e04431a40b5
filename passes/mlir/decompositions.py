"""What operators outside ATen are made of, given by whoever defines them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch._ops import OpOverload

from passes.errors import OptionError

Decompositions = Mapping[OpOverload, Callable[..., Any]]

_registered: dict[OpOverload, Callable[..., Any]] = {}


def register_decompositions(table: Decompositions) -> None:
    """Make known what operators are made of: ``{torch.ops.namespace.name.overload: function}``.

    A function takes the operator's arguments and returns what it returns, computed with ATen operators. It is traced with fake
    tensors, and must not write to its arguments. A later registration of the same operator replaces the earlier one.

    Raises:
        OptionError: a key is not an overload (``torch.ops.ns.op.default``), or a value cannot be called.
    """
    for operator, function in table.items():
        if not isinstance(operator, OpOverload):
            raise OptionError("operator", operator, "an overload, such as torch.ops.aten.mm.default")
        if not callable(function):
            raise OptionError(f"decomposition of {operator}", function, "a function")
    _registered.update(table)


def registered() -> dict[OpOverload, Callable[..., Any]]:
    """The decompositions registered so far: a new dict."""
    return dict(_registered)
