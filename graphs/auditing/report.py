"""What an audit found, as plain data: printable, and JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from graphs.auditing.finding import Finding


@dataclass(frozen=True)
class Audit:
    """Everything found in a step.

    Attributes:
        device: where the step ran.
        operators: operators per step.
        steps: consecutive steps that were compared.
        cost: what `Finding.cost_us` is: ``"host waits"`` on a GPU, ``"time of calls"`` on a CPU.
        findings: in the order of the step; changing attributes last.
    """

    device: str
    operators: int
    steps: int
    cost: str
    findings: tuple[Finding, ...]

    def to_json(self, indent: int | None = 2) -> str:
        """The audit as a JSON object with the attribute names as keys."""
        return json.dumps(dataclasses.asdict(self), indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Audit:
        """The audit that `to_json` wrote."""
        fields = json.loads(text)
        found = [{**one, "classes": tuple(one["classes"]), "passes": tuple(one["passes"])} for one in fields["findings"]]
        return cls(**{**fields, "findings": tuple(Finding(**one) for one in found)})

    def __str__(self) -> str:
        from graphs.auditing.table import as_text

        return as_text(self)

    def __rich__(self) -> Any:
        from graphs.auditing.table import as_table

        return as_table(self)
