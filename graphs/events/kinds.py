"""The events: frozen values, one class for each thing that can happen to a recording or to a call."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class Event:
    """What all events say.

    Attributes:
        kind: the name of the event, for labels of metrics.
        step: name of the captured step: ``name=`` of `graphs.capture`, else of the class or function. A graph that was compiled
            with ``backend="graphs"`` has the name that `graphs.backend_report` shows.
        key: shapes of the tensor arguments at the recorded size. Empty where the event is not of one recording.
        rows: the bucket, or None for exact sizes.
        time: when it happened, in seconds since the epoch.
    """

    kind: ClassVar[str] = "event"
    step: str
    key: str = ""
    rows: int | None = None
    time: float = field(default_factory=time.time)

    @property
    def size(self) -> str:
        """The recorded size as a short text: the bucket, else the shapes."""
        return size_text(self.key, self.rows)

    @property
    def level(self) -> int:
        """The level at which the event is logged; 0 for never."""
        return logging.INFO


@dataclass(frozen=True, kw_only=True)
class Recorded(Event):
    """A recording was made, compared with eager and kept.

    Attributes:
        seconds: everything that precedes the first replay.
        bytes: memory that it added to the pool of its module.
    """

    kind: ClassVar[str] = "recorded"
    seconds: float
    bytes: int

    def __str__(self) -> str:
        return f"{self.step}: recorded {self.size} in {self.seconds:.2f} s, {self.bytes / 2**20:.1f} MiB"


@dataclass(frozen=True, kw_only=True)
class Replayed(Event):
    """A call was served by a recording. Never logged: it happens at every step.

    Attributes:
        seconds: time on the host, from recognising the call to its output. A GPU may still be at work.
        real_rows: rows of the call, without padding; 1 where the recording has exact sizes.
    """

    kind: ClassVar[str] = "replayed"
    seconds: float
    real_rows: int = 1

    @property
    def level(self) -> int:
        """Never."""
        return 0


@dataclass(frozen=True, kw_only=True)
class Refused(Event):
    """A call was not replayed, or not as asked for, for a reason of `graphs.Refusal`.

    Attributes:
        reason: the slug, for example ``host-sync``.
        operator: the operator or value at fault.
        detail: what was seen.
        remedy: what to change.
        file, line: the line of the step; empty and 0 where none is known.
        outcome: what becomes of the call, for example ``this call runs eagerly``.
        first: whether this reason, operator and line are seen for the first time in this step.
    """

    kind: ClassVar[str] = "refused"
    reason: str
    operator: str = ""
    detail: str = ""
    remedy: str = ""
    file: str = ""
    line: int = 0
    outcome: str = ""
    first: bool = True

    @property
    def level(self) -> int:
        """A warning at first sight; the same again is for those who look for it."""
        return logging.WARNING if self.first else logging.DEBUG

    def __str__(self) -> str:
        where = f" at {self.file}:{self.line}" if self.file else ""
        named = f" [{self.operator}]" if self.operator else ""
        return f"{self.step}: {self.outcome}: {self.reason}{where}{named}: {self.detail}. Remedy: {self.remedy}"


@dataclass(frozen=True, kw_only=True)
class Moved(Event):
    """Tensors that a recording reads in place were elsewhere, and the recording was pointed to where they are.

    Attributes:
        seconds: what that took.
        compared: whether a replay was compared with eager, as it is for the first move of an argument.
        reason: the slug of why that is done.
    """

    kind: ClassVar[str] = "moved"
    seconds: float
    compared: bool
    reason: str = "moved-static-tensor"

    def __str__(self) -> str:
        return f"{self.step}: {self.size} pointed to where its tensors are now, in {self.seconds * 1e3:.1f} ms"


@dataclass(frozen=True, kw_only=True)
class Evicted(Event):
    """A recording was dropped to make room for another.

    Attributes:
        bytes: memory that it had added to the pool of its module.
        replays: calls that it had served.
        reason: the slug of why.
    """

    kind: ClassVar[str] = "evicted"
    bytes: int
    replays: int
    reason: str = "too-many-keys"

    def __str__(self) -> str:
        freed = f"{self.bytes / 2**20:.1f} MiB"
        return f"{self.step}: dropped the recording of {self.size} ({self.reason}), {freed}, after {self.replays} replays"


def size_text(key: str, rows: int | None) -> str:
    """``8 rows``, or the shapes of the arguments where sizes are exact."""
    return key if rows is None else f"{rows} row{'s' if rows > 1 else ''}"
