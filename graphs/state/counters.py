"""Python numbers that a step advances: ``self.step += 1``, ``cache.length += n``.

A recording cannot run the line that advances them. Where the new value follows from the old ones alone, a replay reads
them from the device, advances them there, and the host writes the new values back to where Python looks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from graphs.state.python_state import PythonState

Tensor = torch.Tensor


@dataclass(frozen=True)
class Counter:
    """A whole number that hangs somewhere in the step's Python state.

    Attributes:
        path: as the user would write it; there may be other ways to it.
        container, key: where it hangs.
    """

    path: str = field(compare=False)
    container: Any
    key: Any

    @property
    def value(self) -> int:
        """The number now."""
        return int(self.container[self.key])

    def kind(self) -> type | None:
        """``int`` while a device can hold the number; None or another type where somebody has put something else there."""
        try:
            value = self.container[self.key]
        except (KeyError, IndexError):
            return None
        return type(value) if type(value) is not int or -(2**63) <= value < 2**63 else None


def find_counters(state: PythonState) -> list[Counter] | None:
    """The numbers that changed since the snapshot; None where anything else changed too."""
    found = []
    for path, container, key, before, after in state.changed_entries():
        if container is None or type(before) is not int or type(after) is not int:
            return None
        found.append(Counter(path, container, key))
    return found


class Counters:
    """The counters of one recording, on the device and in Python.

    Args:
        counters: what they are.
        device: where the recording runs.
    """

    def __init__(self, counters: Sequence[Counter], device: torch.device) -> None:
        self.counters = list(counters)
        self.tensors = [torch.tensor(counter.value, device=device) for counter in counters]
        self.advance: Callable[..., Sequence[int]] = lambda *values: values
        """New values of all counters from the old ones; set once the step was traced."""
        self._on_device = [counter.value for counter in counters]

    def next_values(self) -> list[int]:
        """What the numbers are after the next run."""
        return [int(value) for value in self.advance(*(counter.value for counter in self.counters))]

    def load(self) -> None:
        """Make the device hold what Python holds; a launch for each counter that somebody else has changed."""
        for index, counter in enumerate(self.counters):
            value = counter.container[counter.key]
            if value != self._on_device[index]:
                self.tensors[index].fill_(value)
                self._on_device[index] = value

    def ran(self) -> None:
        """Note that the device has advanced its copies, and nobody Python's."""
        self._on_device = list(self.advance(*self._on_device))

    def unknown(self) -> None:
        """Note that the device's copies may hold anything: the graph was warmed up or recorded."""
        self._on_device = [None] * len(self.counters)  # type: ignore[list-item]

    def undone(self) -> None:
        """Note that the device's copies were put back to what Python holds."""
        self._on_device = [counter.value for counter in self.counters]

    def store(self) -> None:
        """Give Python the values that the device holds."""
        for counter, value in zip(self.counters, self._on_device, strict=True):
            counter.container[counter.key] = value
