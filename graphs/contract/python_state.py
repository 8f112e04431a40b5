"""Python state that a step can read or change: found by walking, compared, restored.

The walk starts at the model, its opaque arguments and, for functions, their closures, defaults and the globals they
name. It enters containers, objects and the user's own classes and functions; of code that comes with Python or sits in
site-packages it enters objects but not classes or functions. C objects are not entered.
"""

from __future__ import annotations

import functools
import logging
import pickle
import random
import sys
import sysconfig
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch

from graphs.contract.places import (
    LEAVES,
    AttributesView,
    CellView,
    Difference,
    LengthView,
    Place,
    changed_entries,
    place_differences,
    text_of,
    write_list,
    write_mapping,
    write_set,
)

Tensor = torch.Tensor
_SKIPPED = (
    *(types.ModuleType, types.BuiltinFunctionType, torch.Generator, torch.UntypedStorage, torch._ops.OpOverload),
    *(logging.Logger, logging.Manager, logging.Handler),  # loggers know of all others
    *(torch.SymInt, torch.SymFloat, torch.SymBool),  # and numbers of a traced step of all that is traced
)
_WALK_LIMIT = 500_000
_LIBRARY_PATHS = tuple(
    {path for name in ("stdlib", "platstdlib", "purelib", "platlib") if (path := sysconfig.get_path(name))} | {"<frozen"}
)


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


@functools.cache
def _library_type(kind: Any) -> bool:
    """Whether a class comes with Python or from site-packages."""
    module = sys.modules.get(kind.__module__)
    file = getattr(module, "__file__", None)
    return kind.__module__ != "__main__" and (file is None or file.startswith(_LIBRARY_PATHS))


def _library_code(function: types.FunctionType) -> bool:
    return function.__code__.co_filename.startswith(_LIBRARY_PATHS)


def _global_names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _global_names(constant)


def _position(iterator: Any) -> tuple[Any, ...]:
    frame = getattr(iterator, "gi_frame", None)
    hint = getattr(iterator, "__length_hint__", None)
    return (frame.f_lasti if frame is not None else None, hint() if hint is not None else None, repr(iterator))


class PythonState:
    """A snapshot of everything mutable that is reachable from named roots.

    Args:
        roots: objects, with the names to call them by.
        known: a snapshot of which nothing is taken again.
        generators: whether to include Python's and NumPy's own random generators.
        tensors: whether to include which memory tensors lie in.

    Attributes:
        owners: links to tensors.
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
        self._places: list[Place] = []
        self._storages: list[tuple[str, Tensor, Tensor]] = []
        self._keep: list[Any] = []  # so that no identity is reused while the snapshot lives
        self._seen: set[int] = set(known._seen) if known is not None else set()
        self._tensors = tensors
        self._steering: list[tuple[str, Any, Any, Any]] = []
        self.owners: list[Link] = []
        self.complete = True
        named = list(roots)
        self._roots = {id(root) for _, root in named}
        if generators:
            self._random_modules()
        pending: list[tuple[str, Any, Link | None]] = [(path, root, None) for path, root in named]
        while pending:
            path, value, link = pending.pop()
            if isinstance(value, (*LEAVES, *_SKIPPED)) or id(value) in self._seen:
                continue
            if len(self._seen) >= _WALK_LIMIT:
                self.complete = False
                break
            self._seen.add(id(value))
            if id(value) not in self._roots:  # a recording must not keep a caller's cache alive
                self._keep.append(value)
            pending.extend(self._visit(path, value, link))
        self._window = 0

    @classmethod
    def of_containers(cls, roots: Iterable[tuple[str, Any]]) -> PythonState:
        """A snapshot of lists and dicts themselves, without what they hold."""
        state = cls((), generators=False)
        for path, container in roots:
            for _ in state._container(path, container, None):
                pass
        return state

    def _random_modules(self) -> None:
        self._places.append(Place("random.random(){}", random.getstate(), random.getstate, random.setstate, transient=True))
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            self._pickled("numpy.random", numpy.random.get_state, numpy.random.set_state)

    def _pickled(self, path: str, read: Callable[[], Any], write: Callable[[Any], Any]) -> None:
        """A place whose content is compared by its pickle: states of random generators, numpy arrays."""

        def reading() -> bytes:
            return pickle.dumps(read())

        self._places.append(Place(path + "{}", reading(), reading, lambda c: write(pickle.loads(c)), transient=True))

    def _visit(self, path: str, value: Any, link: Link | None) -> Iterator[tuple[str, Any, Link | None]]:
        walk = getattr(type(value), "__graphs_walk__", None)
        if walk is not None:
            yield path, walk(value), None
        elif isinstance(value, Tensor):
            return
        elif isinstance(value, types.MethodType):
            yield path, value.__self__, link
            yield path, value.__func__, link
        elif isinstance(value, types.FunctionType):
            yield from self._function(path, value, link)
        elif isinstance(value, functools.partial):
            for name in ("func", "args", "keywords"):
                yield path, getattr(value, name), link
        elif isinstance(value, type):
            yield from self._class(value)
        elif isinstance(value, (tuple, frozenset, MutableMapping, list, deque, set, bytearray)):
            yield from self._container(path, value, link)
        elif isinstance(value, random.Random):
            self._places.append(Place(path + "{}", value.getstate(), value.getstate, value.setstate, transient=True))
        elif type(value).__module__.partition(".")[0] == "numpy":
            self._numpy(path, value)
        elif hasattr(value, "__next__"):
            read = functools.partial(_position, value)
            self._places.append(Place(path + "{}", read(), read, lambda _: None, transient=True, lasting=True))
        else:
            yield from self._object(path, value, link)

    def _numpy(self, path: str, value: Any) -> None:
        if hasattr(value, "bit_generator"):
            bits = value.bit_generator
            self._pickled(path, lambda: bits.state, lambda state: setattr(bits, "state", state))
        elif hasattr(value, "set_state"):
            self._pickled(path, value.get_state, value.set_state)
        elif hasattr(value, "tobytes") and getattr(value, "flags", None) is not None and value.flags.writeable:
            copy = value.copy()

            def write(_: bytes) -> None:
                value[...] = copy

            self._places.append(Place(path + "{}", value.tobytes(), value.tobytes, write))

    def _entry(
        self, path: str, container: Any, key: Any, item: Any, parent: Link | None, registered: bool = False
    ) -> tuple[str, Any, Link]:
        link = Link(path, container, key, item, registered, parent)
        if isinstance(item, Tensor):
            self.owners.append(link)
            if self._tensors and item.layout == torch.strided and not item.is_inference():
                self._storages.append((path, item, item.detach()))
        return path, item, link

    def _container(self, path: str, value: Any, link: Link | None) -> Iterator[tuple[str, Any, Link | None]]:
        form = path + "[{!r}]"
        if isinstance(value, MutableMapping):
            self._places.append(
                Place(form, dict(value), lambda: dict(value), functools.partial(write_mapping, value), container=value)
            )
            yield from (self._entry(form.format(key), value, key, item, link) for key, item in list(value.items()))
        elif isinstance(value, (set, bytearray)):
            self._places.append(Place(path + "{}", value.copy(), value.copy, functools.partial(write_set, value)))
        else:
            if isinstance(value, (list, deque)):
                self._places.append(
                    Place(form, list(value), lambda: list(value), functools.partial(write_list, value), container=value)
                )
            indexed = value if not isinstance(value, frozenset) else tuple(value)
            yield from (self._entry(form.format(index), indexed, index, item, link) for index, item in enumerate(indexed))

    def _object(self, path: str, value: Any, link: Link | None) -> Iterator[tuple[str, Any, Link | None]]:
        module = isinstance(value, torch.nn.Module)
        own = not _library_type(type(value))  # type: ignore[arg-type]
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            form = path + ".{}"
            self._places.append(
                Place(
                    *(form, dict(attributes), lambda: dict(attributes), functools.partial(write_mapping, attributes)),
                    container=attributes,
                )
            )
            for key, item in list(attributes.items()):
                if module and key in ("_parameters", "_buffers", "_modules"):
                    yield from self._members(path, item, link, key != "_buffers")
                    continue
                if own and isinstance(item, LEAVES):
                    self._steering.append((form.format(key), attributes, key, item))
                yield self._entry(form.format(key), attributes, key, item, link)
        names = _slot_names(value)
        if names:
            view = AttributesView(value, names)
            self._places.append(Place(path + ".{}", view.read(), view.read, view.write))
            yield from (self._entry(f"{path}.{name}", view, name, item, link) for name, item in view.read().items())
        if module:
            self._module_steering(path, value, own)
        if own:
            yield path, type(value), None

    def _module_steering(self, path: str, module: torch.nn.Module, own: bool) -> None:
        forward = getattr(type(module).forward, "__code__", None)
        if not own and (forward is None or "training" in _global_names(forward)):
            self._steering.append((f"{path}.training", vars(module), "training", module.training))
        if own:
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                self._steering.append((f"{path}'s hooks", LengthView(hooks), "", len(hooks)))

    def _members(
        self, path: str, members: dict[str, Any], link: Link | None, registered: bool
    ) -> Iterator[tuple[str, Any, Link | None]]:
        self._places.append(Place(path + ".{}", dict(members), lambda: dict(members), functools.partial(write_mapping, members)))
        self._keep.append(members)
        for name, item in list(members.items()):
            if item is not None:
                yield self._entry(f"{path}.{name}", members, name, item, link, registered)

    def _class(self, kind: type[Any]) -> Iterator[tuple[str, Any, Link | None]]:
        for base in kind.__mro__:
            if _library_type(base) or (id(base) in self._seen and base is not kind):
                continue
            self._seen.add(id(base))
            state = [name for name, item in vars(base).items() if not name.startswith("__") and not _is_code(item)]
            view = AttributesView(base, state)
            self._places.append(Place(base.__name__ + ".{}", view.read(), view.read, view.write))
            for name, item in vars(base).items():
                path = f"{base.__name__}.{name}"
                if name in state:
                    if isinstance(item, LEAVES):
                        self._steering.append((path, view, name, item))
                    yield self._entry(path, view, name, item, None)
                elif _is_code(item):
                    yield path, getattr(item, "fget", None) or getattr(item, "__func__", item), None

    def _function(self, path: str, function: types.FunctionType, link: Link | None) -> Iterator[tuple[str, Any, Link | None]]:
        yield path, getattr(function, "__wrapped__", None), link
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            yield f"{path}'s default", default, None
        if function.__dict__:
            yield f"{function.__name__}'s attributes", function.__dict__, None
            self._steer(function.__name__ + ".{}", function.__dict__, function.__dict__)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            view = CellView(cell)
            self._places.append(Place(name + "{}", view.read(), view.read, view.write))
            for item in view.read().values():
                if isinstance(item, LEAVES):
                    self._steering.append((name, view, "", item))
                yield self._entry(name, view, "", item, None)
        if _library_code(function):
            return
        space = function.__globals__
        names = [name for name in dict.fromkeys(_global_names(function.__code__)) if name in space and _is_state(space[name])]
        globals_ = AttributesView(space, names)
        self._places.append(Place("{}", globals_.read(), globals_.read, globals_.write))
        self._steer("{}", space, {name: space[name] for name in names})
        yield from (self._entry(name, globals_, name, item, None) for name, item in globals_.read().items())

    def _steer(self, form: str, container: Any, items: Mapping[Any, Any]) -> None:
        self._steering += [(form.format(key), container, key, item) for key, item in items.items() if isinstance(item, LEAVES)]

    def differences(self, *, between_calls: bool = False) -> list[Difference]:
        """What changed since the snapshot; ``between_calls`` leaves out what callers may change, random generators."""
        found: list[Difference] = []
        for place in self._places:
            if between_calls and place.transient:
                continue
            found += place_differences(place)
        for path, tensor, alias in self._storages:
            if tensor.data_ptr() != alias.data_ptr() or tensor.shape != alias.shape or tensor.stride() != alias.stride():
                found.append(Difference(path, text_of(alias), text_of(tensor)))
        return found

    def changed_entries(self) -> Iterator[tuple[str, Any, Any, Any, Any]]:
        """Path, container, key, value before and value now of all that changed; no container where there is no mapping."""
        for place in self._places:
            if isinstance(place.content, (dict, list)):
                for key, before, after in changed_entries(place):
                    yield place.form.format(key), place.container, key, before, after
            elif place_differences(place):
                yield place.form, None, None, None, None
        for path, tensor, alias in self._storages:
            if tensor.data_ptr() != alias.data_ptr() or tensor.shape != alias.shape or tensor.stride() != alias.stride():
                yield path, None, None, None, None

    def leave_to_recording(self, container: Any, key: Any) -> None:
        """Do not compare a number that a recording advances itself."""
        for place in self._places:
            if place.container is container:
                place.counted |= {key}
        self._steering = [entry for entry in self._steering if not (entry[1] is container and entry[2] == key)]

    def restore(self) -> None:
        """Put back what the snapshot saw."""
        for place in self._places:
            if place_differences(place):
                place.write(place.content)
        for _, tensor, alias in self._storages:
            if tensor.data_ptr() != alias.data_ptr() or tensor.shape != alias.shape or tensor.stride() != alias.stride():
                tensor.data = alias

    def holds(self, value: Any) -> bool:
        """Whether an object hangs on one of the roots, or is one."""
        return id(value) in self._seen

    def steering(self) -> list[tuple[str, Any, Any, Any]]:
        """Numbers, strings and flags that code can branch on: path, container, key, value.

        Attributes of the user's own objects and classes, closures, globals, training flags and the presence of hooks.
        """
        return self._steering


def _slot_names(value: Any) -> list[str]:
    names: list[str] = []
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        names += [slots] if isinstance(slots, str) else list(slots)
    return [name for name in names if name not in ("__dict__", "__weakref__") and hasattr(value, name)]


def _is_code(item: Any) -> bool:
    return isinstance(item, (types.FunctionType, staticmethod, classmethod, property)) or hasattr(type(item), "__get__")


def _is_state(item: Any) -> bool:
    """Whether a global can be state of the step, or lead to it: not a module, nor a library's class or function."""
    if isinstance(item, types.FunctionType):
        return not _library_code(item)
    if isinstance(item, type):
        return not _library_type(item)
    return not isinstance(item, _SKIPPED) and (not callable(item) or isinstance(item, torch.nn.Module))
