"""Flattening the arguments and outputs of a step, and the signature that a recording is found by.

This is the hot path: one recursive walk fills three lists and nothing else is allocated. ``torch.utils._pytree`` does
the same in three times the time (6.2 against 1.8 us for four tensors, ``benchmarks/test_overhead.py``), so its
registry is used and its walk is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree

from graphs.contract.keys import NOT_CONSTANT, PLAIN, constant_key, context_key, names_key, nested_key

Tensor = torch.Tensor
PLAIN_TENSORS = frozenset((Tensor, torch.nn.Parameter, torch.nn.Buffer))


class Call(NamedTuple):
    """One call, flattened.

    Attributes:
        tensors: tensor leaves in traversal order.
        opaques: leaves that are neither tensors nor constants, for example a Hugging Face ``Cache``, and objects that a container
            of a registered kind holds beside its leaves.
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
        _flatten(value, tensors, opaques, signature)
    for name, value in kwargs.items():
        signature.append(name)
        _flatten(value, tensors, opaques, signature)
    if len(tensors) > 1:
        given_again = repeats(tensors)
        if given_again is not None:
            signature.append(given_again)
    return Call(tensors, opaques, tuple(signature))


def repeats(tensors: Sequence[Tensor]) -> tuple[int, ...] | None:
    """For each tensor the position where the very same object stands first; None where all are different objects."""
    identities = [*map(id, tensors)]
    return tuple(map(identities.index, identities)) if len({*identities}) < len(identities) else None


def traits(tensor: Tensor) -> tuple[Any, ...]:
    """What a tensor is beyond shape, strides, dtype and device, and what hangs on it; empty for most.

    An attribute that is no constant enters by its type alone: such a call is not recorded (`objects_on`).
    """
    flags = (tensor.requires_grad, tensor.is_conj(), tensor.is_neg(), tensor.is_inference())
    attributes = tensor.__dict__
    if not attributes:
        return flags if True in flags else ()
    return (*flags, *((name, _attribute_key(value)) for name, value in attributes.items()))


def _attribute_key(value: Any) -> Any:
    key = nested_key(value)
    return type(value) if key is NOT_CONSTANT else key


def objects_on(tensor: Tensor) -> list[str]:
    """Names of attributes of a tensor that are no constants."""
    return [name for name, value in tensor.__dict__.items() if nested_key(value) is NOT_CONSTANT]


def _flatten(value: Any, tensors: list[Tensor], opaques: list[Any], signature: list[Any]) -> None:
    kind = type(value)
    if kind is Tensor or issubclass(kind, Tensor):
        tensors.append(value)
        if kind not in PLAIN_TENSORS:  # whatever it is asked runs code of its class
            signature += (kind, (), (), None, None, ())
            return
        signature += (kind, value.shape, value.stride(), value.dtype, value.device, traits(value))
    elif kind in PLAIN:
        signature += (kind, value)
    elif kind is tuple or kind is list:
        signature += (kind, len(value))
        for item in value:
            _flatten(item, tensors, opaques, signature)
    elif kind is dict:
        signature += (dict, names_key(value))
        for item in value.values():
            _flatten(item, tensors, opaques, signature)
    else:
        _flatten_other(value, tensors, opaques, signature)


def _flatten_other(value: Any, tensors: list[Tensor], opaques: list[Any], signature: list[Any]) -> None:
    children, context = pytree_children(value)
    if children is not None:
        signature += (type(value), len(children), context_key(context, opaques))
        for item in children:
            _flatten(item, tensors, opaques, signature)
        return
    key = constant_key(value)
    if key is NOT_CONSTANT:
        opaques.append(value)
        signature += (type(value), id(value))
    else:
        signature.append(key)


def is_constant(value: Any) -> bool:
    """Whether a leaf is part of the key by its value."""
    return type(value) in PLAIN or constant_key(value) is not NOT_CONSTANT


def is_leaf(value: Any) -> bool:
    """Whether a value holds no others, as far as flattening sees."""
    return type(value) not in (tuple, list, dict) and pytree_children(value)[0] is None


def pytree_children(value: Any) -> tuple[list[Any] | None, Any]:
    """Children and context of a registered pytree node, ``(None, None)`` for a leaf."""
    kind = type(value)
    if kind in PLAIN:
        return None, None
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return list(value), None
    node = _pytree.SUPPORTED_NODES.get(kind)
    if node is None:
        return None, None
    children, context = node.flatten_fn(value)
    return list(children), context


def map_leaves(value: Any, fn: Callable[[Any], Any]) -> Any:
    """Rebuild ``value`` with ``fn`` applied to every leaf, in the order of `flatten_call`."""
    return fn(value) if is_leaf(value) else map_children(value, lambda item: map_leaves(item, fn))


def map_children(value: Any, fn: Callable[[Any], Any]) -> Any:
    """Rebuild a container with ``fn`` applied to what it holds directly."""
    kind = type(value)
    if kind is tuple or kind is list:
        return kind([fn(item) for item in value])
    if kind is dict:
        return {key: fn(item) for key, item in value.items()}
    children, context = pytree_children(value)
    rebuilt = [fn(item) for item in children or ()]
    if hasattr(kind, "_fields") and isinstance(value, tuple):
        return tuple.__new__(kind, rebuilt)  # past a constructor that checks or computes
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
    items = _items(value)
    if items is None:
        if not is_constant(value):
            opaques.append(path)
        return
    opaques += [f"{path}'s context"] * len(_beside(value))
    for key, item in items:
        _name(item, f"{path}.{key}", tensors, opaques)


def _beside(value: Any) -> list[Any]:
    """The objects of a container of a registered kind that it is known by beside its children, in the order of `flatten_call`."""
    objects: list[Any] = []
    if type(value) not in (tuple, list, dict):
        context_key(pytree_children(value)[1], objects)
    return objects


def _items(value: Any) -> list[tuple[str, Any]] | None:
    """What a container holds, with names; None for a leaf."""
    if type(value) is dict:
        return [(str(key), item) for key, item in value.items()]
    if type(value) in (tuple, list):
        return [(str(index), item) for index, item in enumerate(value)]
    children, context = pytree_children(value)
    if children is None:
        return None
    names = context if isinstance(context, (list, tuple)) and len(context) == len(children) else range(len(children))
    return [(str(name), item) for name, item in zip(names, children, strict=True)]


class Argument(NamedTuple):
    """A leaf that is part of the signature by its value or identity, and where: ``signature[place]``."""

    place: int
    name: str
    value: Any
    is_object: bool


def changeable(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], parameters: list[str]) -> list[Argument]:
    """The leaves of a call that may have any number of values: numbers, text and objects, not flags."""
    found: list[Argument] = []
    end = 0
    for index, value in enumerate(args):
        end = _find(value, parameters[index] if index < len(parameters) else f"arg{index}", end, found)
    for name, value in kwargs.items():
        end = _find(value, name, end + 1, found)
    start = len(call.signature) - end - (repeats(call.tensors) is not None)
    return [argument._replace(place=argument.place + start) for argument in found]


def _find(value: Any, path: str, index: int, found: list[Argument]) -> int:
    """Walk as `_flatten` does; returns the index behind what that adds to the signature."""
    kind = type(value)
    if isinstance(value, Tensor):
        return index + 6
    if kind in PLAIN:
        if kind in (int, str, bytes):
            found.append(Argument(index + 1, path, value, False))
        return index + 2
    items = _items(value)
    if items is None:
        constant = constant_key(value) is not NOT_CONSTANT
        found.append(Argument(index if constant else index + 1, path, value, not constant))
        return index + (1 if constant else 2)
    found += [Argument(index + 2, f"{path}'s context", item, True) for item in _beside(value)[:1]]
    index += 2 if kind in (tuple, list, dict) else 3
    for key, item in items:
        index = _find(item, f"{path}.{key}", index, found)
    return index
