"""What a guard is: a Python value that a recording froze, compared with the present."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from graphs.objects.cells import Difference

Bind = Callable[[Any], str]
"""Gives an object a name in the generated expression."""


class Guard(Protocol):
    """What one container held when the recording was made."""

    def difference(self) -> Difference | None:
        """The first value that is not what it was."""
        ...

    def conditions(self, bind: Bind) -> Iterator[str]:
        """Expressions that are true while nothing was exchanged; false ones are looked at by `difference`."""
        ...
