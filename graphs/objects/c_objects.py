"""Objects that C code keeps: memory behind the buffer protocol, iterators, views, attribute getters, thread locals.

What they hold is read in ways of their own, without running code of the user's; of some nothing can be compared at all.
"""

from __future__ import annotations

import _thread
import array
import functools
import io
import operator
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

from graphs.objects.raw_access import IMMUTABLE_TYPE, attributes_of, class_attribute, module_name, of_type

SMALL = 1 << 24
"""Bytes of a buffer that are compared at each call."""
GETTERS = (operator.attrgetter, operator.methodcaller, operator.itemgetter)
VIEWS: tuple[type[Any], ...] = (type({}.keys()), type({}.values()), type({}.items()))
_PROXIES = (weakref.ProxyType, weakref.CallableProxyType)


def is_memory(value: Any) -> bool:
    """Whether a value is memory that others than its owner may write: numpy's, ``array``'s, ctypes', mapped files."""
    kind = type(value)
    if issubclass(kind, (bytearray, array.array, memoryview)) or module_name(kind).partition(".")[0] == "numpy":
        return True
    return module_name(kind) == "mmap" or (bool(_ctypes_kinds()) and issubclass(kind, _ctypes_kinds()))


def reader_of(value: Any) -> Callable[[], Any] | None:
    """What reads the content of memory, with its layout, to be compared by value; None for what is too large or has none."""
    if module_name(type(value)).partition(".")[0] != "numpy":
        return functools.partial(_bytes_of, value) if _size_of(value) <= SMALL else None
    if not hasattr(value, "tobytes") or value.nbytes > SMALL:
        return None
    return functools.partial(_identities_in if value.dtype.hasobject else _array_content, value)


def elements_in(value: Any) -> list[Any]:
    """The objects in an array of objects."""
    has_objects = getattr(getattr(value, "dtype", None), "hasobject", False)
    return value.ravel().tolist() if has_objects and value.dtype == object else []


def cannot_be_compared(value: Any) -> bool:
    """Whether a value moves on whenever it is asked (an iterator, a generator), or hides what it stands for (a proxy)."""
    kind = type(value)
    if issubclass(kind, (types.GeneratorType, types.CoroutineType, *_PROXIES)):
        return True
    advances = kind.__flags__ & IMMUTABLE_TYPE and class_attribute(kind, "__next__") is not None
    return bool(advances) and not issubclass(kind, io.IOBase)


def names_looked_up(value: Any) -> list[str]:
    """The names that an ``attrgetter`` and its like look up."""
    return [text for text in value.__reduce__()[1] if isinstance(text, str)]


def is_thread_local(value: Any) -> bool:
    """Whether a value has other attributes in each thread."""
    return of_type(value, _thread._local)


def local_attributes(value: Any) -> dict[str, Any]:
    """The attributes of a thread local in this thread."""
    return attributes_of(value) or _thread._local.__getattribute__(value, "__dict__")


def _ctypes_kinds() -> tuple[type[Any], ...]:
    ctypes = sys.modules.get("_ctypes")
    return () if ctypes is None else (ctypes._SimpleCData, ctypes.Array, ctypes.Structure, ctypes.Union)


def _size_of(value: Any) -> int:
    return memoryview(value).nbytes


def _bytes_of(value: Any) -> bytes:
    return memoryview(value).tobytes()


def _array_content(value: Any) -> tuple[Any, ...]:
    masked = () if getattr(value, "mask", None) is None else numpy_bytes(value.mask)
    return value.shape, value.strides, value.dtype.str, numpy_bytes(value), masked


def numpy_bytes(value: Any) -> bytes:
    """The elements of an array, whatever a subclass makes of ``tobytes``."""
    kind = next(
        (base for base in type(value).__mro__ if base.__flags__ & IMMUTABLE_TYPE and "tobytes" in vars(base)), type(value)
    )
    return bytes(vars(kind)["tobytes"](value)) if "tobytes" in vars(kind) else bytes(value.tobytes())


def _identities_in(value: Any) -> tuple[Any, ...]:
    return value.shape, *map(id, value.ravel().tolist())
