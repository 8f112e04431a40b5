"""Python values that code can branch on, compared with the present at every call.

A recording froze them. Changing one between calls has to be noticed by the next call, so a window of them is looked at
each time: all of them where they are few, which is what a user's own model has.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

from graphs.contract.identity import identity_check
from graphs.contract.places import Difference, same

WINDOW = 64  # about 1 us per call


class Steering:
    """The steering values of one recording; see `PythonState.steering`."""

    def __init__(self, entries: Sequence[tuple[str, Any, Any, Any]]) -> None:
        windows = [entries[start : start + WINDOW] for start in range(0, max(len(entries), 1), WINDOW)]
        self._windows = cycle((window, identity_check(entry[1:] for entry in window)) for window in windows)

    def changed(self) -> Difference | None:
        """The first value of this call's window that is not the recorded one."""
        entries, all_identical = next(self._windows)
        if all_identical():
            return None
        for path, container, key, value in entries:
            try:
                now = container[key]
            except (KeyError, IndexError):
                return Difference(path, repr(value), "absent")
            if not same(now, value):
                return Difference(path, repr(value), repr(now))
        return None
