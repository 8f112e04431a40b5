"""What a parity run found, as plain data: printable, and JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass


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


@dataclass(frozen=True)
class ParityReport:
    """A captured step against the step itself. ``print`` shows a table, `to_json` holds everything.

    Attributes:
        name: of the step.
        device: where it ran.
        rows: a row for each context and variation.
        first: the first difference; None where there is none.
    """

    name: str
    device: str
    rows: tuple[ParityRow, ...]
    first: ParityDifference | None

    @property
    def ok(self) -> bool:
        """Whether no call differed."""
        return self.first is None

    def to_json(self, indent: int | None = 2) -> str:
        """The report as a JSON object with the attribute names as keys, and ``ok``."""
        return json.dumps({"ok": self.ok, **dataclasses.asdict(self)}, indent=indent)

    def __str__(self) -> str:
        from graphs.parity.table import as_text

        return as_text(self)
