"""Python's number builtins, for a traced step: symbols stay symbols.

``int(t)`` has to return an exact ``int``, so Python throws away any object that stands for a value not known yet. While
a step is traced, the modules whose lines read values see these in place of the builtins: a name in a module's globals
hides the builtin of that name, in that module only. With ordinary arguments they do what the builtins do.
"""

from __future__ import annotations

import builtins
import contextlib
import math
import operator
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from passes.core.symbols import SYMBOLS
from passes.forked_process import forkable_lock, put_back_by
from passes.tracing.symbol_methods import value_methods

_ABSENT = object()


def _value(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value


class _Number(type):
    """A class that converts like a builtin number type, and takes symbols for its instances."""

    kind: type
    symbols: tuple[type, ...]
    convert: Callable[[Any], Any]

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        value = _value(args[0]) if len(args) == 1 and not kwargs else None
        return cls.convert(value) if isinstance(value, SYMBOLS) else cls.kind(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, (cls.kind, *cls.symbols))

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, (cls.kind, *cls.symbols))

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.kind

    def __hash__(cls) -> int:
        return hash(cls.kind)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.kind, name)


def _whole(value: Any) -> Any:
    """``int(value)`` of a symbol; of a fraction as `math.trunc` has it, which knows that NaN is refused."""
    return math.trunc(value) if isinstance(value, torch.SymFloat) else torch.sym_int(value)


class _Int(metaclass=_Number):
    kind, symbols, convert = builtins.int, (torch.SymInt,), staticmethod(_whole)


class _Float(metaclass=_Number):
    kind, symbols, convert = builtins.float, (torch.SymFloat,), staticmethod(torch.sym_float)


def _symbolic(values: Iterable[Any]) -> bool:
    return any(isinstance(value, (*SYMBOLS, torch.Tensor)) for value in values)


def _alike(values: Iterable[Any]) -> bool:
    """Whether numbers are all whole or all not: the smaller of two has the type of the one that it is."""
    return len({isinstance(value, (builtins.float, torch.SymFloat)) for value in values}) == 1


def _both_tensors(a: Any, b: Any) -> bool:
    """Whether two are tensors alike: Python reads the outcome of a comparison of them, and gives one of them."""
    return (
        isinstance(a, torch.Tensor)
        and isinstance(b, torch.Tensor)
        and (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
    )


def _first_unless(better: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    """``b if better(b, a) else a`` of two fractions, as Python has it: with NaN, and with zeros of either sign, the first."""
    holds = better(b, a)
    if not isinstance(holds, torch.SymBool):
        return b if holds else a
    sides = [side if isinstance(side, SYMBOLS) else torch.sym_ite(holds, side, side) for side in (b, a)]
    return torch.sym_ite(holds, *sides)


def _extreme(builtin: Any, symbolic: Callable[[Any, Any], Any], better: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    if _both_tensors(a, b):
        return torch.where(better(b, a), b, a)
    a, b = _value(a), _value(b)
    if not _alike((a, b)):
        return builtin(a, b)
    whole = not isinstance(a, (builtins.float, torch.SymFloat))
    return symbolic(a, b) if whole else _first_unless(better, a, b)


def _min(*args: Any, **kwargs: Any) -> Any:
    if len(args) == 2 and not kwargs and _symbolic(args):
        return _extreme(builtins.min, torch.sym_min, operator.lt, *args)
    return builtins.min(*args, **kwargs)


def _max(*args: Any, **kwargs: Any) -> Any:
    if len(args) == 2 and not kwargs and _symbolic(args):
        return _extreme(builtins.max, torch.sym_max, operator.gt, *args)
    return builtins.max(*args, **kwargs)


def _divmod(a: Any, b: Any) -> Any:
    a, b = _value(a), _value(b)
    return (a // b, a % b) if _symbolic((a, b)) else builtins.divmod(a, b)


def _len(value: Any) -> Any:
    return value.shape[0] if isinstance(value, torch.Tensor) and value.dim() else builtins.len(value)


def _range(*args: Any) -> Any:
    return builtins.range(*map(_value, args))


SYMBOLIC = {"int": _Int, "float": _Float, "min": _min, "max": _max, "len": _len, "range": _range, "divmod": _divmod}
"""What stands for each builtin."""


_ONE_TRACE = forkable_lock()
"""Modules are seen by every thread, so one thread traces at a time: the other's names would go with the first that ends."""


@contextlib.contextmanager
def symbolic_builtins(modules: Iterable[str]) -> Iterator[None]:
    """Let `SYMBOLIC` hide the builtins in the named modules; a name that a module defines itself is left alone.

    Other threads that run lines of these modules meanwhile see the same names, which do with numbers and tensors what the
    builtins do.
    """
    with _ONE_TRACE:
        spaces = [vars(sys.modules[name]) for name in dict.fromkeys(modules) if name in sys.modules]
        hidden = [(space, name) for space in spaces for name in SYMBOLIC if space.get(name, _ABSENT) is _ABSENT]

        def put_back() -> None:
            for space, name in hidden:
                space.pop(name, None)

        with put_back_by(put_back):
            for space, name in hidden:
                space[name] = SYMBOLIC[name]
            with value_methods():
                yield
