"""Reading operator calls: the tensors in an argument, and the ones a schema says are written."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload

Tensor = torch.Tensor
RESIZING = (torch.ops.aten.resize_.default, torch.ops.aten.set_.source_Storage, torch.ops.aten.resize_as_.default)
"""Operators that exchange a tensor's storage, which a recording holds fixed."""
_BATCH_NORMS = ("aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::miopen_batch_norm")


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
    """The tensors written by this call: as the operator's schema declares, and what some schemas of ATen do not say."""
    written = _undeclared(func, args, kwargs)
    if not func._schema.is_mutable:
        return written
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) and not argument.kwarg_only else kwargs.get(argument.name)
            written += tensors_in(value)
    return written


def _undeclared(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Running statistics of batch normalisation in training mode, which its older operators update silently."""
    if func._schema.name not in _BATCH_NORMS:
        return []
    named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    if not named.get("training", named.get("train", True)):
        return []
    return tensors_in([named.get("running_mean"), named.get("running_var")])


def storage_id(tensor: Tensor) -> int:
    """Identity of the tensor's storage, valid while the storage lives."""
    return int(tensor.untyped_storage()._cdata)
