"""Flattening the arguments and outputs of a step, and the signature that a recording is found by.

This is the hot path: one recursive walk fills three lists and nothing else is allocated. ``torch.utils._pytree`` does
the same in three times the time (6.2 against 1.8 us for four tensors, ``benchmarks/test_overhead.py``), so its
registry is used and its walk is not.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree

Tensor = torch.Tensor
_CONSTANTS = (
    type(None),
    bool,
    int,
    str,
    bytes,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch.Size,
    type(Ellipsis),
)

_BY_VALUE = (enum.Enum, int, float, complex, str, range)


class Call(NamedTuple):
    """One call, flattened.

    Attributes:
        tensors: tensor leaves in traversal order.
        opaques: leaves that are neither tensors nor constants, for example a Hugging Face ``Cache``.
        signature: structure, shapes, strides, dtypes, devices and constants; opaque leaves by identity.
    """

    tensors: list[Tensor]
    opaques: list[Any]
    signature: tuple[Any, ...]


def flatten_call(args: tuple[Any, ...], kwargs: dict[str, Any], prefix: tuple[Any, ...] = ()) -> Call:
    """Flatten a call's arguments; ``prefix`` is made part of the signature."""
    tensors: list[Tensor] = []
    opaques: list[Any] = []
    signature: list[Any] = list(prefix)
    for value in args:
        if type(value) is Tensor:
            tensors.append(value)
            signature += (Tensor, value.shape, value.stride(), value.dtype, value.device)
        else:
            _flatten(value, tensors, opaques, signature)
    for name, value in kwargs.items():
        signature.append(name)
        if type(value) is Tensor:
            tensors.append(value)
            signature += (Tensor, value.shape, value.stride(), value.dtype, value.device)
        else:
            _flatten(value, tensors, opaques, signature)
    return Call(tensors, opaques, tuple(signature))


def _flatten(value: Any, tensors: list[Tensor], opaques: list[Any], signature: list[Any]) -> None:
    kind = type(value)
    if kind is Tensor or isinstance(value, Tensor):
        tensors.append(value)
        signature += (kind, value.shape, value.stride(), value.dtype, value.device)
    elif kind in _CONSTANTS:
        signature += (kind, value)
    elif kind is float:
        signature += (float, value.hex())  # so that 0.0 and -0.0 differ, and nan equals itself
    elif kind is tuple or kind is list:
        signature += (kind, len(value))
        for item in value:
            _flatten(item, tensors, opaques, signature)
    elif kind is dict:
        signature += (dict, tuple(value))
        for item in value.values():
            _flatten(item, tensors, opaques, signature)
    else:
        _flatten_other(value, tensors, opaques, signature)


def _flatten_other(value: Any, tensors: list[Tensor], opaques: list[Any], signature: list[Any]) -> None:
    children, context = pytree_children(value)
    if children is not None:
        signature += (type(value), len(children), _frozen(context))
        for item in children:
            _flatten(item, tensors, opaques, signature)
    elif isinstance(value, slice) and not _has_tensor(value):
        signature += (slice, repr(value))
    elif isinstance(value, enum.Enum):
        signature += (type(value), value.name)
    elif isinstance(value, _BY_VALUE):  # numpy scalars and subclasses of numbers
        signature += (type(value), repr(value))
    else:
        opaques.append(value)
        signature += (type(value), id(value))


def is_constant(value: Any) -> bool:
    """Whether a leaf is part of the key by its value."""
    known = type(value) in (*_CONSTANTS, float) or isinstance(value, _BY_VALUE)
    return known or (isinstance(value, slice) and not _has_tensor(value))


def _has_tensor(value: slice) -> bool:
    return any(isinstance(part, Tensor) for part in (value.start, value.stop, value.step))


def pytree_children(value: Any) -> tuple[list[Any] | None, Any]:
    """Children and context of a registered pytree node, ``(None, None)`` for a leaf."""
    kind = type(value)
    if kind in _CONSTANTS:
        return None, None
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return list(value), None
    node = _pytree.SUPPORTED_NODES.get(kind)
    if node is None:
        return None, None
    children, context = node.flatten_fn(value)
    return list(children), context


def _frozen(context: Any) -> Any:
    try:
        hash(context)
    except TypeError:
        return repr(context)
    return context


def map_leaves(value: Any, fn: Callable[[Any], Any]) -> Any:
    """Rebuild ``value`` with ``fn`` applied to every leaf, in the order of `flatten_call`."""
    kind = type(value)
    if kind is tuple or kind is list:
        return kind(map_leaves(item, fn) for item in value)
    if kind is dict:
        return {key: map_leaves(item, fn) for key, item in value.items()}
    children, context = pytree_children(value)
    if children is None:
        return fn(value)
    rebuilt = [map_leaves(item, fn) for item in children]
    if hasattr(kind, "_fields") and isinstance(value, tuple):
        return kind(*rebuilt)
    return _pytree.SUPPORTED_NODES[kind].unflatten_fn(rebuilt, context)


def replace_tensors(value: Any, replacements: Iterator[Tensor]) -> Any:
    """Rebuild ``value`` with its tensors taken one after the other from ``replacements``."""
    return map_leaves(value, lambda leaf: next(replacements) if isinstance(leaf, Tensor) else leaf)


def leaf_names(args: tuple[Any, ...], kwargs: dict[str, Any], parameters: list[str]) -> tuple[list[str], list[str]]:
    """Names of the tensor leaves and of the opaque leaves, for example ``input_ids`` or ``caches.0.keys``.

    Args:
        parameters: names of the step's positional parameters; a further positional argument is named by its index.
    """
    tensors: list[str] = []
    opaques: list[str] = []
    for index, value in enumerate(args):
        _name(value, parameters[index] if index < len(parameters) else f"arg{index}", tensors, opaques)
    for name, value in kwargs.items():
        _name(value, name, tensors, opaques)
    return tensors, opaques


def _name(value: Any, path: str, tensors: list[str], opaques: list[str]) -> None:
    if isinstance(value, Tensor):
        tensors.append(path)
        return
    if type(value) is dict:
        items = [(str(key), item) for key, item in value.items()]
    elif type(value) in (tuple, list):
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        children, context = pytree_children(value)
        if children is None:
            if not is_constant(value):
                opaques.append(path)
            return
        names = context if isinstance(context, (list, tuple)) and len(context) == len(children) else range(len(children))
        items = [(str(name), item) for name, item in zip(names, children, strict=True)]
    for key, item in items:
        _name(item, f"{path}.{key}", tensors, opaques)
