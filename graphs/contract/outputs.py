"""The template of a step's output: which leaves a replay produces, and how the structure is put back together."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils import _pytree

from graphs.contract.arguments import is_leaf, map_children, pytree_children
from graphs.contract.operators import storage_id
from graphs.contract.output_views import Bits, Layout, Shared, shared_memory
from graphs.contract.slots import physical
from graphs.errors import ChangingValue, Refusal, UnsupportedOutput

Tensor = torch.Tensor
_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


class _Leaf:
    """A tensor that the replay produces, by position, and what is set on it."""

    __slots__ = ("bits", "index")

    def __init__(self, index: int, bits: Bits) -> None:
        self.index, self.bits = index, bits


class _Part:
    """A part of a flat tensor that the replay produces: the memory of several outputs."""

    __slots__ = ("index", "layout", "shared")

    def __init__(self, index: int, shared: Shared, layout: Layout) -> None:
        self.index, self.shared, self.layout = index, shared, layout


class _Argument:
    """A leaf handed through from the caller: ``opaque`` argument, or tensor argument, by position."""

    __slots__ = ("index", "opaque")

    def __init__(self, index: int, opaque: bool) -> None:
        self.index, self.opaque = index, opaque


class _View:
    """A view of an argument of this call, by position, or of a tensor of the step's own."""

    __slots__ = ("layout", "source")

    def __init__(self, source: int | Tensor, layout: Layout) -> None:
        self.source, self.layout = source, layout


class _Held:
    """An object that hangs on the model or on an opaque argument, and is returned as it is."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


_HOLES = (_Leaf, _Part, _Argument, _View, _Held)
Build = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Any]], Any]
"""Puts an output together from produced tensors, tensor arguments and opaque arguments."""


class OutputTemplate:
    """Structure of an output with holes.

    Attributes:
        structure: the output with holes in place of tensors and of what is handed through.
        fill: the caller's output: tensors that the replay produced, tensor and opaque arguments of this call handed through.
    """

    def __init__(self, structure: Any) -> None:
        self.structure = structure
        self.fill = _builder(structure)

    def select(self, output: Any) -> list[Tensor]:
        """What a replay produces, of an ``output`` that has this structure."""
        found: dict[int, Tensor] = {}
        for hole, value in _holes(self.structure, output):
            if isinstance(hole, _Leaf):
                found[hole.index] = physical(value)
            elif isinstance(hole, _Part) and hole.index not in found:
                found[hole.index] = hole.shared.behind(value, hole.layout)
        return [found[index] for index in sorted(found)]

    def tensors(self, output: Any) -> list[Tensor]:
        """The tensors of ``output`` that a replay produces, each by itself, as its memory holds it: to be compared."""
        return [physical(value) for hole, value in _holes(self.structure, output) if isinstance(hole, (_Leaf, _Part))]

    @property
    def held(self) -> list[Any]:
        """The objects of the model and of opaque arguments that are handed out as they are, tensors left out."""
        holes = [hole for hole, _ in _holes(self.structure, self.structure) if isinstance(hole, _Held)]
        return [hole.value for hole in holes if not isinstance(hole.value, Tensor)]

    def seen(self, produced: Sequence[Tensor]) -> list[Tensor]:
        """The same of what a replay produced."""
        holes = [hole for hole, _ in _holes(self.structure, self.structure) if isinstance(hole, (_Leaf, _Part))]
        return [
            hole.layout.memory_within(produced[hole.index]) if isinstance(hole, _Part) else produced[hole.index] for hole in holes
        ]


def _holes(structure: Any, value: Any) -> Iterator[tuple[Any, Any]]:
    """The holes of a structure, with what stands there in ``value``."""
    if isinstance(structure, _HOLES):
        yield structure, value
        return
    parts, values = _children(structure), _children(value)
    for part, item in zip(parts or (), values or (), strict=True):
        yield from _holes(part, item)


def _builder(value: Any) -> Build:
    """A function that builds an output of this structure: what `map_leaves` would find out at each call."""
    kind = type(value)
    if kind in _HOLES:
        return _hole_builder(value)
    if kind is dict:
        items = [(key, _builder(item)) for key, item in value.items()]
        return lambda *parts: {key: build(*parts) for key, build in items}
    children, context = (list(value), None) if kind in (tuple, list) else pytree_children(value)
    if children is None:
        return _record_builder(value) if is_record(value) else lambda *_: value
    builders = [_builder(child) for child in children]
    if kind in (tuple, list):
        return lambda *parts: kind([build(*parts) for build in builders])
    if hasattr(kind, "_fields") and isinstance(value, tuple):
        return lambda *parts: tuple.__new__(kind, [build(*parts) for build in builders])
    unflatten = _pytree.SUPPORTED_NODES[kind].unflatten_fn
    if isinstance(value, OrderedDict) and dataclasses.is_dataclass(value):
        mirrored = _mirrored_builder(value, builders, unflatten(children, context))
        if mirrored is not None:
            return mirrored
    return lambda *parts: unflatten([build(*parts) for build in builders], context)


def _hole_builder(hole: Any) -> Build:
    if isinstance(hole, _Leaf):
        index, bits = hole.index, hole.bits
        if bits == Bits():
            return lambda produced, tensors, opaques: produced[index]
        return lambda produced, tensors, opaques: bits.set_on(produced[index])
    if isinstance(hole, _Part):
        index, layout = hole.index, hole.layout
        return lambda produced, tensors, opaques: layout.within(produced[index])
    if isinstance(hole, _View):
        source, layout = hole.source, hole.layout
        if isinstance(source, Tensor):
            return lambda *_: layout.within(source)
        return lambda produced, tensors, opaques: layout.within(tensors[source])
    if isinstance(hole, _Held):
        held = hole.value
        return lambda *_: held
    index = hole.index
    return (lambda p, t, opaques: opaques[index]) if hole.opaque else (lambda p, tensors, o: tensors[index])


def is_record(value: Any) -> bool:
    """Whether a value is an instance of a dataclass: an output that is nothing but its attributes."""
    return dataclasses.is_dataclass(value) and not isinstance(value, (type, OrderedDict))


def record_parts(value: Any) -> dict[str, Any]:
    """The attributes of a dataclass's instance, those in slots and those that are no fields included."""
    fields = [field.name for field in dataclasses.fields(value)]
    attributes = getattr(value, "__dict__", {})
    slots = {name: getattr(value, name) for name in fields if name not in attributes and hasattr(value, name)}
    return {**slots, **attributes}


def made_record(kind: Any, parts: dict[str, Any]) -> Any:
    """An instance with these attributes; its constructor, which may compute, does not run."""
    made = object.__new__(kind)
    for name, part in parts.items():
        object.__setattr__(made, name, part)
    return made


def _record_builder(value: Any) -> Build:
    kind, items = type(value), [(name, _builder(part)) for name, part in record_parts(value).items()]
    return lambda *parts: made_record(kind, {name: build(*parts) for name, build in items})


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
        and Bits.of(a) == Bits.of(b)
        and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    )


@dataclasses.dataclass
class Known:
    """What an output may hand through.

    Attributes:
        tensors, opaques: the arguments.
        externals: tensors that the step reads in place: a cache that it also returns.
        held: whether an object hangs on the model or on an opaque argument.
        views: whether outputs that are views are handed out as views: not where sizes or layouts are others than recorded.
    """

    tensors: Sequence[Tensor]
    opaques: Sequence[Any]
    externals: Sequence[Tensor] = ()
    held: Callable[[Any], bool] = lambda value: False
    views: bool = True


def output_template(output: Any, known: Known) -> tuple[OutputTemplate, list[Tensor]]:
    """Split an output into a template and the tensors that a replay has to produce.

    A leaf that is an argument, the same tensor or the same object, is handed through and not copied; so are views of
    arguments and of `Known.externals`.

    Raises:
        UnsupportedOutput: a leaf is neither a tensor, a constant, nor an argument, nor held by the model.
    """
    made: list[Tensor] = []

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor):
            if type(value) not in (Tensor, torch.nn.Parameter) or value.layout != torch.strided:
                raise UnsupportedOutput(
                    f"the output holds a {type(value).__name__} with layout {value.layout}", operator="output"
                )
            handed = _handed_through(value, known)
            if handed is None and not any(value is tensor for tensor in made):
                made.append(value)
            return value if handed is None else handed
        if isinstance(value, _CONSTANTS):
            return value
        raise UnsupportedOutput(f"the output holds a {type(value).__name__}, made anew by each call", operator="output")

    structure = _mapped(output, known, leaf)
    holes, produced = _produced_holes(made, known)
    ours = {id(tensor) for tensor in made}
    return OutputTemplate(map_output(structure, lambda part: holes[id(part)] if id(part) in ours else part)), produced


def _handed_through(value: Tensor, known: Known) -> Any:
    """What stands for a tensor that is not made by the step; None for one that is."""
    if not value.numel():
        return None
    for index, tensor in enumerate(known.tensors):
        if same_memory(value, tensor):
            return _Argument(index, opaque=False)
    for tensor in known.externals:
        if same_memory(value, tensor):
            return _Held(tensor)
    if known.views:
        sources: list[tuple[int | Tensor, Tensor]] = [
            *enumerate(known.tensors),
            *((tensor, tensor) for tensor in known.externals),
        ]
        for source, tensor in sources:
            if storage_id(tensor) == storage_id(value):
                return _View(source, Layout.of(value, tensor.data_ptr()))
    return None


def _produced_holes(made: list[Tensor], known: Known) -> tuple[dict[int, Any], list[Tensor]]:
    """The hole of each tensor that the step made, by identity, and what a replay produces for them."""
    holes: dict[int, Any] = {}
    produced: list[Tensor] = []
    groups = shared_memory(made) if known.views else []
    for tensor in made:
        if id(tensor) in holes:
            continue
        group = next((group for group in groups if id(tensor) in group[1]), None)
        if group is None:
            holes[id(tensor)] = _Leaf(len(produced), Bits.of(tensor))
            produced.append(physical(tensor))
        else:
            shared, layouts = group
            holes.update({identity: _Part(len(produced), shared, layout) for identity, layout in layouts.items()})
            produced.append(shared.behind(tensor, layouts[id(tensor)]))
    return holes, produced


def _mapped(value: Any, known: Known, leaf: Callable[[Any], Any]) -> Any:
    """``value`` with ``leaf`` applied to its leaves, and with a hole for each object that is handed through as it is."""
    for index, item in enumerate(known.opaques):
        if value is item:
            return _Argument(index, opaque=True)
    if not isinstance(value, (Tensor, *_CONSTANTS, tuple)) and known.held(value):
        return _Held(value)
    if _children(value) is None:
        return leaf(value)
    return _with_parts(value, lambda part: _mapped(part, known, leaf))


def map_output(value: Any, fn: Callable[[Any], Any]) -> Any:
    """`map_leaves` for outputs: an instance of a dataclass is no leaf, but one with other attributes."""
    if isinstance(value, _HOLES) or _children(value) is None:
        return fn(value)
    return _with_parts(value, lambda part: map_output(part, fn))


def _with_parts(value: Any, fn: Callable[[Any], Any]) -> Any:
    if is_record(value) and is_leaf(value):
        return made_record(type(value), {name: fn(part) for name, part in record_parts(value).items()})
    return map_children(value, fn)


def compare_templates(first: Any, second: Any, *, arguments: bool = True) -> Refusal | None:
    """The first constant or structural difference between two templates.

    Without ``arguments``, which argument is handed through may differ: a caller who gave one tensor twice.
    """
    if type(first) is not type(second):
        return ChangingValue(f"the output was a {type(first).__name__}, then a {type(second).__name__}", operator="output")
    if isinstance(first, _Leaf):
        if first.bits == second.bits:
            return None
        return ChangingValue(f"an output had {first.bits}, then {second.bits}", operator="output")
    if isinstance(first, (_Part, _View)):
        if first.layout == second.layout or not arguments:
            return None
        return ChangingValue("an output was another view than in the step before", operator="output")
    if isinstance(first, _Held):
        a, b = first.value, second.value
        same = a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and same_memory(a, b))
        return None if same else ChangingValue("the output was another object than in the step before", operator="output")
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
    children = pytree_children(value)[0]
    return [type(value), *record_parts(value).values()] if children is None and is_record(value) else children
