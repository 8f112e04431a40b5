"""Counting what happened to calls, and warning once per reason."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import traceback
import warnings
from collections.abc import Iterator

from graphs.errors import InternalError, Refusal, TooManyKeys
from graphs.events import Evicted, Refused, emit
from graphs.first_call.recorded_step import RecordedStep
from graphs.report import CaptureReport, KeyReport, RefusalCount
from passes.core.source_location import user_level


class NotReplayed(UserWarning):
    """A call ran eagerly although graph mode was asked for."""


INITIALISED = "the call initialised it; the next one like it is tried again"


class CallLog:
    """Counts of one captured module.

    A filter may make an exception of a warning (``-W error``). In the midst of a call that would look like a failure, so warnings
    are kept until `warn_now`, which the call ends with.

    Args:
        name: what events call it.

    Attributes:
        unsaid: warnings of calls that are not over, by the thread of the call.
    """

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.eager_calls = 0
        self.evictions = 0
        self.moved = 0  # times that a recording was pointed at other tensors
        self._replays_dropped = 0
        self._refusals: dict[tuple[str, str, str, int], RefusalCount] = {}
        self.unsaid: dict[int, list[str]] = {}

    def recorded_otherwise(self, reason: Refusal, outcome: str) -> None:
        """Count why a step (or a graph) was recorded anew, at its exact sizes or uncompiled: the call itself is replayed."""
        first = reason.signature not in self._refusals
        self.refused(reason, outcome=outcome, calls=0)
        known = self._refusals[reason.signature]
        self._refusals[reason.signature] = dataclasses.replace(known, recorded=known.recorded + 1)
        self._tell(reason, outcome, first)

    def refused(self, refusal: Refusal, *, outcome: str = "this call runs eagerly", calls: int = 1, warn: bool = True) -> None:
        """Count a refusal; its reason, operator and line are warned about when the call is over that they are first seen in.

        Args:
            calls: 0 for what was found beside the reason that the call is counted under.
            warn: False where something else tells the caller.
        """
        known = self._refusals.get(refusal.signature)
        if known is None:
            site = refusal.site
            where, what = (site.file, site.line), (refusal.detail, refusal.remedy)
            known = RefusalCount(refusal.reason, refusal.operator, *where, *what, 0, _traceback(refusal))
            if warn:
                self.unsaid.setdefault(threading.get_ident(), []).append(f"graphs: {outcome}: {refusal}")
        elif known.detail == INITIALISED:  # what is the matter beyond that tells more
            known = dataclasses.replace(known, detail=refusal.detail, remedy=refusal.remedy)
        first = refusal.signature not in self._refusals
        self._refusals[refusal.signature] = dataclasses.replace(known, count=known.count + calls)
        if calls:
            self._tell(refusal, outcome, first)

    def warn_now(self, *, raising: bool = True) -> None:
        """Give the warnings of this thread's call, which is over.

        Args:
            raising: False where the call raises something itself, which goes before.

        Raises:
            NotReplayed: a filter makes an exception of it; of several, the first.
        """
        raised: NotReplayed | None = None
        for text in self.unsaid.pop(threading.get_ident(), ()):
            try:
                warnings.warn(text, NotReplayed, stacklevel=user_level())
            except NotReplayed as error:
                raised = raised or error
        if raised is not None and raising:
            raise raised

    @contextlib.contextmanager
    def warning_after(self) -> Iterator[None]:
        """Have what happens inside warned about afterwards; what is raised inside goes before."""
        try:
            yield
        except BaseException:
            self.warn_now(raising=False)
            raise
        self.warn_now()

    def _tell(self, refusal: Refusal, outcome: str, first: bool) -> None:
        emit(
            Refused(
                step=self.name,
                reason=refusal.reason,
                operator=refusal.operator,
                detail=refusal.detail,
                remedy=refusal.remedy,
                file=refusal.site.file,
                line=refusal.site.line,
                outcome=outcome,
                first=first,
            )
        )

    @property
    def refusals(self) -> tuple[RefusalCount, ...]:
        """Every reason so far, in the order of first sight."""
        return tuple(self._refusals.values())

    def dropped(self, entry: RecordedStep) -> None:
        """Keep the replays of a recording that is being dropped."""
        self._replays_dropped += entry.replays

    def evicted(self, entry: RecordedStep, limit: int) -> None:
        """Count a recording that was dropped to make room for another; the first time is warned about."""
        self.evictions += 1
        detail = f"{entry.key}, after {entry.replays} replays (max_recordings={limit})"
        outcome = "the recording used least recently was dropped to make room for another"
        self.refused(TooManyKeys(detail, operator="max_recordings"), outcome=outcome, calls=0)
        rows, size = entry.contract.rows, entry.memory_bytes
        emit(Evicted(step=self.name, key=entry.key, rows=rows, bytes=size, replays=entry.replays))

    def replays(self, entries: list[RecordedStep]) -> int:
        """Calls that were replayed, by ``entries`` and by recordings that are gone."""
        return self._replays_dropped + sum(entry.replays for entry in entries)

    def report(self, device: str, mode: str, entries: list[RecordedStep]) -> CaptureReport:
        """The report of everything counted so far."""
        return CaptureReport(
            device=device,
            mode=mode,
            recordings=len(entries),
            replays=self.replays(entries),
            eager_calls=self.eager_calls,
            evictions=self.evictions,
            moved=self.moved,
            refusals=self.refusals,
            keys=tuple(_key_report(entry) for entry in entries),
        )


def _traceback(refusal: Refusal) -> str:
    error = refusal.error if isinstance(refusal, InternalError) else None
    return "".join(traceback.format_exception(error)) if error is not None else ""


def _key_report(entry: RecordedStep) -> KeyReport:
    eager, replay, rows = entry.eager, entry.replay, entry.contract.rows
    saved = _cost(eager) - _cost(replay) if eager is not None and replay is not None else 0.0
    return KeyReport(
        key=entry.key,
        rows=rows,
        replays=entry.replays,
        eager_host_us=eager.host_us if eager is not None else None,
        eager_device_us=eager.device_us if eager is not None else None,
        replay_host_us=replay.host_us if replay is not None else None,
        replay_device_us=replay.device_us if replay is not None else None,
        capture_seconds=entry.capture_seconds,
        pool_bytes=entry.recording.pool_bytes,
        device_free_delta=entry.device_free_delta,
        padding_waste=1 - entry.real_rows / (rows * entry.replays) if rows is not None and entry.replays else 0.0,
        break_even_calls=int(entry.capture_seconds * 1e6 / saved) + 1 if saved > 0 else None,
        compiler=entry.compiler,
        compile_seconds=entry.compile_seconds,
        rewrites=dict(entry.rewrites),
        proved=dict(+entry.proof.proved),
        unproved=dict(+entry.proof.unproved),
        capped=entry.proof.capped,
        compiler_us=dict(entry.candidates),
    )


def _cost(time: object) -> float:
    """What one call takes: the longer of host and device time, microseconds."""
    return max(getattr(time, "host_us", 0.0), getattr(time, "device_us", None) or 0.0)
