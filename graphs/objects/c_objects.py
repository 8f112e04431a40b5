"""Objects that C code keeps: memory behind the buffer protocol, iterators, views, attribute getters, thread locals.

What they hold is read kind by kind, without running code of the user's; of some nothing can be compared at all.
"""

from __future__ import annotations

import _thread
import contextvars
import functools
import gc
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

from graphs.objects.kinds import Kind, kind_of
from graphs.objects.raw_access import IMMUTABLE_TYPE, attributes_of, bases_of, class_attribute

SMALL = 1 << 24
"""Bytes of a buffer that are compared at each call."""
ARGUMENTS: Any = vars(BaseException)["args"]
"""The descriptor of an exception's arguments, whatever a class makes of that name."""


class Memory(NamedTuple):
    """Memory that C code keeps of an object.

    Attributes:
        size: bytes.
        read: gives the content, with its layout, to be compared by value.
    """

    size: int
    read: Callable[[], Any]

    @property
    def is_small(self) -> bool:
        """Whether its content can be compared at each call."""
        return self.size <= SMALL


def memory_of(value: Any) -> Memory | None:
    """The memory of an array or of any other object that lends some; None where there is none."""
    if kind_of(value) is Kind.NUMPY and hasattr(value, "tobytes"):
        return Memory(value.nbytes, functools.partial(_content_of(value), value))
    if is_users_array(value):
        return Memory(_bare(value).nbytes, lambda: _content_of(_bare(value))(_bare(value)))
    if not lends_memory(value):
        return None
    return Memory(memoryview(value).nbytes, functools.partial(_bytes_of, value))


def lends_memory(value: Any) -> bool:
    """Whether memory of an object can be seen, lent by code written in C: a class in Python may answer for itself (3.12)."""
    if isinstance(class_attribute(type(value), "__buffer__"), types.FunctionType):
        return False
    try:
        with memoryview(value):
            return True
    except (TypeError, ValueError, BufferError):
        return False


def is_users_array(value: Any) -> bool:
    """Whether a value is an array of a class that was derived from NumPy's elsewhere."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and issubclass(type(value), numpy.ndarray) and kind_of(value) is not Kind.NUMPY


def elements_in(value: Any) -> list[Any]:
    """The objects in an array of objects."""
    value = _bare(value) if is_users_array(value) else value
    has_objects = getattr(getattr(value, "dtype", None), "hasobject", False)
    return value.ravel().tolist() if has_objects and value.dtype == object else []


def held_inside(value: Any) -> list[tuple[str, Any]]:
    """What a C object leads to that no attribute of it holds, with what to append to its path."""
    kind = kind_of(value)
    if kind is Kind.THREAD_LOCAL:
        return [("", _thread._local.__getattribute__(value, "__dict__"))]  # of this thread, which has it made if need be
    if kind is Kind.BOUND_BUILTIN:
        return [(".__self__", value.__self__)]
    if kind is Kind.VIEW or type(value) is types.MappingProxyType:
        return [("", item) for item in gc.get_referents(value)]
    if type(value) is slice:
        return [(".start", value.start), (".stop", value.stop), (".step", value.step)]
    if issubclass(type(value), BaseException):
        return [(".args", ARGUMENTS.__get__(value))]
    if issubclass(type(value), memoryview) and not is_released(value):
        return [(".obj", value.obj)]
    return []


def is_released(view: memoryview) -> bool:
    """Whether the memory behind a view was given back."""
    try:
        return view.nbytes < 0
    except ValueError:
        return True


def partial_content(value: functools.partial[Any]) -> tuple[Any, Any, Any]:
    """The function, arguments and keywords of a partial."""
    func, args, keywords = (class_attribute(functools.partial, name).__get__(value) for name in ("func", "args", "keywords"))
    return func, args, keywords


def variable_content(variable: contextvars.ContextVar[Any]) -> Any:
    """What a context variable holds, its default included; None where that is nothing."""
    try:
        return variable.get()
    except LookupError:
        return None


def names_looked_up(value: Any) -> list[str]:
    """The names that an ``attrgetter`` and its like look up."""
    return [text for text in value.__reduce__()[1] if isinstance(text, str)]


def local_attributes(value: Any) -> dict[str, Any]:
    """The attributes of a thread local in this thread."""
    return attributes_of(value) or _thread._local.__getattribute__(value, "__dict__")


def _bare(value: Any) -> Any:
    """An array as NumPy's own class, which answers for itself. Not kept, since an array with views cannot grow."""
    numpy = sys.modules["numpy"]
    return numpy.ndarray.view(value, numpy.ndarray)


def _content_of(array: Any) -> Callable[[Any], Any]:
    return _identities_in if array.dtype.hasobject else _array_content


def _bytes_of(value: Any) -> bytes:
    return memoryview(value).tobytes()


def _array_content(value: Any) -> tuple[Any, ...]:
    masked = () if getattr(value, "mask", None) is None else numpy_bytes(value.mask)
    return value.shape, value.strides, value.dtype.str, numpy_bytes(value), masked


def numpy_bytes(value: Any) -> bytes:
    """The elements of an array, whatever a subclass makes of ``tobytes``."""
    bases = (base for base in bases_of(type(value)) if base.__flags__ & IMMUTABLE_TYPE and "tobytes" in vars(base))
    kind = next(bases, type(value))
    return bytes(vars(kind)["tobytes"](value)) if "tobytes" in vars(kind) else bytes(value.tobytes())


def _identities_in(value: Any) -> tuple[Any, ...]:
    return value.shape, *map(id, value.ravel().tolist())
