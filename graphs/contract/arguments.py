"""Flattening the arguments and outputs of a step, and the signature that a recording is found by.

This is the hot path: one recursive walk fills three lists and nothing else is allocated. ``torch.utils._pytree`` does
the same in three times the time (6.2 against 1.8 us for four tensors, ``benchmarks/test_overhead.py``), so its
registry is used and its walk is not.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree

from graphs.objects.keys import NOT_CONSTANT, PLAIN, constant_key, context_key, names_key, nested_key
from graphs.objects.raw_access import attributes_of, class_attribute, elements_of, filled_slots, of_type, slots_of

Tensor = torch.Tensor
PLAIN_TENSORS = frozenset((Tensor, torch.nn.Parameter, torch.nn.Buffer))


class Call(NamedTuple):
    """One call, flattened.

    Attributes:
        tensors: tensor leaves in traversal order.
        opaques: leaves that are neither tensors nor constants, for example a Hugging Face ``Cache``, and objects that a container
            of a registered kind holds beside its leaves.
        signature: structure, shapes, strides, dtypes, devices and constants; opaque leaves by identity.
        args, kwargs: as given.
    """

    tensors: list[Tensor]
    opaques: list[Any]
    signature: tuple[Any, ...]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}  # noqa: RUF012  # never written


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
    return Call(tensors, opaques, tuple(signature), args, kwargs)


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
        signature.append(_beyond(value, children, opaques))
        return
    key = constant_key(value)
    if key is NOT_CONSTANT:
        opaques.append(value)
        signature += (type(value), id(value))
    else:
        signature.append(key)


def _beyond(value: Any, children: list[Any], opaques: list[Any]) -> Any:
    """The key of the attributes of a container of a registered kind, which the step can read whatever the kind's children are.

    An attribute that is a child, or a list of them, is known by their positions.
    """
    attributes = attributes_and_slots(value)
    if not attributes:
        return ()
    child_keys = {id(child): ("child", index) for index, child in enumerate(children)}
    return tuple([(name, context_key(item, opaques, child_keys)) for name, item in attributes.items()])


def attributes_and_slots(value: Any) -> dict[str, Any]:
    """The attributes of an object, as they lie in its dictionary and its slots."""
    attributes = attributes_of(value) or {}
    slots = _slots(type(value))
    return {**attributes, **filled_slots(slots, value)} if slots else attributes


_slots: Any = functools.lru_cache(maxsize=1024)(slots_of)


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
    if issubclass(kind, tuple) and class_attribute(kind, "_fields") is not None:
        return elements_of(value), None
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
    children = children or []
    rebuilt = [fn(item) for item in children]
    if issubclass(kind, tuple) and class_attribute(kind, "_fields") is not None:
        made = tuple.__new__(kind, rebuilt)  # past a constructor that checks or computes
    else:
        made = _pytree.SUPPORTED_NODES[kind].unflatten_fn(rebuilt, context)
    attributes = attributes_and_slots(value)
    if type(made) is kind and (attributes or attributes_and_slots(made)):
        replaced = {id(child): item for child, item in zip(children, rebuilt, strict=True)}
        _set_attributes(made, {name: _carried(item, replaced) for name, item in attributes.items()})
    return made


def _carried(value: Any, replaced: dict[int, Any]) -> Any:
    """An attribute with what stands for the children in their place; the very object where it holds none of them."""
    if id(value) in replaced:
        return replaced[id(value)]
    if type(value) in (tuple, list):
        items = [_carried(item, replaced) for item in value]
        return value if all(map(operator.is_, items, value)) else type(value)(items)
    if type(value) is dict:
        entries = {key: _carried(item, replaced) for key, item in value.items()}
        return value if all(map(operator.is_, entries.values(), value.values())) else entries
    return value


def _set_attributes(value: Any, attributes: dict[str, Any]) -> None:
    """Make attributes and slots of an object those that are given, without asking the object."""
    slots = _slots(type(value))
    for name, slot in slots.items():
        if name in attributes:
            slot.__set__(value, attributes[name])
    own = attributes_of(value)
    if own is not None:
        own.clear()
        own.update((name, item) for name, item in attributes.items() if name not in slots)


def replace_tensors(value: Any, replacements: Iterator[Tensor]) -> Any:
    """Rebuild ``value`` with its tensors taken one after the other from ``replacements``."""
    return map_leaves(value, lambda leaf: next(replacements) if of_type(leaf, Tensor) else leaf)


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
    if of_type(value, Tensor):
        tensors.append(path)
        return
    items = _items(value)
    if items is None:
        if not is_constant(value):
            opaques.append(path)
        return
    in_context, in_attributes = _beside(value)
    opaques += [f"{path}'s context"] * len(in_context)
    for key, item in items:
        _name(item, f"{path}.{key}", tensors, opaques)
    opaques += [f"{path}'s attributes"] * len(in_attributes)


def _beside(value: Any) -> tuple[list[Any], list[Any]]:
    """The objects of a container of a registered kind that it is known by beside its children: of its context, which comes before
    them in `flatten_call`, and of its attributes, which come after.
    """
    in_context: list[Any] = []
    in_attributes: list[Any] = []
    if type(value) not in (tuple, list, dict):
        children, context = pytree_children(value)
        context_key(context, in_context)
        _beyond(value, children or [], in_attributes)
    return in_context, in_attributes


def _items(value: Any) -> list[tuple[str, Any]] | None:
    """What a container holds, with names; None for a leaf."""
    if type(value) is dict:
        return [(str(key), item) for key, item in value.items()]
    if type(value) in (tuple, list):
        return [(str(index), item) for index, item in enumerate(value)]
    children, context = pytree_children(value)
    if children is None:
        return None
    names = context if type(context) in (list, tuple) and len(context) == len(children) else range(len(children))
    return [(str(name), item) for name, item in zip(names, children, strict=True)]


class Argument(NamedTuple):
    """A leaf that is part of the signature by its value or identity, and where: ``signature[place]``."""

    place: int
    name: str
    value: Any
    is_object: bool


def changeable(call: Call, parameters: list[str]) -> list[Argument]:
    """The leaves of a call that may have any number of values: numbers, text and objects, not flags."""
    found: list[Argument] = []
    end = 0
    for index, value in enumerate(call.args):
        end = _find(value, parameters[index] if index < len(parameters) else f"arg{index}", end, found)
    for name, value in call.kwargs.items():
        end = _find(value, name, end + 1, found)
    start = len(call.signature) - end - (repeats(call.tensors) is not None)
    return [argument._replace(place=argument.place + start) for argument in found]


def _find(value: Any, path: str, index: int, found: list[Argument]) -> int:
    """Walk as `_flatten` does; returns the index behind what that adds to the signature."""
    kind = type(value)
    if issubclass(kind, Tensor):
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
    in_context, in_attributes = _beside(value)
    found += [Argument(index + 2, f"{path}'s context", item, True) for item in in_context[:1]]
    registered = kind not in (tuple, list, dict)
    index += 3 if registered else 2
    for key, item in items:
        index = _find(item, f"{path}.{key}", index, found)
    found += [Argument(index, f"{path}'s attributes", item, True) for item in in_attributes[:1]]
    return index + 1 if registered else index
