"""What a child process puts right that was forked while another thread was in the midst of something.

The child has the thread that forked, and no other: a lock that another one held would stay taken for ever, and what another one
had exchanged for a while (names, methods, the code of functions) would stay exchanged.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

_locks: weakref.WeakSet[Any] = weakref.WeakSet()
_changes: dict[object, tuple[int, Callable[[], None]]] = {}
"""What puts each change back that is in force, with the thread that made it, the last one last."""


def forkable_lock() -> threading.RLock:  # type: ignore[valid-type]
    """An `RLock` that is free in a forked child, unless the thread that forked holds it."""
    lock: Any = threading.RLock()
    _locks.add(lock)
    return lock


@contextlib.contextmanager
def put_back_by(put_back: Callable[[], None]) -> Iterator[None]:
    """Call ``put_back`` at the end of the block; in a child that another thread forks meanwhile, when it begins.

    For changes that the whole process sees, made inside the block.

    Args:
        put_back: may be called before the change is made, and twice.
    """
    change = object()
    _changes[change] = threading.get_ident(), put_back
    try:
        yield
    finally:
        try:
            put_back()
        finally:
            del _changes[change]


def _begin_child() -> None:
    for lock in _locks:
        if not lock._is_owned():
            lock._at_fork_reinit()
    thread = threading.get_ident()
    for change, (by, put_back) in reversed(list(_changes.items())):
        if by != thread:
            del _changes[change]
            put_back()


if hasattr(os, "register_at_fork"):  # there is no fork on Windows
    os.register_at_fork(after_in_child=_begin_child)
