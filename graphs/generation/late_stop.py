"""When to stop launching a step that feeds itself: the device's word is read late, so that the host does not wait for each."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

Tensor = torch.Tensor
AHEAD = 24
"""Steps that are launched before the host waits for any of them."""
_BEHIND = 6  # of these that still run when it goes on


class LateStop:
    """Reads a flag of the device behind the steps that were launched.

    Args:
        going: what each step leaves: 0 where no further one is needed; int64 of no dimension.
        exact: no step is to run after the one that ended the last row.
    """

    def __init__(self, going: Tensor, *, exact: bool) -> None:
        self._going, self._late = going, going.is_cuda and not exact
        self._flown: deque[tuple[Tensor, Any]] = deque()
        self._free: list[tuple[Tensor, Any]] = []

    def launched(self) -> bool:
        """Note that a step was launched; whether the host knows by now that no further one is needed."""
        if not self._late:
            return not bool(self._going)
        flag, event = (
            self._free.pop() if self._free else (torch.empty((), dtype=torch.int64, pin_memory=True), torch.cuda.Event())
        )
        flag.copy_(self._going, non_blocking=True)
        event.record()
        self._flown.append((flag, event))
        if len(self._flown) > AHEAD:
            self._flown[-_BEHIND][1].synchronize()
        while self._flown and self._flown[0][1].query():
            known = self._flown.popleft()
            self._free.append(known)
            if not int(known[0]):
                return True
        return False


def _flag() -> tuple[Tensor, torch.cuda.Event]:
    return torch.empty((), dtype=torch.int64, pin_memory=True), torch.cuda.Event()
