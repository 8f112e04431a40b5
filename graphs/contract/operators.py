"""Reading operator calls: the tensors in an argument, and the ones a schema says are written."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload

Tensor = torch.Tensor


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in an operator's argument or result, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [tensor for item in value for tensor in tensors_in(item)]


def written_tensors(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that the operator's schema declares as written by this call."""
    if not func._schema.is_mutable:
        return []
    written: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) and not argument.kwarg_only else kwargs.get(argument.name)
            written += tensors_in(value)
    return written


def storage_id(tensor: Tensor) -> int:
    """Identity of the tensor's storage, valid while the storage lives."""
    return int(tensor.untyped_storage()._cdata)
