"""What the text and the hash of a symbol are while a step is traced: the one place that changes classes of torch's.

Python calls ``type(u).__format__`` for ``f"{u}"`` and ``type(u).__hash__`` for ``table[u]``, past any mode, so nothing but
these methods of the classes can tell. torch writes the symbol's name, and refuses to hash. The methods are put back when the
block ends, whatever ends it, and for every thread but the one inside the block they do what torch's own do.
"""

from __future__ import annotations

import builtins
import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from passes.core.source_location import is_user, user_site
from passes.core.symbols import SYMBOLS, expression_of
from passes.errors import Unremovable
from passes.forked_process import put_back_by

_KINDS: dict[type, type] = {torch.SymInt: builtins.int, torch.SymFloat: builtins.float, torch.SymBool: builtins.bool}
_ABSENT = object()
_active = threading.local()


def _no_text(self: Any, form: str) -> str:
    """Text needs the value: formatting a symbol would write its name."""
    raise Unremovable("its text needs the value", "format", user_site(), symbols=expression_of(self).free_symbols)


def _text_of_name(original: Callable[..., Any]) -> Callable[..., Any]:
    """``str(u)``, ``print(u)``: refused to the program, which wants the value; torch gets the name for its own messages."""

    def chosen(self: Any) -> Any:
        if getattr(_active, "here", False) and is_user(sys._getframe(1)):
            raise Unremovable("its text needs the value", "str", user_site(), symbols=expression_of(self).free_symbols)
        return original(self)

    return chosen


def _hash_of_value(self: Any) -> int:
    """A symbol as the key of a dictionary: the value is taken as it is, which becomes an assumption of the graph."""
    kind: type = next(kind for cls, kind in _KINDS.items() if isinstance(self, cls))
    return hash(kind(self))


_METHODS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "__format__": lambda original: _in_this_thread(_no_text, original),
    "__hash__": lambda original: _in_this_thread(_hash_of_value, original),
    "__str__": _text_of_name,
    "__repr__": _text_of_name,
}
"""From torch's own method to what stands for it."""


@contextlib.contextmanager
def value_methods() -> Iterator[None]:
    """Let text of symbols be refused, and their hash be that of the value, in this thread."""
    outer = getattr(_active, "here", False)
    before = [(kind, name, vars(kind).get(name, _ABSENT), getattr(kind, name)) for kind in SYMBOLS for name in _METHODS]

    def put_back() -> None:
        for kind, name, method, _ in before:
            if method is not _ABSENT:
                setattr(kind, name, method)
            elif name in vars(kind):
                delattr(kind, name)

    with put_back_by(put_back):
        try:
            _active.here = True
            for kind, name, _, original in before:
                setattr(kind, name, _METHODS[name](original))
            yield
        finally:
            _active.here = outer


def _in_this_thread(method: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """``method`` for the thread that traces, ``original`` for any other."""

    def chosen(self: Any, *args: Any) -> Any:
        return (method if getattr(_active, "here", False) else original)(self, *args)

    return chosen
