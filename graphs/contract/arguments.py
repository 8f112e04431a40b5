"""Flattening the arguments and outputs of a step, and the signature that a recording is found by.

This is the hot path: one recursive walk fills three lists and nothing else is allocated. ``torch.utils._pytree`` does
the same in three times the time (6.2 against 1.8 us for four tensors, ``benchmarks/test_overhead.py``), so its
registry is used and its walk is not.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree

from graphs.objects.keys import NOT_CONSTANT, PLAIN, attributes_key, constant_key, context_key, names_key, nested_key
from graphs.objects.raw_access import attributes_and_slots, class_attribute, elements_of, of_type, set_attributes_and_slots

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
        signature.append(attributes_key(value, children, opaques))
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
        set_attributes_and_slots(made, {name: _carried(item, replaced) for name, item in attributes.items()})
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


def replace_tensors(value: Any, replacements: Iterator[Tensor]) -> Any:
    """Rebuild ``value`` with its tensors taken one after the other from ``replacements``."""
    return map_leaves(value, lambda leaf: next(replacements) if of_type(leaf, Tensor) else leaf)


class Argument(NamedTuple):
    """A leaf that is part of the signature by its value or identity, and where: ``signature[place]``."""

    place: int
    name: str
    value: Any
    is_object: bool


class Leaves(NamedTuple):
    """The leaves of a call by name, for example ``input_ids`` or ``caches.0.keys``.

    Attributes:
        tensors, opaques: names of `Call.tensors` and of `Call.opaques`.
        changeable: the leaves that may have any number of values: numbers, text and objects, not flags.
    """

    tensors: list[str]
    opaques: list[str]
    changeable: list[Argument]


def named_leaves(call: Call, parameters: list[str]) -> Leaves:
    """The leaves of a call, named, in the order of `flatten_call`.

    Args:
        parameters: names of the step's positional parameters; a further positional argument is named by its index.
    """
    found = Leaves([], [], [])
    end = 0
    for index, value in enumerate(call.args):
        end = _name(value, parameters[index] if index < len(parameters) else f"arg{index}", end, found)
    for name, value in call.kwargs.items():
        end = _name(value, name, end + 1, found)
    start = len(call.signature) - end - (repeats(call.tensors) is not None)
    return found._replace(changeable=[argument._replace(place=argument.place + start) for argument in found.changeable])


def _name(value: Any, path: str, index: int, found: Leaves) -> int:
    """Walk as `_flatten` does; returns the index behind what that adds to the signature."""
    kind = type(value)
    if issubclass(kind, Tensor):
        found.tensors.append(path)
        return index + 6
    if kind in PLAIN:
        if kind in (int, str, bytes):
            found.changeable.append(Argument(index + 1, path, value, False))
        return index + 2
    if kind is dict or kind is list or kind is tuple:
        index += 2
        for key, item in value.items() if kind is dict else enumerate(value):
            index = _name(item, f"{path}.{key!s}", index, found)
        return index
    children, context = pytree_children(value)
    if children is None:
        is_object = constant_key(value) is NOT_CONSTANT
        if is_object:
            found.opaques.append(path)
        found.changeable.append(Argument(index + is_object, path, value, is_object))
        return index + 1 + is_object
    return _name_registered(value, children, context, path, index, found)


def _name_registered(value: Any, children: list[Any], context: Any, path: str, index: int, found: Leaves) -> int:
    """`_name` for a container of a registered kind, which is known by objects of its context and of its attributes too."""
    in_context: list[Any] = []
    in_attributes: list[Any] = []
    context_key(context, in_context)
    attributes_key(value, children, in_attributes)
    found.opaques.extend([f"{path}'s context"] * len(in_context))
    found.changeable.extend(Argument(index + 2, f"{path}'s context", item, True) for item in in_context[:1])
    index += 3
    names = context if type(context) in (list, tuple) and len(context) == len(children) else range(len(children))
    for name, child in zip(names, children, strict=True):
        index = _name(child, f"{path}.{name!s}", index, found)
    found.opaques.extend([f"{path}'s attributes"] * len(in_attributes))
    found.changeable.extend(Argument(index, f"{path}'s attributes", item, True) for item in in_attributes[:1])
    return index + 1
