"""What a parity run compared, row by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class ParityDifference:
    """The first difference of a row.

    Attributes:
        context, variation: of the row.
        call: number of the call within the row, from 0.
        what: what differs: ``output[0]``, the path of a buffer or attribute, an argument, ``random state``, ``exception``.
        detail: how; the step called eagerly is what is right.
        toggled: the value that was changed right before this call, or what was put back; empty where nothing was.
        file, line, source: the line that made the output, else the one that reads or sets the value; empty where unknown.
    """

    context: str
    variation: str
    call: int
    what: str
    detail: str
    toggled: str = ""
    file: str = ""
    line: int = 0
    source: str = ""


@dataclass(frozen=True)
class ParityRow:
    """One variation under one context.

    Attributes:
        context: ``"no_grad"``, ``"autocast+inference_mode"``, ...
        variation: ``"new data"``, a layout of the arguments, or a kind of value that was changed between calls.
        tried: changes made and put back, of ``found``; 0 for data and layouts.
        calls: of each twin.
        replays: calls of the captured twin that a recording served.
        eager_calls: the others.
        reasons: why, each once: ``reason file:line``.
        differences: calls that differed.
    """

    context: str
    variation: str
    tried: int
    found: int
    calls: int
    replays: int
    eager_calls: int
    reasons: tuple[str, ...]
    differences: int


class Rows(Protocol):
    """What is shown of a parity run; see `graphs.parity.report.ParityReport`."""

    @property
    def name(self) -> str:
        """Of the step."""
        ...

    @property
    def device(self) -> str:
        """Where it ran."""
        ...

    @property
    def rows(self) -> tuple[ParityRow, ...]:
        """One for each context and variation."""
        ...

    @property
    def first(self) -> ParityDifference | None:
        """The first difference."""
        ...

    @property
    def ok(self) -> bool:
        """Whether no call differed."""
        ...
