"""State that a step changes: Python attributes found by walking, random number generators, tensors found by watching.

Extra runs of a step (audit, warm-up, verification) must leave no trace. `PythonState` remembers every attribute, item
and closure cell reachable from the model and its opaque arguments; `TensorState` holds copies of the storages that were
written, taken just before the first write.
"""

from __future__ import annotations

import enum
import functools
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch

Tensor = torch.Tensor
_LEAVES = (str, bytes, int, float, complex, bool, type(None), enum.Enum, torch.dtype, torch.device, torch.Size)
_SKIPPED = (types.ModuleType, type, types.BuiltinFunctionType, torch.Generator, torch.UntypedStorage, torch._ops.OpOverload)
_MISSING = object()
_WALK_LIMIT = 500_000


@dataclass(frozen=True)
class Difference:
    """A place whose content changed: ``path`` as the user would write it, ``before`` and ``after`` as text."""

    path: str
    before: str
    after: str


@dataclass(slots=True)
class _Place:
    """A mutable container with a shallow copy of its content."""

    path: str
    container: Any
    content: Any
    keys: tuple[str, ...] | None = None  # of a module's globals, only the names the function uses

    def current(self) -> Any:
        return _content(self.container, self.keys)

    def restore(self) -> None:
        container, content = self.container, self.content
        if isinstance(container, types.CellType):
            if content:
                container.cell_contents = content["cell_contents"]
        elif self.keys is not None or not isinstance(container, (MutableMapping, list, deque, set, bytearray)):
            target = container if isinstance(container, MutableMapping) else _SlotView(container)
            for key, value in content.items():
                target[key] = value
        elif isinstance(container, MutableMapping):
            container.clear()
            container.update(content)
        elif isinstance(container, set):
            container.clear()
            container |= content
        else:
            container.clear()
            container.extend(content)


class _SlotView:
    """Item access to the ``__slots__`` of an object."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def __setitem__(self, name: str, value: Any) -> None:
        object.__setattr__(self.owner, name, value)


def _slots(value: Any) -> list[str]:
    names: list[str] = []
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        names += [slots] if isinstance(slots, str) else list(slots)
    return [name for name in names if name not in ("__dict__", "__weakref__") and hasattr(value, name)]


def _content(container: Any, keys: tuple[str, ...] | None = None) -> Any:
    if keys is not None:
        return {key: container[key] for key in keys if key in container}
    if isinstance(container, types.CellType):
        try:
            return {"cell_contents": container.cell_contents}
        except ValueError:  # an empty cell
            return {}
    if isinstance(container, MutableMapping):
        return dict(container)
    if isinstance(container, (list, deque)):
        return list(container)
    if isinstance(container, (set, bytearray)):
        return container.copy()
    return {name: getattr(container, name) for name in _slots(container)}


def _entries(content: Any) -> Iterator[tuple[Any, Any]]:
    return iter(content.items()) if isinstance(content, dict) else iter(enumerate(content))


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, _LEAVES) and type(a) is type(b):
        return bool(a == b or (a != a and b != b))
    if type(a) is tuple and type(b) is tuple:
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return False


def _text(value: Any) -> str:
    if value is _MISSING:
        return "absent"
    if isinstance(value, Tensor):
        return f"tensor{tuple(value.shape)} at {value.data_ptr():#x}"
    return repr(value) if isinstance(value, _LEAVES) else f"a {type(value).__name__}"


@dataclass(frozen=True, slots=True)
class Owner:
    """Where a tensor hangs: ``container[key] is tensor``. ``registered`` for parameters and buffers of a module."""

    path: str
    container: Any
    key: Any
    tensor: Tensor
    registered: bool


class PythonState:
    """A snapshot of everything mutable that is reachable from a set of named roots.

    Functions are entered through their closures, their defaults and the module globals that they name. Classes,
    modules and C objects are not entered.
    """

    def __init__(self, roots: dict[str, Any]) -> None:
        self._places: dict[int, _Place] = {}
        self._arrays: list[tuple[str, Any, Any]] = []
        self._keep: list[Any] = []  # so that no identity is reused while the snapshot lives
        self.owners: list[Owner] = []
        self.complete = True
        pending: list[tuple[str, Any]] = [(name, root) for name, root in roots.items()]
        seen: set[int] = set()
        while pending:
            path, value = pending.pop()
            if isinstance(value, (*_LEAVES, *_SKIPPED)) or id(value) in seen:
                continue
            if len(seen) >= _WALK_LIMIT:
                self.complete = False
                break
            seen.add(id(value))
            if not any(value is root for root in roots.values()):  # a recording must not keep a caller's cache alive
                self._keep.append(value)
            pending.extend(self._visit(path, value))

    def _visit(self, path: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Tensor):
            return
        if isinstance(value, types.MethodType):
            yield path, value.__self__
            yield path, value.__func__
        elif isinstance(value, types.FunctionType):
            yield from self._function(path, value)
        elif isinstance(value, functools.partial):
            yield path, value.func
            yield f"{path}.args", value.args
            yield f"{path}.keywords", value.keywords
        elif isinstance(value, (tuple, frozenset)):
            yield from ((f"{path}[{index}]", item) for index, item in enumerate(value))
        elif isinstance(value, (MutableMapping, list, deque, set, bytearray)):
            if not isinstance(value, bytearray):
                yield from self._container(path, value, "[{!r}]")
        elif "numpy" in sys.modules and isinstance(value, sys.modules["numpy"].ndarray):
            self._arrays.append((path, value, value.copy()))
        else:
            yield from self._object(path, value)

    def _object(self, path: str, value: Any) -> Iterator[tuple[str, Any]]:
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            yield from self._container(path, attributes, ".{}", module=isinstance(value, torch.nn.Module))
        if _slots(value):
            yield from self._container(path, value, ".{}")
        if isinstance(value, torch.nn.Module):
            yield from self._function(path, type(value).forward)

    def _container(self, path: str, container: Any, form: str, module: bool = False) -> Iterator[tuple[str, Any]]:
        place = self._places[id(container)] = _Place(path, container, _content(container))
        for key, item in _entries(place.content):
            if module and key in ("_parameters", "_buffers", "_modules"):
                yield from self._registered(path, item, key != "_modules")
                continue
            child = path + form.format(key)
            if isinstance(item, Tensor) and not isinstance(container, (set, deque)):
                self.owners.append(Owner(child, container, key, item, registered=False))
            yield child, item

    def _registered(self, path: str, members: dict[str, Any], tensors: bool) -> Iterator[tuple[str, Any]]:
        self._places[id(members)] = _Place(path, members, dict(members))
        self._keep.append(members)
        for name, item in members.items():
            if tensors and item is not None:
                self.owners.append(Owner(f"{path}.{name}", members, name, item, registered=True))
            yield f"{path}.{name}", item

    def _function(self, path: str, function: Any) -> Iterator[tuple[str, Any]]:
        function = getattr(function, "__wrapped__", function)
        if not isinstance(function, types.FunctionType) or id(function.__code__) in self._places:
            return
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            place = self._places[id(cell)] = _Place(name, cell, _content(cell))
            for key, item in place.content.items():
                if isinstance(item, Tensor):
                    self.owners.append(Owner(name, cell, key, item, registered=False))
                yield name, item
        space = function.__globals__
        names = tuple(name for name in _global_names(function.__code__) if name in space and _enterable(space[name]))
        place = self._places[id(function.__code__)] = _Place("", space, _content(space, names), names)
        for name, item in place.content.items():
            if isinstance(item, Tensor):
                self.owners.append(Owner(name, space, name, item, registered=False))
            yield name, item

    def differences(self) -> list[Difference]:
        """What changed since the snapshot was taken."""
        found: list[Difference] = []
        for place in self._places.values():
            before, after = place.content, place.current()
            if isinstance(before, (set, bytearray)):
                if before != after:
                    found.append(Difference(place.path, f"{len(before)} items", f"{len(after)} items"))
                continue
            old, new = dict(_entries(before)), dict(_entries(after))
            for key in [*old, *(key for key in new if key not in old)]:
                a, b = old.get(key, _MISSING), new.get(key, _MISSING)
                if not _same(a, b):
                    found.append(Difference(_join(place, key), _text(a), _text(b)))
        for path, array, copy in self._arrays:
            if array.shape != copy.shape or array.tobytes() != copy.tobytes():
                found.append(Difference(path, "a numpy array", "the same array with other values"))
        return found

    def restore(self) -> None:
        """Put back what the snapshot saw."""
        for place in self._places.values():
            before, after = place.content, place.current()
            if isinstance(before, (set, bytearray)):
                changed = before != after
            else:
                old, new = list(_entries(before)), list(_entries(after))
                changed = len(old) != len(new) or any(k != m or not _same(v, w) for (k, v), (m, w) in zip(old, new, strict=True))
            if changed:
                place.restore()
        for _, array, copy in self._arrays:
            array[...] = copy


def _enterable(value: Any) -> bool:
    """Whether a global can hold state of the step: functions of other modules and classes cannot be its own."""
    opaque = isinstance(value, (*_SKIPPED, types.FunctionType)) or callable(value)
    return not opaque or isinstance(value, torch.nn.Module)


def _global_names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _global_names(constant)


def _join(place: _Place, key: Any) -> str:
    if isinstance(place.container, types.CellType):
        return place.path
    if not place.path:
        return str(key)
    registered = isinstance(place.container, dict) and isinstance(key, str) and key.isidentifier()
    return f"{place.path}.{key}" if registered else f"{place.path}[{key!r}]"


class TensorState:
    """Copies of storages, each taken before its first write.

    A copy goes to host memory when the device has no room for it: slower once, and never an out-of-memory error.
    """

    def __init__(self) -> None:
        self._saved: dict[int, tuple[Tensor, Tensor]] = {}

    def __contains__(self, storage: torch.UntypedStorage) -> bool:
        return storage._cdata in self._saved

    def save(self, tensor: Tensor) -> None:
        """Copy the whole storage of ``tensor`` unless it is saved already."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._saved:
            whole = _whole(tensor)
            self._saved[storage._cdata] = (whole, _copy(whole))

    @property
    def tensors(self) -> list[Tensor]:
        """The live tensors that were written, each whole: the full storage, not the view that was written."""
        return [whole for whole, _ in self._saved.values()]

    def copies(self) -> list[Tensor]:
        """Copies of the live tensors as they are now."""
        return [_copy(whole) for whole, _ in self._saved.values()]

    def restore(self, copies: list[Tensor] | None = None) -> None:
        """Write back the saved values, or ``copies`` made by `copies`."""
        with torch.no_grad():
            for index, (whole, saved) in enumerate(self._saved.values()):
                whole.copy_(saved if copies is None else copies[index])

    def release(self) -> None:
        """Free the saved values and keep only which tensors were written."""
        self._saved = {key: (whole, whole) for key, (whole, _) in self._saved.items()}


def _whole(tensor: Tensor) -> Tensor:
    """The whole storage of ``tensor``, in the shape of its base where that is dense, else flat."""
    base = tensor if tensor._base is None else tensor._base
    storage = tensor.untyped_storage()
    count = storage.nbytes() // tensor.element_size()
    dense = base.is_contiguous() and base.dtype == tensor.dtype and base.numel() == count
    with torch.inference_mode(False):
        flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage, 0, (count,), (1,))  # type: ignore[call-overload]
        return flat.view(base.shape) if dense else flat


def _copy(whole: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        try:
            return whole.clone()
        except torch.OutOfMemoryError:
            return whole.cpu()


class RandomState:
    """The states of the default generators of the CPU and of one device."""

    def __init__(self, device: torch.device) -> None:
        self._restore: list[Callable[[], None]] = [functools.partial(torch.set_rng_state, torch.get_rng_state())]
        if device.type == "cuda":
            state = torch.cuda.get_rng_state(device)
            self._restore.append(functools.partial(torch.cuda.set_rng_state, state, device))

    def restore(self) -> None:
        """Put the generators back."""
        for put_back in self._restore:
            put_back()
