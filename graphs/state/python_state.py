"""Python state that a step can read or change: found by walking, compared, restored.

The walk starts at the model, its opaque arguments and, for functions, their closures, defaults and the globals they
name. It enters containers, objects and the user's own classes and functions; of libraries it enters objects but not
classes or functions, and what C objects hold without attributes is read by kind (`c_state`). Looking runs no code of the user's
(`raw_access`).
"""

from __future__ import annotations

import contextvars
import enum
import functools
import random
import sys
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from graphs.objects.c_objects import elements_in
from graphs.objects.cells import (
    LEAVES,
    AttributesView,
    Cell,
    CellView,
    Difference,
    SpecialView,
    changed_entries,
    place_differences,
    read_set,
    write_mapping,
    write_sequence,
    write_set,
)
from graphs.objects.libraries import origin_of_code, origin_of_type
from graphs.objects.raw_access import (
    IMMUTABLE_TYPE,
    attributes_of,
    class_attribute,
    elements_of,
    items_of,
    module_name,
    of_type,
    sequence_class,
    slots_of,
)
from graphs.python_reads.named_state import SKIPPED, ClassView, NamesView, Ran, functions_named_by, is_code, named_by
from graphs.state.c_state import (
    IN_MEMORY,
    held_inside,
    numpy_place,
    partial_content,
    pickled,
    place_inside,
    variable_content,
    write_partial,
)
from graphs.state.tensor_form import GradientView, TensorForm, gradient_of, has_form

Tensor = torch.Tensor
_PLAIN_TENSORS = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
_WITHOUT_STATE = frozenset(kind for kind in LEAVES if kind is not enum.Enum)  # classes derived from them may have attributes
_OF_THREADS = frozenset(("threading", "_thread", "queue", "_queue", "asyncio", "_asyncio", "concurrent", "multiprocessing"))
_WALK_LIMIT = 500_000


@dataclass(frozen=True, slots=True)
class Link:
    """One step of the way to an object: ``container[key] is value``.

    ``registered`` links are those of ``nn.Module`` to parameters and submodules, whose replacement announces itself.
    """

    path: str
    container: Any
    key: Any
    value: Any
    registered: bool
    parent: Link | None

    def holds(self) -> bool:
        """Whether the value still hangs there."""
        try:
            return self.container[self.key] is self.value
        except (KeyError, IndexError):
            return False


def _position(iterator: Any) -> tuple[Any, ...]:
    """How far a generator, or an iterator written in C, has come."""
    frame = getattr(iterator, "gi_frame", None)
    hint = getattr(iterator, "__length_hint__", None)
    return (frame.f_lasti if frame is not None else None, hint() if hint is not None else None, repr(iterator))


class PythonState:
    """A snapshot of everything mutable that is reachable from named roots.

    Args:
        roots: objects, with the names to call them by.
        known: a snapshot of which nothing is taken again.
        generators: whether to include Python's and NumPy's own random generators.
        tensors: whether to include what tensors are besides their values: which memory they lie in, and how.

    Attributes:
        owners: links to tensors.
        generators: generators of random numbers of torch's that hang on the roots; their states are the caller's to keep.
        complete: False when the walk gave up at half a million objects.
    """

    def __init__(
        self,
        roots: Iterable[tuple[str, Any]],
        known: PythonState | None = None,
        *,
        generators: bool = True,
        tensors: bool = True,
    ) -> None:
        self._places: list[Cell] = []
        self._forms: list[TensorForm] = []
        self._keep: list[Any] = []  # so that no identity is reused while the snapshot lives
        self._seen: set[int] = set(known._seen) if known is not None else set()
        self._tensors = tensors
        self.owners: list[Link] = []
        self.generators: list[torch.Generator] = []
        self.complete = True
        named = list(roots)
        self._roots = {id(root) for _, root in named}
        self.ran: list[Ran] = []
        self._named: dict[int, tuple[Cell, NamesView]] = {}
        if generators:
            self._random_modules()
        self._walk([(path, root, None) for path, root in named])

    def take(self, ran: Ran) -> None:
        """Take in what a function names as well; to be called before it runs for the first time."""
        self.ran.append(ran)
        with _disable_current_modes():  # what is looked at here is not done by the step
            self._walk(list(self._names(ran)))

    def _walk(self, pending: list[tuple[str, Any, Link | None]]) -> None:
        while pending:
            path, value, link = pending.pop()
            if type(value) is torch.Generator and id(value) not in self._roots:
                self.generators.append(value)
            if type(value) in _WITHOUT_STATE or of_type(value, SKIPPED) or id(value) in self._seen:
                continue
            if _is_of_threads(type(value)):  # type: ignore[arg-type]  # classes are hashed by identity
                continue
            if len(self._seen) >= _WALK_LIMIT:
                self.complete = False
                break
            self._seen.add(id(value))
            if id(value) not in self._roots:  # a recording must not keep a caller's cache alive
                self._keep.append(value)
            pending.extend(self._visit(path, value, link))

    @classmethod
    def of_containers(cls, roots: Iterable[tuple[str, Any]]) -> PythonState:
        """A snapshot of lists and dicts themselves, without what they hold."""
        state = cls((), generators=False)
        for path, container in roots:
            for _ in state._container(path, container, None):
                pass
        return state

    def _random_modules(self) -> None:
        self._places.append(pickled("random.random()", random.getstate, random.setstate, random.random))
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            rng = numpy.random
            self._places.append(pickled("numpy.random", rng.get_state, rng.set_state, rng.random_sample))

    def _visit(self, path: str, value: Any, link: Link | None) -> Iterator[tuple[str, Any, Link | None]]:
        kind = type(value)
        walk = class_attribute(kind, "__graphs_walk__")
        if walk is not None:
            yield path, walk(value), None
        elif issubclass(kind, Tensor):
            yield from self._inner_tensors(path, value, link)
        elif kind is types.MethodType:
            yield path, value.__self__, link
            yield path, value.__func__, link
        elif kind is types.FunctionType:
            yield from self._function(path, value, link)
        elif issubclass(kind, functools.partial):
            read = functools.partial(partial_content, value)
            self._places.append(Cell(path + "{}", read(), read, functools.partial(write_partial, value)))
            yield from ((path, part, link) for part in read())
            yield from self._object(path, value, link)
        elif issubclass(kind, weakref.ref):
            yield path, weakref.ref.__call__(value), None
            yield from self._object(path, value, link)
        elif kind is contextvars.ContextVar:
            yield path, variable_content(value), link
        elif issubclass(kind, type):
            yield from self._class(value)
        elif issubclass(kind, random.Random) and not issubclass(kind, random.SystemRandom):
            read, write = (functools.partial(getattr(random.Random, name), value) for name in ("getstate", "setstate"))
            draw = functools.partial(random.Random.random, value)
            self._places.append(Cell(path + "{}", read(), read, write, transient=True, draw=draw))
        elif module_name(kind).partition(".")[0] == "numpy":
            self._places += filter(None, [numpy_place(path, value)])
            yield from ((f"{path}[{index}]", item, link) for index, item in enumerate(elements_in(value)))
        elif (
            kind.__flags__ & IMMUTABLE_TYPE and class_attribute(kind, "__next__") is not None and not issubclass(kind, IN_MEMORY)
        ):
            read = functools.partial(_position, value)
            self._places.append(Cell(path + "{}", read(), read, lambda _: None, transient=True, irreversible=True))
        elif of_type(value, LEAVES):
            yield from self._object(path, value, link)
        else:
            self._places += filter(None, [place_inside(path, value)])
            yield from ((path + suffix, item, link) for suffix, item in held_inside(value))
            yield from self._container(path, value, link)
            yield from self._object(path, value, link)

    def _inner_tensors(self, path: str, value: Any, link: Link | None) -> Iterator[tuple[str, Any, Link | None]]:
        """The gradient of a tensor, what was set on it, and what a wrapper subclass without memory of its own is made of."""
        gradient = gradient_of(value) if has_form(value) else None
        if gradient is not None:
            yield self._entry(f"{path}.grad", GradientView(value), "", gradient, link)
        if type(value) in _PLAIN_TENSORS:  # of a tracer's own tensors it is the machinery
            yield from self._attributes(path, value, link)
        flatten = class_attribute(type(value), "__tensor_flatten__")
        attributes = attributes_of(value) if flatten is not None else None
        if attributes is None:
            return
        with torch._C.DisableTorchFunctionSubclass():
            names = flatten(value)[0]
        yield from (self._entry(f"{path}.{n}", attributes, n, attributes[n], link) for n in names if n in attributes)

    def _entry(
        self, path: str, container: Any, key: Any, item: Any, parent: Link | None, registered: bool = False
    ) -> tuple[str, Any, Link]:
        link = Link(path, container, key, item, registered, parent)
        if type(item) in _PLAIN_TENSORS and item.layout == torch.strided:
            self.owners.append(link)
            if self._tensors and has_form(item):
                self._forms.append(TensorForm(path, item))
        return path, item, link

    def _container(self, path: str, value: Any, link: Link | None) -> Iterator[tuple[str, Any, Link | None]]:
        form, kind = path + "[{!r}]", sequence_class(value)
        if of_type(value, dict):
            self._mapping(form, value)
            entries = list(items_of(value))
            yield from ((f"a key of {path}", key, None) for key, _ in entries if type(key) not in _WITHOUT_STATE)
            yield from (self._entry(form.format(key), value, key, item, link) for key, item in entries)
        elif kind is not None:
            if kind in (list, deque):
                read = functools.partial(elements_of, value)
                self._places.append(Cell(form, read(), read, functools.partial(write_sequence, value), container=value))
            elif kind is set:
                items = functools.partial(read_set, value)
                self._places.append(Cell(path + "{}", items(), items, functools.partial(write_set, value)))
            indexed = value if type(value) in (list, tuple, deque) else tuple(elements_of(value))
            yield from (self._entry(form.format(i), indexed, i, item, link) for i, item in enumerate(elements_of(value)))

    def _mapping(self, form: str, mapping: dict[Any, Any]) -> None:
        read = functools.partial(_copied, mapping)
        self._places.append(Cell(form, read(), read, functools.partial(write_mapping, mapping), container=mapping))

    def _object(self, path: str, value: Any, link: Link | None) -> Iterator[tuple[str, Any, Link | None]]:
        kind = type(value)
        yield from self._attributes(path, value, link)
        slots = slots_of(kind)
        if slots:
            view = AttributesView(value, slots)
            self._places.append(Cell(path + ".{}", view.read(), view.read, view.write))
            yield from (self._entry(f"{path}.{name}", view, name, item, link) for name, item in view.read().items())
        if origin_of_type(kind) == "user":
            claimed = class_attribute(kind, "__class__") is not vars(object)["__class__"]
            with_dict = attributes_of(value) is not None
            self._special(path, value, (*(() if claimed else ("__class__",)), *(("__dict__",) if with_dict else ())))
            yield path, kind, None

    def _special(self, path: str, value: Any, names: tuple[str, ...]) -> None:
        view = SpecialView(value, names)
        self._places.append(Cell(path + ".{}", view.read(), view.read, view.write))

    def _attributes(self, path: str, value: Any, link: Link | None) -> Iterator[tuple[str, Any, Link | None]]:
        attributes, form = attributes_of(value), path + ".{}"
        if attributes is None:
            return
        module = issubclass(type(value), torch.nn.Module)
        self._mapping(form, attributes)
        for key, item in list(attributes.items()):
            if module and key in ("_parameters", "_buffers", "_modules") and isinstance(item, dict):
                yield from self._members(path, item, link, key != "_buffers")
                continue
            yield self._entry(form.format(key), attributes, key, item, link)

    def _members(
        self, path: str, members: dict[str, Any], link: Link | None, registered: bool
    ) -> Iterator[tuple[str, Any, Link | None]]:
        self._mapping(path + ".{}", members)
        self._keep.append(members)
        for name, item in list(members.items()):
            if item is not None:
                yield self._entry(f"{path}.{name}", members, name, item, link, registered)

    def _class(self, kind: type[Any]) -> Iterator[tuple[str, Any, Link | None]]:
        yield f"type({kind.__name__})", type(kind), None
        for base in type.__getattribute__(kind, "__mro__"):
            if origin_of_type(base) != "user" or (id(base) in self._seen and base is not kind):
                continue
            self._seen.add(id(base))
            view = ClassView(base)
            content = view.read()
            self._places.append(Cell(base.__name__ + ".{}", content, view.read, view.write))
            for name, item in content.items():
                path = f"{base.__name__}.{name}"
                if isinstance(item, property):
                    yield from ((path, part, None) for part in (item.fget, item.fset, item.fdel) if part is not None)
                elif isinstance(item, (staticmethod, classmethod)):
                    yield path, item.__func__, None
                elif isinstance(item, types.FunctionType):
                    yield path, item, None
                elif not is_code(item):
                    yield self._entry(path, view, name, item, None)

    def _function(self, path: str, function: types.FunctionType, link: Link | None) -> Iterator[tuple[str, Any, Link | None]]:
        origin = origin_of_code(function.__code__, function.__globals__)
        yield path, function.__dict__.get("__wrapped__"), link
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            yield f"{path}'s default", default, None
        if function.__dict__ or origin == "user":
            yield f"{function.__name__}'s attributes", function.__dict__, None
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            view = CellView(cell)
            self._places.append(Cell(name + "{}", view.read(), view.read, view.write))
            for item in view.read().values():
                yield self._entry(name, view, "", item, None)
        if origin == "user":
            self._special(function.__name__, function, ("__defaults__", "__kwdefaults__"))
            if function.__kwdefaults__:
                self._mapping(f"{function.__name__}'s default {{}}", function.__kwdefaults__)
            yield from self._names(Ran(function.__code__, function.__globals__))

    def _names(self, ran: Ran) -> Iterator[tuple[str, Any, Link | None]]:
        """State that a function names, as far as no function before has named it."""
        for form, owner, names in named_by(ran):
            known = self._named.get(id(owner))
            if known is None:
                view = NamesView(owner)
                known = self._named[id(owner)] = Cell(form, {}, view.read, view.write), view
                self._places.append(known[0])
            place, view = known
            added = set(view.add(names))
            for name, item in view.read().items() if added else ():
                if name in added:
                    place.content[name] = item
                    yield self._entry(form.format(name), view, name, item, None)
        yield from ((path, function, None) for path, function in functions_named_by(ran))

    def differences(self) -> list[Difference]:
        """What changed since the snapshot."""
        found: list[Difference] = []
        for place in self._places:
            found += place_differences(place)
        return [*found, *(difference for form in self._forms for difference in form.differences())]

    def shifted(self) -> Callable[[], list[Difference]]:
        """Draw once from each generator of Python's and NumPy's; returns what tells, after a run, which of them the run set.

        A run that sets one to the same state whenever it is called does not show otherwise. What it left alone is put back.
        """
        drawing = [place for place in self._places if place.draw is not None]
        for place in drawing:  # one generator may hang in two places
            place.draw()  # type: ignore[misc]
        states = [place.read() for place in drawing]

        def settled() -> list[Difference]:
            set_by = [place for place, state in zip(drawing, states, strict=True) if place.read() != state]
            for place in drawing:
                place.write(place.content)
            return [Difference(p.form.removesuffix("{}"), "as the calls before left it", "set by the step") for p in set_by]

        return settled

    def changed_entries(self) -> Iterator[tuple[str, Any, Any, Any, Any]]:
        """Path, container, key, value before and value now of all that changed; no container where there is no mapping."""
        for place in self._places:
            if isinstance(place.content, (dict, list)):
                for key, before, after in changed_entries(place):
                    yield place.form.format(key), place.container, key, before, after
            elif place_differences(place):
                yield place.form, None, None, None, None
        yield from ((change.path, None, None, None, None) for form in self._forms for change in form.differences())

    def restore(self) -> None:
        """Put back what the snapshot saw."""
        for place in self._places:
            if place_differences(place):
                place.write(place.content)
        for form in self._forms:
            form.restore()

    def holds(self, value: Any) -> bool:
        """Whether an object hangs on one of the roots, or is one."""
        return id(value) in self._seen


@functools.lru_cache(maxsize=4096)
def _is_of_threads(kind: type[Any]) -> bool:
    """Whether other threads may be waiting for an object of this class: nothing of it may be put back."""
    bases = type.__getattribute__(kind, "__mro__")
    return threading.local not in bases and any(module_name(base).partition(".")[0] in _OF_THREADS for base in bases)


def _copied(mapping: dict[Any, Any]) -> dict[Any, Any]:
    return dict(items_of(mapping))
