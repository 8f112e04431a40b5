"""Running captured modules eagerly for a while: on the caller's wish, or inside the first call of another module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_forced_eager: ContextVar[str] = ContextVar("graphs_forced_eager", default="")
forced_by = _forced_eager.get
"""Who forces eager mode in this thread or task: ``"caller"``, ``"first call"`` or nobody."""


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Run captured modules eagerly inside the ``with`` block (in this thread or task)."""
    with forced_eager("caller"):
        yield


@contextlib.contextmanager
def forced_eager(by: str) -> Iterator[None]:
    """Like `eager`, telling who asked."""
    token = _forced_eager.set(by)
    try:
        yield
    finally:
        _forced_eager.reset(token)
