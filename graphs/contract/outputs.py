"""The template of a step's output: which leaves a replay produces, and how the structure is put back together."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree

from graphs.contract.arguments import map_leaves, pytree_children
from graphs.errors import ChangingValue, Refusal, UnsupportedOutput

Tensor = torch.Tensor
_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


class _Leaf:
    """A tensor that the replay produces, by position."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


class _Argument:
    """A leaf handed through from the caller: ``opaque`` argument, or tensor argument, by position."""

    __slots__ = ("index", "opaque")

    def __init__(self, index: int, opaque: bool) -> None:
        self.index, self.opaque = index, opaque


Build = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Any]], Any]
"""Puts an output together from produced tensors, tensor arguments and opaque arguments."""


class OutputTemplate:
    """Structure of an output with holes.

    Attributes:
        structure: the output with `_Leaf` and `_Argument` in place of what changes from call to call.
        fill: the caller's output: tensors that the replay produced, tensor and opaque arguments of this call handed through.
    """

    def __init__(self, structure: Any) -> None:
        self.structure = structure
        self.fill = _builder(structure)

    def select(self, output: Any) -> list[Tensor]:
        """The tensors of ``output``, which has this structure, that stand where a replay produces them."""
        found: dict[int, Tensor] = {}
        _select(self.structure, output, found)
        return [found[index] for index in sorted(found)]


def _select(structure: Any, value: Any, found: dict[int, Tensor]) -> None:
    if isinstance(structure, _Leaf):
        found[structure.index] = value
        return
    parts, values = _children(structure), _children(value)
    for part, item in zip(parts or (), values or (), strict=True):
        _select(part, item, found)


def _builder(value: Any) -> Build:
    """A function that builds an output of this structure: what `map_leaves` would find out at each call."""
    kind = type(value)
    if kind is _Leaf or kind is _Argument:
        index = value.index
        if kind is _Leaf:
            return lambda produced, tensors, opaques: produced[index]
        return (lambda p, t, opaques: opaques[index]) if value.opaque else (lambda p, tensors, o: tensors[index])
    if kind is dict:
        items = [(key, _builder(item)) for key, item in value.items()]
        return lambda *parts: {key: build(*parts) for key, build in items}
    children, context = (list(value), None) if kind in (tuple, list) else pytree_children(value)
    if children is None:
        return lambda *_: value
    builders = [_builder(child) for child in children]
    if kind in (tuple, list):
        return lambda *parts: kind([build(*parts) for build in builders])
    if hasattr(kind, "_fields") and isinstance(value, tuple):
        return lambda *parts: kind(*[build(*parts) for build in builders])
    unflatten = _pytree.SUPPORTED_NODES[kind].unflatten_fn
    if isinstance(value, OrderedDict) and dataclasses.is_dataclass(value):
        mirrored = _mirrored_builder(value, builders, unflatten(children, context))
        if mirrored is not None:
            return mirrored
    return lambda *parts: unflatten([build(*parts) for build in builders], context)


def _mirrored_builder(value: Any, builders: list[Build], made: Any) -> Build | None:
    """A builder for a dataclass that is a dict of its own fields too, as the outputs of Hugging Face models are.

    Their constructor takes 9 us; filling items and attributes takes 0.5. None unless that gives what the constructor gave
    (``made``).
    """
    kind: Any = type(value)
    names, attributes = list(value), dict(vars(made))
    items = list(zip(names, builders, strict=True))
    new, set_item = kind.__new__, OrderedDict.__setitem__

    def build(produced: Sequence[Tensor], tensors: Sequence[Tensor], opaques: Sequence[Any]) -> Any:
        output = new(kind)
        fields = output.__dict__
        fields.update(attributes)
        for name, item in items:
            filled = fields[name] = item(produced, tensors, opaques)
            set_item(output, name, filled)
        return output

    fields = {name: getattr(value, name, None) for name in names}
    same_items = list(made) == names and all(dict.__getitem__(made, name) is fields[name] for name in names)
    same_fields = all(vars(made).get(name) is fields[name] for name in names)
    return build if same_items and same_fields else None


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same view of the same storage."""
    return a is b or (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
        and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    )


def output_template(
    output: Any, tensors: Sequence[Tensor], opaques: Sequence[Any], externals: Sequence[Tensor] = ()
) -> tuple[OutputTemplate, list[Tensor]]:
    """Split an output into a template and the tensors that a replay has to produce.

    A leaf that is an argument, the same tensor or the same object, is handed through and not copied; so is one of
    ``externals``, the tensors that the step reads in place (a cache that it also returns).

    Raises:
        UnsupportedOutput: a leaf is neither a tensor, a constant, nor an argument.
    """
    produced: list[Tensor] = []

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor):
            for index, tensor in enumerate(tensors):
                if value.numel() and same_memory(value, tensor):
                    return _Argument(index, opaque=False)
            for index, tensor in enumerate(produced):
                if value is tensor:  # returned twice: one tensor, as in eager
                    return _Leaf(index)
            static = next((tensor for tensor in externals if value.numel() and same_memory(value, tensor)), None)
            if static is not None:
                return static
            produced.append(value)
            return _Leaf(len(produced) - 1)
        for index, item in enumerate(opaques):
            if value is item:
                return _Argument(index, opaque=True)
        if isinstance(value, _CONSTANTS):
            return value
        raise UnsupportedOutput(f"the output holds a {type(value).__name__}, made anew by each call", operator="output")

    structure = map_leaves(output, leaf)
    return OutputTemplate(structure), produced


def compare_templates(first: Any, second: Any, *, arguments: bool = True) -> Refusal | None:
    """The first constant or structural difference between two templates.

    Without ``arguments``, which argument is handed through may differ: a caller who gave one tensor twice.
    """
    if type(first) is not type(second):
        return ChangingValue(f"the output was a {type(first).__name__}, then a {type(second).__name__}", operator="output")
    if isinstance(first, _Leaf):
        return None
    if isinstance(first, _Argument):
        if arguments and (first.index, first.opaque) != (second.index, second.opaque):
            return ChangingValue("the output handed through another argument", operator="output")
        return None
    a, b = _children(first), _children(second)
    if a is None or b is None:
        if first is second or first == second or repr(first) == repr(second):
            return None
        return ChangingValue(f"a constant in the output was {first!r}, then {second!r}", operator="output")
    if len(a) != len(b):
        return ChangingValue(f"the output had {len(a)} parts, then {len(b)}", operator="output")
    return next((refusal for x, y in zip(a, b, strict=True) if (refusal := compare_templates(x, y, arguments=arguments))), None)


def _children(value: Any) -> list[Any] | None:
    if type(value) is dict:
        return [list(value), *value.values()]
    if type(value) in (tuple, list):
        return list(value)
    return pytree_children(value)[0]
