"""The cells of one object, by its kind, and what it leads to.

Each function here adds to an inventory what can change of an object itself, and yields what is to be looked into next.
"""

from __future__ import annotations

import functools
import random
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

from graphs.objects.c_objects import elements_in, held_inside, partial_content, variable_content
from graphs.objects.cells import AttributesView, Cell, CellView, SpecialView, read_set, write_sequence, write_set
from graphs.objects.kinds import ATOMS, Kind, kind_of
from graphs.objects.libraries import origin_of_code, origin_of_type
from graphs.objects.raw_access import (
    attributes_of,
    bases_of,
    class_attribute,
    closure_of,
    elements_of,
    functions_in,
    items_of,
    notes_of,
    of_type,
    sequence_class,
    slots_of,
)
from graphs.objects.special_names import LAYER_MEMBERS
from graphs.python_reads.named_state import ClassView, NamesView, Ran, functions_named_by, is_code, named_by
from graphs.state.c_state import IN_MEMORY, cell_inside, numpy_cell, write_partial
from graphs.state.inventory import PLAIN_TENSORS, Found, Inventory, Link
from graphs.state.tensor_form import GradientView, gradient_of, has_form

_CONTAINERS = frozenset((dict, list, tuple, set, frozenset, deque))
"""Classes whose own instances hold their items and nothing else; those of `OrderedDict` may have attributes."""
Visit = Callable[[Inventory, str, Any, Link | None], Iterator[Found]]

_OF_MACHINERY = ("torch", "own")
"""Whose functions note for themselves what they have done, in variables that only they see: no state of a step."""


def visit(into: Inventory, path: str, value: Any, link: Link | None) -> Iterator[Found]:
    """Add the cells of an object; yields what it leads to."""
    return _VISITS.get(kind_of(value), _object)(into, path, value, link)


def names_of(into: Inventory, ran: Ran) -> Iterator[Found]:
    """State that a function names, as far as no function before has named it."""
    for form, owner, names in named_by(ran):
        known = into.named.get(id(owner))
        if known is None:
            view = NamesView(owner)
            known = into.named[id(owner)] = Cell(form, {}, view.read, view.write), view
            into.add(known[0])
        cell, view = known
        added = set(view.add(names))
        for name, item in view.read().items() if added else ():
            if name in added:
                cell.content[name] = item
                yield into.entry(form.format(name), view, name, item, None)
    yield from ((path, function, None) for path, function in functions_named_by(ran))


def _stand_in(into: Inventory, path: str, value: Any, link: Link | None) -> Iterator[Found]:
    yield path, class_attribute(type(value), "__graphs_walk__")(value), None


def _tensor(into: Inventory, path: str, value: Any, link: Link | None) -> Iterator[Found]:
    """The gradient of a tensor, what was set on it, and what a wrapper subclass without memory of its own is made of."""
    gradient = gradient_of(value) if has_form(value) else None
    if gradient is not None:
        yield into.entry(f"{path}.grad", GradientView(value), "", gradient, link)
    if type(value) in PLAIN_TENSORS:  # of a tracer's own tensors it is the machinery
        yield from _attributes(into, path, value, link)
    flatten = class_attribute(type(value), "__tensor_flatten__")
    attributes = attributes_of(value) if flatten is not None else None
    if attributes is None:
        return
    with torch._C.DisableTorchFunctionSubclass():
        names = flatten(value)[0]
    yield from (into.entry(f"{path}.{n}", attributes, n, attributes[n], link) for n in names if n in attributes)


def _method(into: Inventory, path: str, value: Any, link: Link | None) -> Iterator[Found]:
    yield path, value.__self__, link
    yield path, value.__func__, link


def _function(into: Inventory, path: str, function: Any, link: Link | None) -> Iterator[Found]:
    origin = origin_of_code(function.__code__, function.__globals__)
    yield path, function.__dict__.get("__wrapped__"), link
    for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        yield f"{path}'s default", default, None
    notes = notes_of(function)
    if notes:
        yield from ((f"{function.__name__}.{name}", item, None) for name, item in function.__dict__.items() if name not in notes)
    elif function.__dict__ or origin == "user":
        yield f"{function.__name__}'s attributes", function.__dict__, None
    for name, cell in closure_of(function):
        view = CellView(cell)
        content = view.read() if origin in _OF_MACHINERY else into.add_view(name + "{}", view)
        yield from (into.entry(name, view, "", item, None) for item in content.values())
    if origin == "user":
        into.add_view(function.__name__ + ".{}", SpecialView(function, ("__defaults__", "__kwdefaults__")))
        if function.__kwdefaults__:
            into.add_mapping(f"{function.__name__}'s default {{}}", function.__kwdefaults__)
        yield from names_of(into, Ran(function.__code__, function.__globals__))


def _partial(into: Inventory, path: str, value: Any, link: Link | None) -> Iterator[Found]:
    read = functools.partial(partial_content, value)
    into.add(Cell(path + "{}", read(), read, functools.partial(write_partial, value)))
    yield from ((path, part, link) for part in read())
    yield from _plain_object(into, path, value, link)


def _weak_reference(into: Inventory, path: str, value: Any, link: Link | None) -> Iterator[Found]:
    yield path, weakref.ref.__call__(value), None
    yield from _plain_object(into, path, value, link)


def _context_variable(into: Inventory, path: str, value: Any, link: Link | None) -> Iterator[Found]:
    yield path, variable_content(value), link


def _class(into: Inventory, path: str, kind: Any, link: Link | None) -> Iterator[Found]:
    yield f"type({kind.__name__})", type(kind), None
    for base in bases_of(kind):
        if origin_of_type(base) != "user" or (id(base) in into.seen and base is not kind):
            continue
        into.seen.add(id(base))
        view = ClassView(base)
        for name, item in into.add_view(base.__name__ + ".{}", view).items():
            path, inner = f"{base.__name__}.{name}", kind_of(item)
            if inner is Kind.DESCRIPTOR:
                yield from ((path, function, None) for function in functions_in(item))
            elif inner is Kind.FUNCTION:
                yield path, item, None
            elif not is_code(item):
                yield into.entry(path, view, name, item, None)


def _random(into: Inventory, path: str, value: Any, link: Link | None) -> Iterator[Found]:
    read, write = (functools.partial(getattr(random.Random, name), value) for name in ("getstate", "setstate"))
    into.add(Cell(path + "{}", read(), read, write, draw=functools.partial(random.Random.random, value)))
    yield from ()


def _numpy(into: Inventory, path: str, value: Any, link: Link | None) -> Iterator[Found]:
    into.add(numpy_cell(path, value))
    yield from ((f"{path}[{index}]", item, link) for index, item in enumerate(elements_in(value)))


def _iterator(into: Inventory, path: str, value: Any, link: Link | None) -> Iterator[Found]:
    read = functools.partial(_position, value)
    into.add(Cell(path + "{}", read(), read, _nothing, irreversible=True))
    yield from ()


def _file(into: Inventory, path: str, value: Any, link: Link | None) -> Iterator[Found]:
    yield from (_object if of_type(value, IN_MEMORY) else _iterator)(into, path, value, link)


def _object(into: Inventory, path: str, value: Any, link: Link | None) -> Iterator[Found]:
    """What C keeps of an object, what it holds as a container, and its attributes."""
    if type(value) in _CONTAINERS:
        yield from _container(into, path, value, link)
        return
    if type(value) is OrderedDict:
        yield from _container(into, path, value, link)
        yield from _attributes(into, path, value, link)
        return
    into.add(cell_inside(path, value))
    yield from ((path + suffix, item, link) for suffix, item in held_inside(value))
    yield from _container(into, path, value, link)
    yield from _plain_object(into, path, value, link)


def _container(into: Inventory, path: str, value: Any, link: Link | None) -> Iterator[Found]:
    form, kind = path + "[{!r}]", sequence_class(value)
    if of_type(value, dict):
        into.add_mapping(form, value)
        entries = list(items_of(value))
        yield from ((f"a key of {path}", key, None) for key, _ in entries if type(key) not in ATOMS)
        yield from (into.entry(form.format(key), value, key, item, link) for key, item in entries)
    elif kind is not None:
        if kind in (list, deque):
            read = functools.partial(elements_of, value)
            into.add(Cell(form, read(), read, functools.partial(write_sequence, value), container=value))
        elif kind is set:
            items = functools.partial(read_set, value)
            into.add(Cell(path + "{}", items(), items, functools.partial(write_set, value)))
        indexed = value if type(value) in (list, tuple, deque) else tuple(elements_of(value))
        yield from (into.entry(form.format(i), indexed, i, item, link) for i, item in enumerate(elements_of(value)))


def _plain_object(into: Inventory, path: str, value: Any, link: Link | None) -> Iterator[Found]:
    """Attributes, slots and, if it is the user's, the class of an object."""
    kind = type(value)
    into.classes[id(kind)] = kind
    yield from _attributes(into, path, value, link)
    slots = slots_of(kind)
    if slots:
        view = AttributesView(value, slots)
        content = into.add_view(path + ".{}", view)
        yield from (into.entry(f"{path}.{name}", view, name, item, link) for name, item in content.items())
    if origin_of_type(kind) == "user":
        claimed = class_attribute(kind, "__class__") is not vars(object)["__class__"]
        with_dict = attributes_of(value) is not None
        names = (*(() if claimed else ("__class__",)), *(("__dict__",) if with_dict else ()))
        into.add_view(path + ".{}", SpecialView(value, names))
        yield path, kind, None


def _attributes(into: Inventory, path: str, value: Any, link: Link | None) -> Iterator[Found]:
    attributes, form = attributes_of(value), path + ".{}"
    if attributes is None:
        return
    layer = issubclass(type(value), torch.nn.Module)
    into.add_mapping(form, attributes)
    for key, item in list(attributes.items()):
        if layer and key in LAYER_MEMBERS and isinstance(item, dict):
            yield from _members(into, path, item, link)
        else:
            yield into.entry(form.format(key), attributes, key, item, link)


def _members(into: Inventory, path: str, members: dict[str, Any], link: Link | None) -> Iterator[Found]:
    into.add_mapping(path + ".{}", members)
    into.keep(members)
    for name, item in list(members.items()):
        if item is not None:
            yield into.entry(f"{path}.{name}", members, name, item, link)


def _position(iterator: Any) -> tuple[Any, ...]:
    """How far a generator, or an iterator written in C, has come."""
    frame = getattr(iterator, "gi_frame", None)
    hint = getattr(iterator, "__length_hint__", None)
    return (frame.f_lasti if frame is not None else None, hint() if hint is not None else None, repr(iterator))


def _nothing(_: Any) -> None:
    """What is put back of an iterator that moved on."""


_VISITS: dict[Kind, Visit] = {
    Kind.STAND_IN: _stand_in,
    Kind.TENSOR: _tensor,
    Kind.METHOD: _method,
    Kind.FUNCTION: _function,
    Kind.PARTIAL: _partial,
    Kind.WEAK_REFERENCE: _weak_reference,
    Kind.CONTEXT_VARIABLE: _context_variable,
    Kind.CLASS: _class,
    Kind.RANDOM: _random,
    Kind.NUMPY: _numpy,
    Kind.ITERATOR: _iterator,
    Kind.FILE: _file,
    Kind.LEAF: _plain_object,
}
"""Kinds with state of their own, or of which only a part can be state; all others are looked into as objects."""
