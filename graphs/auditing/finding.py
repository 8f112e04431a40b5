"""One thing that a recording cannot hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from graphs.auditing.remedies import CLASSES, remedy_of
from graphs.errors import Site


@dataclass(frozen=True)
class Finding:
    """One thing that a recording cannot hold, at one line.

    Attributes:
        kind: ``"host-sync"``, ``"data-dependent-branch"``, ``"data-dependent-shape"``, ``"host-constant"``;
            ``"changing-scalar"``, ``"changing-shape"``, ``"changing-address"``, ``"changing-constant"``,
            ``"changing-operators"``, ``"changing-attribute"`` and ``"changing-output"`` for what is not the same in two
            consecutive steps; ``"step-raised"``; and the reasons of `graphs.errors` for what is not supported.
        operator: the operator, or the Python value by name.
        function: the function of torch that the line called, where one was.
        file, line, source: the user's line; empty where no line can be named.
        detail: what was seen.
        classes: how the value is used: ``"addressing"``, ``"arithmetic"``, ``"bound"``, ``"control flow"``, ``"host constant"``,
            ``"changing value"``, ``"unsupported"`` or ``"unknown"``.
        passes: the passes that take it away; empty where none applies.
        cure: what they do, or what to change instead.
        calls: how often per step.
        cost_us: microseconds per step, see `Audit.cost`; None where nothing can be timed.
        follows: True where it goes away with another finding: a size that follows from a length, for example.
        once: True where only the first step differs from the next, as in lazy initialisation.
    """

    kind: str
    operator: str
    function: str
    file: str
    line: int
    source: str
    detail: str
    classes: tuple[str, ...]
    passes: tuple[str, ...]
    cure: str
    calls: int
    cost_us: float | None = None
    follows: bool = False
    once: bool = False


def finding(
    kind: str,
    operator: str,
    site: Site,
    detail: str,
    classes: Iterable[str],
    *,
    why: str = "",
    function: str = "",
    calls: int = 1,
    cost_us: float | None = None,
    follows: bool = False,
    once: bool = False,
) -> Finding:
    """A finding with the remedy for its classes, or with none for the reason ``why``."""
    ordered = tuple(name for name in CLASSES if name in set(classes))
    passes, cure = ((), why) if why else remedy_of(ordered)
    where = site.file, site.line, site.source
    return Finding(kind, operator, function, *where, detail, ordered, passes, cure, calls, cost_us, follows, once)


class Findings(Protocol):
    """What is shown of an audit; see `graphs.auditing.report.Audit`."""

    @property
    def device(self) -> str:
        """Where it ran."""
        ...

    @property
    def operators(self) -> int:
        """Operators per step."""
        ...

    @property
    def steps(self) -> int:
        """Consecutive steps that were compared."""
        ...

    @property
    def cost(self) -> str:
        """What the times are."""
        ...

    @property
    def findings(self) -> tuple[Finding, ...]:
        """In the order of the step."""
        ...
