"""What an eager run read, looked up by a trace of the same step.

A read is told apart by its operator, by its place in the code and by how often the operator had run there: two reads of one
line are two places, and an operator that reads nothing has its turn too.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from passes.core.source_location import Place, Site

aten = torch.ops.aten
_WHOLE = (
    *("Tensor.tolist", "Tensor.numpy", str(aten.equal.default), str(aten.allclose.default)),
    *("torch.tensor", "torch.as_tensor", "torch.asarray", "torch.new_tensor", "Tensor.new_tensor"),
)
"""Reads of a whole tensor, of which a trace reads one number after the other."""


@dataclass(frozen=True)
class Read:
    """A value that the host read in an eager run of the step.

    Attributes:
        operator, site: which operator gave it, at which line.
        call: the same number for values that one call gave.
        place: where in the code; None where no more than the line is known.
        turn: how often the operator had run there before.
        source: the operator that made the tensor it was read from, if the step did that.
    """

    operator: str
    site: Site
    value: Any
    call: int = 0
    place: Place | None = None
    turn: int = 0
    source: str = ""


class Reads:
    """The reads of one eager run, for one trace, which says at each operator that it comes to where it is.

    Attributes:
        operators: those that read anything.
    """

    def __init__(self, reads: Sequence[Read]) -> None:
        self.operators = frozenset(read.operator for read in reads)
        self._turns: Counter[tuple[str, Place]] = Counter()
        self._found: dict[tuple[str, Place, int], list[Read]] = {}
        self._by_line: defaultdict[tuple[str, Site], deque[list[Read]]] = defaultdict(deque)
        self._whole: defaultdict[Place, deque[Read]] = defaultdict(deque)
        self._given: defaultdict[Place, deque[Any]] = defaultdict(deque)
        calls: dict[Any, list[Read]] = {}
        for index, read in enumerate(reads):
            if read.operator in _WHOLE:
                self._whole[read.place or Place(*read.site)].append(read)
            elif read.place is None:
                key = (read.operator, read.site, read.call or -index - 1)
                if key not in calls:
                    calls[key] = []
                    self._by_line[read.operator, read.site].append(calls[key])
                calls[key].append(read)
            else:
                self._found.setdefault((read.operator, read.place, read.turn), []).append(read)

    def next(self, operator: str, place: Place, *, number: bool, source: str = "") -> list[Read]:
        """What the eager run read at the operator call that the trace has come to; empty where it read nothing.

        Args:
            number: whether the call gives one number, which may be one of a tensor that the eager run read as a whole.
            source: the operator that made the tensor it is read from, if the step did that.
        """
        turn = self._turn(operator, place, source)
        self._turns[operator, place] = max(turn, self._turns[operator, place]) + 1
        found = self._found.get((operator, place, turn)) if turn >= 0 else []
        if found is None and self._by_line[operator, place.site]:
            found = self._by_line[operator, place.site].popleft()
        if found is None and number:
            found = self._element(place)
        return found or []

    def _turn(self, operator: str, place: Place, source: str) -> int:
        """Whose turn it is; below zero where that cannot be told.

        An operator of torch's may read more than its traced decomposition does, all in one place.
        """
        turn = first = self._turns[operator, place]
        while (found := self._found.get((operator, place, turn))) is not None:
            if source in (found[0].source, "") or not found[0].source:
                return turn
            turn += 1
        several = turn > first + 1 or (operator, place, first - 1) in self._found
        return -1 if several else first

    def _element(self, place: Place) -> list[Read]:
        whole, given = self._whole[place], self._given[place]
        if not given and whole:
            read = whole.popleft()
            given.extend(Read(read.operator, read.site, value, read.call, read.place, read.turn) for value in _flat(read.value))
        return [given.popleft()] if given else []

    def drop(self, operator: str, place: Place) -> None:
        """Forget a read of a whole tensor that the trace does without."""
        if self._whole[place] and self._whole[place][0].operator == operator:
            self._whole[place].popleft()


def _flat(value: Any) -> list[Any]:
    return [leaf for item in value for leaf in _flat(item)] if isinstance(value, list) else [value]
