"""What kind of thing an object is: one table for everything that looks into objects.

A snapshot of Python state and the guards of a recording both follow references from object to object. Which of Python's own
shapes an object has (a function, a partial, memory, an iterator) is decided here, by its class alone and once for each class.
"""

from __future__ import annotations

import _thread
import array
import contextvars
import enum
import functools
import io
import logging
import operator
import random
import sys
import types
import weakref
from typing import Any

import torch

from graphs.objects.cells import LEAVES
from graphs.objects.raw_access import IMMUTABLE_TYPE, class_attribute, module_name, per_class

ATOMS: frozenset[type[Any]] = frozenset(
    (*(kind for kind in LEAVES if kind is not enum.Enum), types.NotImplementedType, types.EllipsisType, range)
)
"""Classes whose own instances never change and lead nowhere; those of a class derived from them may have attributes."""
NOT_ENTERED: tuple[type[Any], ...] = (
    *(types.ModuleType, types.MethodDescriptorType, types.WrapperDescriptorType),
    *(torch.Generator, torch.UntypedStorage, torch._ops.OpOverload, torch._ops.OpOverloadPacket),
    *(logging.Manager, logging.Handler),  # which know of all loggers
    *(torch.SymInt, torch.SymFloat, torch.SymBool),  # and numbers of a traced step of all that is traced
)
"""Classes whose instances are not gone into: what lies behind them is no state of a step."""
_GETTERS = (operator.attrgetter, operator.methodcaller, operator.itemgetter)
_VIEWS: tuple[type[Any], ...] = (type({}.keys()), type({}.values()), type({}.items()))
_BUFFERS = (bytearray, array.array, memoryview)


class Kind(enum.Enum):
    """What decides how an object is looked into."""

    STAND_IN = "says itself, by ``__graphs_walk__``, what to look into in its place"
    TENSOR = "a tensor of any class"
    METHOD = "a bound method written in Python"
    FUNCTION = "a function written in Python"
    PARTIAL = "a ``functools.partial``"
    WEAK_REFERENCE = "a weak reference"
    CONTEXT_VARIABLE = "a ``ContextVar``"
    CLASS = "a class"
    DESCRIPTOR = "a property, static method or class method"
    RANDOM = "a random generator of Python's with a state that can be set"
    NUMPY = "an array, scalar, random generator or function of NumPy"
    MEMORY = "memory that others than its owner may write: of ``array``, ctypes or a mapped file"
    ITERATOR = "moves on whenever it is asked: a generator, or an iterator written in C; or a weak proxy, which may be one"
    COROUTINE = "a coroutine"
    FILE = "a file or buffer written in C, which is an iterator as well"
    BOUND_BUILTIN = "a method written in C, bound to an object"
    GETTER = "an ``attrgetter`` and its like"
    VIEW = "keys, values or items of a dictionary"
    THREAD_LOCAL = "has other attributes in each thread"
    LOGGER = "a logger"
    LEAF = "a number, text, enum member and the like, of a class derived from those in `LEAVES`"
    OBJECT = "anything else: containers, exceptions, objects with attributes"


def kind_of(value: Any) -> Kind:
    """The kind of an object. Nothing of the object's own is asked."""
    return _kind_of_class(type(value))


@per_class
def _kind_of_class(kind: type[Any]) -> Kind:
    if class_attribute(kind, "__graphs_walk__") is not None:
        return Kind.STAND_IN
    found = next((name for bases, name in _BY_CLASS if issubclass(kind, bases)), None)
    if found is not None:
        return found
    package = module_name(kind).partition(".")[0]
    if package == "numpy":
        hides = kind.__flags__ & IMMUTABLE_TYPE and class_attribute(kind, "__next__") is not None  # an array behind a cursor
        return Kind.ITERATOR if hides else Kind.NUMPY
    if package == "mmap" or issubclass(kind, (*_BUFFERS, *_classes_of_ctypes())):
        return Kind.MEMORY
    if kind.__flags__ & IMMUTABLE_TYPE and class_attribute(kind, "__next__") is not None:
        return Kind.FILE if issubclass(kind, io.IOBase) else Kind.ITERATOR
    return next((name for bases, name in _BY_CLASS_LAST if issubclass(kind, bases)), Kind.OBJECT)


_BY_CLASS: tuple[tuple[Any, Kind], ...] = (
    (torch.Tensor, Kind.TENSOR),
    (types.MethodType, Kind.METHOD),
    (types.FunctionType, Kind.FUNCTION),
    (functools.partial, Kind.PARTIAL),
    (weakref.ref, Kind.WEAK_REFERENCE),
    (contextvars.ContextVar, Kind.CONTEXT_VARIABLE),
    (type, Kind.CLASS),
    ((property, staticmethod, classmethod), Kind.DESCRIPTOR),
    (types.CoroutineType, Kind.COROUTINE),
)
_BY_CLASS_LAST: tuple[tuple[Any, Kind], ...] = (
    ((types.BuiltinMethodType, types.MethodWrapperType), Kind.BOUND_BUILTIN),
    (_GETTERS, Kind.GETTER),
    (_VIEWS, Kind.VIEW),
    (_thread._local, Kind.THREAD_LOCAL),
    (logging.Logger, Kind.LOGGER),
    (random.SystemRandom, Kind.OBJECT),
    (random.Random, Kind.RANDOM),
    (LEAVES, Kind.LEAF),
)


def _classes_of_ctypes() -> tuple[type[Any], ...]:
    """Classes of ctypes; none before it was imported, when nothing can be derived from them."""
    ctypes = sys.modules.get("_ctypes")
    return () if ctypes is None else (ctypes._SimpleCData, ctypes.Array, ctypes.Structure, ctypes.Union)
