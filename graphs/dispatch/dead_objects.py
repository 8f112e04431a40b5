"""What is recorded for an object, a cache, is dropped when the object dies: a recording holds the tensors that it reads."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphs.objects.torch_fast_paths import is_capturing


class DeadObjects:
    """Has what was recorded for objects dropped once one of them is gone.

    An object may die anywhere: below a call that holds the locks, or while something is being recorded, when nothing may be
    given back to a device. Then it is left to the next call.

    Args:
        forget: drops it; called with ``locks`` held.
        locks: in the order in which they are to be taken.
    """

    def __init__(self, forget: Callable[[], None], locks: Sequence[Any]) -> None:
        self._forget, self._locks = weakref.WeakMethod(forget), locks
        self._references: dict[int, weakref.ref[Any]] = {}
        self.pending = False

    def watch(self, objects: Sequence[Any]) -> None:
        """Wait for the end of ``objects``, those that can be referred to weakly."""
        for one in objects:
            try:
                self._references[id(one)] = weakref.ref(one, _callback(weakref.ref(self), id(one)))
            except TypeError:  # a recording holds it itself, then
                continue

    def died(self, identity: int, reference: Any) -> None:
        """One of them is gone."""
        if self._references.get(identity) is reference:  # and not of another object that is there now
            del self._references[identity]
        self.pending = True
        self.settle()

    def settle(self) -> None:
        """Drop what there is to drop, unless somebody is in the middle of something."""
        if any(lock._is_owned() for lock in self._locks) or (torch.cuda.is_initialized() and is_capturing()):
            return
        taken = []
        try:
            for lock in self._locks:
                if not lock.acquire(blocking=False):
                    return
                taken.append(lock)
            forget = self._forget()
            if self.pending and forget is not None:
                self.pending = False
                forget()
        finally:
            for lock in reversed(taken):
                lock.release()


def _callback(watcher: Callable[[], DeadObjects | None], identity: int) -> Callable[[Any], None]:
    def died(reference: Any) -> None:
        mine = watcher()
        if mine is not None:
            mine.died(identity, reference)

    return died
