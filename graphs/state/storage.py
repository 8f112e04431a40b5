"""Reading operator calls: the tensors in an argument, and those that are written; where tensors lie."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from passes.core.schema import writes_nothing, written_values

Tensor = torch.Tensor
RESIZING = (torch.ops.aten.resize_.default, torch.ops.aten.set_.source_Storage, torch.ops.aten.resize_as_.default)
"""Operators that exchange a tensor's storage, which a recording holds fixed."""
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_NOTHING_IN = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device))


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in an operator's argument or result, in order."""
    found: list[Tensor] = []
    _add_tensors(value, found)
    return found


def _add_tensors(value: Any, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            if type(item) not in _NOTHING_IN:
                _add_tensors(item, found)


def written_tensors(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors written by this call: as the operator's schema declares, and what some schemas of ATen do not say."""
    return [] if writes_nothing(func) else tensors_in(written_values(func, args, kwargs))


def storage_id(tensor: Tensor) -> int:
    """Identity of the tensor's storage, valid while the storage lives; of the tensor itself where there is no storage."""
    return tensor.untyped_storage()._cdata if has_storage(tensor) else -int(tensor._cdata)


def has_storage(tensor: Tensor) -> bool:
    """Whether a tensor is a view of one storage: not if it is sparse, nested, of MKLDNN, or wraps other tensors."""
    return tensor.layout is torch.strided and not tensor.is_nested and (type(tensor) in _PLAIN or not is_wrapper(tensor))


def is_wrapper(tensor: Tensor) -> bool:
    """Whether operators on a tensor are run by its class: what it says of its own memory may be memory that is not there."""
    return type(tensor) not in _PLAIN and torch._C._dispatch_keys(tensor).has(torch._C.DispatchKey.Python)


def wrapped_tensors(tensor: Tensor) -> list[Tensor] | None:
    """The tensors that a wrapper holds, those in wrappers inside it too; None where it does not tell."""
    if not is_wrapper(tensor):
        return [tensor]
    if not is_traceable_wrapper_subclass(tensor):
        return None
    names, _ = tensor.__tensor_flatten__()
    held = [getattr(tensor, name) for name in names]
    inner = [wrapped_tensors(each) for each in held if isinstance(each, Tensor)]  # a mesh of devices may be among them
    return None if None in inner else [each for part in inner if part is not None for each in part]
