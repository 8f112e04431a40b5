"""State inside objects written in C that no attribute shows: memory, files in memory, dictionaries of threads, queues.

Each kind that can be read without running code of the user's gets a `Cell`. What can be read and not put back (a queue,
a digest) gets one whose changes are irreversible: a step that changes it is never run a second time.
"""

from __future__ import annotations

import array
import ctypes
import functools
import io
import mmap
import pickle
import re
import types
from collections.abc import Callable
from typing import Any

from graphs.objects.c_objects import ARGUMENTS, is_released, lends_memory
from graphs.objects.cells import Cell
from graphs.objects.raw_access import IMMUTABLE_TYPE, attributes_of, class_attribute

IN_MEMORY = (io.StringIO, io.BytesIO)
_LARGE = 1 << 26  # bytes; of more memory a copy is not kept, so that its changes are irreversible
_DATA: type[Any] = ctypes.c_int.__mro__[2]  # what all objects of ctypes are
_PROBES = ("qsize", "digest")


def cell_inside(path: str, value: Any) -> Cell | None:
    """The cell for what a C object holds beside its attributes; None where nothing is known to be there."""
    kind, form = type(value), path + "{}"
    if issubclass(kind, BaseException):
        return _cell(path + ".args", functools.partial(ARGUMENTS.__get__, value), functools.partial(ARGUMENTS.__set__, value))
    if issubclass(kind, IN_MEMORY):
        base = io.StringIO if issubclass(kind, io.StringIO) else io.BytesIO
        return _cell(form, functools.partial(_file, base, value), functools.partial(_write_file, base, value))
    if issubclass(kind, memoryview):
        read = functools.partial(is_released, value)
        return _memory(path, value) if _lends_nothing(value) else _cell(form, read, None)
    if _has_buffer(value):
        return _memory(path, value)
    for name in _PROBES:
        method = class_attribute(kind, name)
        if kind.__flags__ & IMMUTABLE_TYPE and isinstance(method, types.MethodDescriptorType):
            try:
                method(value)
            except TypeError:  # a digest of a length that is asked for
                continue
            return _cell(form, functools.partial(method, value), None)
    return None


def pickled(path: str, read: Callable[[], Any], write: Callable[[Any], Any], draw: Callable[[], Any]) -> Cell:
    """A cell whose content is compared by its pickle: the state of a random generator, from which ``draw`` draws."""

    def reading() -> bytes:
        return pickle.dumps(read())

    return Cell(path + "{}", reading(), reading, lambda content: write(pickle.loads(content)), draw=draw)


def numpy_cell(path: str, value: Any) -> Cell | None:
    """The cell for an array or random generator of NumPy; None for what nothing can be written to."""
    if hasattr(value, "bit_generator"):
        bits = value.bit_generator
        return pickled(path, lambda: bits.state, lambda state: setattr(bits, "state", state), value.random)
    if hasattr(value, "set_state"):
        return pickled(path, value.get_state, value.set_state, value.random_sample)
    if not hasattr(value, "tobytes") or getattr(value, "flags", None) is None or not value.flags.writeable:
        return None
    copy = value.copy()

    def read() -> tuple[Any, ...]:
        return value.shape, value.dtype.str, value.tobytes()

    def write(_: tuple[Any, ...]) -> None:
        if value.dtype != copy.dtype:
            value.dtype = copy.dtype
        if value.shape != copy.shape:
            value.shape = copy.shape
        value[...] = copy

    return Cell(path + "{}", read(), read, write)


def write_partial(value: functools.partial[Any], content: tuple[Any, Any, Any]) -> None:
    """Put back what `graphs.objects.c_objects.partial_content` gave."""
    functools.partial.__setstate__(value, (*content, attributes_of(value)))  # type: ignore[attr-defined]


def _cell(form: str, read: Callable[[], Any], write: Callable[[Any], None] | None) -> Cell:
    return Cell(form, read(), read, write or _nothing, irreversible=write is None)


def _nothing(_: Any) -> None:
    """What is put back of what cannot be."""


def _file(base: Any, value: Any) -> tuple[Any, ...] | None:
    """Content, newline and position; None of a closed file, whose content is gone."""
    try:
        return tuple(base.__getstate__(value)[:-1])
    except ValueError:
        return None


def _write_file(base: Any, value: Any, content: tuple[Any, ...] | None) -> None:
    if content is None:
        base.close(value)
        return
    if _file(base, value) is None:
        base.__init__(value, content[0])
    base.__setstate__(value, (*content, None))


def _has_buffer(value: Any) -> bool:
    """Whether an object lends writable memory."""
    return lends_memory(value) and not memoryview(value).readonly


def _lends_nothing(view: memoryview) -> bool:
    """Whether a view is of memory that no object stands for, so that only the view leads there."""
    return not is_released(view) and view.obj is None and not view.readonly and view.c_contiguous


def _memory(path: str, value: Any) -> Cell:
    """The cell for the memory of a C object."""
    kind = type(value)
    with memoryview(value) as view:
        large, form = view.nbytes > _LARGE, view.format
    read = functools.partial(_summary if large else _content, value)
    if large or (issubclass(kind, _DATA) and points(form)):
        return _cell(path + "{}", read, None)
    return _cell(path + "{}", read, functools.partial(_write_memory, value))


def points(form: str, kinds: str = "OPzZ&X") -> bool:
    """Whether memory of ctypes holds addresses: of objects it owns, which bytes alone would not keep alive."""
    return not set(re.sub(r":[^:]*:", "", form).replace("T{", "{")).isdisjoint(kinds)


def leads_to_memory(value: Any) -> bool:
    """Whether code that has an object of ctypes reads through an address in it: a pointer, or text that is pointed to."""
    if not issubclass(type(value), _DATA):
        return False
    with memoryview(value) as view:
        return points(view.format, "zZ&")


def _position(value: Any) -> int | None:
    return mmap.mmap.tell(value) if issubclass(type(value), mmap.mmap) else None


def _content(value: Any) -> tuple[Any, ...] | None:
    """The bytes of an object's memory, with the position of a mapped file; None if there is no memory any more."""
    try:
        with memoryview(value) as view:
            return view.tobytes(), _position(value)
    except ValueError:
        return None


def _summary(value: Any) -> tuple[Any, ...] | None:
    content = _content(value)
    return None if content is None else (hash(content[0]), len(content[0]), content[1])


def _write_memory(value: Any, content: tuple[Any, ...] | None) -> None:
    now = _content(value)
    if content is None or now is None:
        return  # closed, which nothing undoes
    size = len(content[0])
    if len(now[0]) == size:
        ctypes.memmove((ctypes.c_char * size).from_buffer(value), content[0], size)
    elif issubclass(type(value), array.array):
        array.array.__delitem__(value, slice(None))
        array.array.frombytes(value, content[0])
    elif issubclass(type(value), bytearray):
        bytearray.__setitem__(value, slice(None), content[0])
    if content[1] is not None:
        mmap.mmap.seek(value, content[1])
