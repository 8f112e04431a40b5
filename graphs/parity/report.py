"""What a parity run found, as plain data: printable, and JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from graphs.parity.rows import ParityDifference, ParityRow


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
