"""Putting an output together from what a replay produced, with one object where the step returned one."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree

from graphs.contract.arguments import pytree_children
from graphs.contract.outputs.holes import HOLES, Held, Leaf, Part, View, children_of, is_record, made_record, record_parts
from graphs.contract.outputs.views import Bits
from graphs.errors import UnsupportedOutput
from graphs.objects.cells import ABSENT
from graphs.objects.keys import context_key
from graphs.objects.raw_access import attributes_and_slots, class_attribute, of_type

Tensor = torch.Tensor
Build = Callable[..., Any]
"""Puts an output together from produced tensors, tensor arguments and opaque arguments; and what was built already, where parts
are shared, by identity of the part."""


def identities_of(structure: Any) -> tuple[int, ...]:
    """For each part of a structure, in order, where it stands first: which parts are one object."""
    known: dict[int, tuple[int, Any]] = {}  # with the part, so that its identity is not another's meanwhile
    found: list[int] = []
    pending = [structure]
    while pending:
        part = pending.pop()
        children = [] if of_type(part, HOLES) else children_of(part)
        if children is None:
            continue  # a constant
        if id(part) not in known:
            known[id(part)] = len(known), part
            pending.extend(reversed(children))
        found.append(known[id(part)][0])
    return tuple(found)


class Builder:
    """Functions that build an output of one structure: what `map_leaves` would find out at each call."""

    def __init__(self, structure: Any, identities: tuple[int, ...]) -> None:
        self._made: dict[int, tuple[Build, Any]] = {}  # by identity of the part, with the part
        self._shares = len({*identities}) < len(identities)
        build = self._build(structure)
        self.fill: Build = (lambda produced, tensors, opaques: build(produced, tensors, opaques, {})) if self._shares else build

    def _build(self, value: Any) -> Build:
        """The function for a part; where parts are shared, one that builds it once for each output."""
        if not self._shares:
            return self._alone(value)
        key = id(value)
        if key not in self._made:
            alone = self._alone(value)

            def build(produced: Any, tensors: Any, opaques: Any, memo: dict[int, Any]) -> Any:
                if key not in memo:
                    memo[key] = alone(produced, tensors, opaques, memo)
                return memo[key]

            self._made[key] = build, value
        return self._made[key][0]

    def _alone(self, value: Any) -> Build:
        kind = type(value)
        if kind in HOLES:
            return _hole_builder(value)
        if kind is dict:
            items = [(key, self._build(item)) for key, item in value.items()]
            return lambda *parts: {key: build(*parts) for key, build in items}
        children, context = (list(value), None) if kind in (tuple, list) else pytree_children(value)
        if children is None:
            return self._record(value) if is_record(value) else lambda *_: value
        builders = [self._build(child) for child in children]
        if kind in (tuple, list):
            return lambda *parts: kind([build(*parts) for build in builders])
        if issubclass(kind, tuple) and class_attribute(kind, "_fields") is not None:
            _check_attributes(value, tuple.__new__(kind, children), children)
            return lambda *parts: tuple.__new__(kind, [build(*parts) for build in builders])
        unflatten = _pytree.SUPPORTED_NODES[kind].unflatten_fn
        made = unflatten(children, context)
        _check_attributes(value, made, children)
        if issubclass(kind, OrderedDict) and dataclasses.is_dataclass(kind):
            mirrored = _mirrored_builder(value, builders, made)
            if mirrored is not None:
                return mirrored
        return lambda *parts: unflatten([build(*parts) for build in builders], context)

    def _record(self, value: Any) -> Build:
        kind, items = type(value), [(name, self._build(part)) for name, part in record_parts(value).items()]
        return lambda *parts: made_record(kind, {name: build(*parts) for name, build in items})


def _check_attributes(value: Any, made: Any, children: list[Any]) -> None:
    """That a container of a registered kind is nothing but what its ``children`` and its context make of it.

    Raises:
        UnsupportedOutput: an attribute would be lost.
    """
    child_keys = {id(child): ("child", index) for index, child in enumerate(children)}
    attributes, others = attributes_and_slots(value), attributes_and_slots(made)
    for name in {**attributes, **others}:
        keys = [context_key(held.get(name, ABSENT), None, child_keys) for held in (attributes, others)]
        if keys[0] != keys[1]:
            detail = f"{name} is set on a {type(value).__name__} in the output, which is made of other things"
            raise UnsupportedOutput(detail, operator=f"output.{name}", remedy="return it beside the container")


def _hole_builder(hole: Any) -> Build:
    hung = getattr(hole, "hung", None)
    if hung:
        bare = _bare_builder(hole)

        def build(*parts: Any) -> Any:
            tensor = bare(*parts)
            tensor.__dict__.update(copy.deepcopy(hung))
            return tensor

        return build
    return _bare_builder(hole)


def _bare_builder(hole: Any) -> Build:
    """The function for a hole without what hangs on its tensor."""
    if of_type(hole, Leaf):
        index, bits = hole.index, hole.bits
        if bits == Bits():
            return lambda produced, *_: produced[index]
        return lambda produced, *_: bits.set_on(produced[index])
    if of_type(hole, Part):
        index, layout = hole.index, hole.layout
        return lambda produced, *_: layout.within(produced[index])
    if of_type(hole, View):
        source, layout = hole.source, hole.layout
        if of_type(source, Tensor):
            return lambda *_: layout.within(source)
        return lambda produced, tensors, *_: layout.within(tensors[source])
    if of_type(hole, Held):
        held = hole.value
        return lambda *_: held
    index = hole.index
    return (lambda p, t, opaques, *_: opaques[index]) if hole.opaque else (lambda p, tensors, *_: tensors[index])


def _mirrored_builder(value: Any, builders: list[Build], made: Any) -> Build | None:
    """A builder for a dataclass that is a dict of its own fields too, as the outputs of Hugging Face models are.

    Their constructor takes 9 us; filling items and attributes takes 0.5. None unless that gives what the constructor gave
    (``made``).
    """
    kind: Any = type(value)
    names, attributes = list(value), dict(vars(made))
    items = list(zip(names, builders, strict=True))
    new, set_item = kind.__new__, OrderedDict.__setitem__

    def build(*parts: Any) -> Any:
        output = new(kind)
        fields = output.__dict__
        fields.update(attributes)
        for name, item in items:
            filled = fields[name] = item(*parts)
            set_item(output, name, filled)
        return output

    fields = {name: getattr(value, name, None) for name in names}
    same_items = list(made) == names and all(dict.__getitem__(made, name) is fields[name] for name in names)
    same_fields = all(vars(made).get(name) is fields[name] for name in names)
    return build if same_items and same_fields else None
