"""What the arguments of a call lead to beside tensors and opaque objects: state that a step may change, and classes.

A container of a registered kind is known by its children and its context. The step sees the object itself: its attributes, a list
that is a child, the context. And what is part of a key by its value is of a class, in which attributes and methods are looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any

import torch

from graphs.contract.arguments import PLAIN_TENSORS, pytree_children
from graphs.objects.keys import PLAIN
from graphs.objects.raw_access import IMMUTABLE_TYPE, attributes_and_slots, elements_of, items_of, of_type, sequence_class
from graphs.state.python_state import PythonState

_WITHOUT_PARTS = (type, ModuleType, FunctionType)


def argument_state(args: tuple[Any, ...], kwargs: Mapping[str, Any], known: PythonState) -> PythonState:
    """A snapshot of everything mutable that hangs on the arguments of a call, and is not in ``known``.

    What tensors are themselves, and what operators write to them, is left to others.
    """
    roots = [*((f"argument[{index}]", value) for index, value in enumerate(args)), *kwargs.items()]
    contexts = [(f"{path}'s context", context) for path, value in roots for context in _contexts(value)]
    return PythonState([*contexts, *roots], known, generators=False, tensors=False)


def _contexts(value: Any) -> Iterator[Any]:
    """What containers of registered kinds hold beside their children, as far as it can change."""
    for part in walk(value, lambda part: [*(_children(part) or ())]):
        context = pytree_children(part)[1]
        if type(context) not in PLAIN:
            yield context


def classes_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], opaques: list[Any]) -> list[type[Any]]:
    """The classes, written in Python, of all that is part of the key of a call by its value.

    Args:
        opaques: arguments whose classes are found where they are.
    """
    kinds = dict.fromkeys(type(part) for part in held_by(args, kwargs, opaques).values())
    return [kind for kind in kinds if not kind.__flags__ & IMMUTABLE_TYPE and kind not in PLAIN_TENSORS]


def held_by(args: tuple[Any, ...], kwargs: Mapping[str, Any], opaques: list[Any]) -> dict[int, Any]:
    """The arguments of a call and what hangs on them, by identity; opaque arguments are left out."""
    found: dict[int, Any] = {}
    for value in (*args, *kwargs.values()):
        found.update((id(part), part) for part in walk(value, _parts, [*opaques, *found.values()]))
    return found


def walk(value: Any, parts: Callable[[Any], list[Any]], without: list[Any] | tuple[Any, ...] = ()) -> Iterator[Any]:
    """A value and, each once, all that ``parts`` leads to from it."""
    seen = {id(item): item for item in without}  # with the items, so that no identity is reused
    pending = [value]
    while pending:
        part = pending.pop()
        if type(part) in PLAIN or id(part) in seen:
            continue
        seen[id(part)] = part
        yield part
        pending += parts(part)


def _children(value: Any) -> list[Any] | None:
    """What a container among the arguments holds; None for a leaf."""
    if type(value) is dict:
        return list(value.values())
    return list(value) if type(value) in (tuple, list) else pytree_children(value)[0]


def _parts(value: Any) -> list[Any]:
    """What a key may look at: children, context, items and keys, and attributes."""
    kind = type(value)
    if issubclass(kind, _WITHOUT_PARTS) or (issubclass(kind, torch.Tensor) and kind not in PLAIN_TENSORS):
        return []
    found = [*attributes_and_slots(value).values()]
    children, context = (None, None) if kind in (tuple, list, dict) else pytree_children(value)
    if children is not None:
        found += [*children, context]
    elif of_type(value, dict):
        found += [part for item in items_of(value) for part in item]
    elif sequence_class(value) is not None:
        found += elements_of(value)
    elif kind is slice:
        found += [value.start, value.stop, value.step]
    return found
