"""Python values that code can branch on, compared with the present at every call.

A recording froze them. Changing one between calls has to be noticed by the next call, so a window of them is looked at
each time: all of them where they are few, which is what a user's own model has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphs.contract.places import Difference, same

WINDOW = 64  # about 3 us per call


class Steering:
    """The steering values of one recording; see `PythonState.steering`."""

    def __init__(self, entries: Sequence[tuple[str, Any, Any, Any]]) -> None:
        self._entries = list(entries)
        self._next = 0

    def changed(self) -> Difference | None:
        """The first value of this call's window that is not the recorded one."""
        entries = self._entries
        if len(entries) > WINDOW:
            entries = entries[self._next : self._next + WINDOW]
            self._next = self._next + WINDOW if self._next + WINDOW < len(self._entries) else 0
        for path, container, key, value in entries:
            try:
                now = container[key]
            except (KeyError, IndexError):
                return Difference(path, repr(value), "absent")
            if now is not value and not same(now, value):
                return Difference(path, repr(value), repr(now))
        return None
