"""Recording all sizes of a step ahead of serving: the largest first, into one pool, within a budget of memory."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import torch

from graphs.contract.eligibility import device_of
from graphs.dispatch.ahead.budget import SHARE, copied_bytes, free_bytes, mib, needed_bytes, over_budget
from graphs.dispatch.ahead.progress import Told, progress_of
from graphs.dispatch.ahead.sizes import Example, Sized, as_sizes, calls_of, largest_that_fits
from graphs.dispatch.call_log import CallLog
from graphs.dispatch.key_recorder import KeyRecorder
from graphs.dispatch.routes import Routes
from graphs.environment import as_bytes
from graphs.errors import ChangingValue, ConfigError, OverBudget
from graphs.first_call.outcomes import Deferred, Refused
from graphs.first_call.recorded_step import RecordedStep
from graphs.first_call.verify_replay import time_replay
from graphs.recording.failures import RaisedWatched, StepRaised, is_of_our_own, refusal_of
from graphs.report import SizeReport, SizesReport


class SizesAhead:
    """Records the sizes of one captured module."""

    def __init__(self, keys: KeyRecorder, routes: Routes, log: CallLog) -> None:
        self._keys, self._routes, self._log = keys, routes, log

    def record(
        self, example: Example, sizes: Iterable[int] | None, memory_budget: int | str | None, *, progress: bool
    ) -> SizesReport:
        """Record sizes; see `graphs.dispatch.captured_module.CapturedStep.record`."""
        given = as_bytes("memory_budget", memory_budget) if memory_budget is not None else self._keys.memory_budget
        calls = calls_of(example, as_sizes(sizes, self._keys.config), self._keys)
        device = device_of(calls[0].call, self._keys.step(calls[0].call, calls[0].leaves).model)
        limit = given if given is not None else self._taken() + int(SHARE * free_bytes(device))
        _require_room(calls, limit)
        if memory_budget is not None:
            self._keys.memory_budget = limit
        with progress_of(len(calls), shown=progress) as told:
            report = self._all(calls, limit, device, told)
            told.done(report)
        return report

    def _all(self, calls: Sequence[Sized], limit: int, device: torch.device, told: Told) -> SizesReport:
        first, largest = self._first(calls, limit, told)
        rows, known = [first], (largest, calls[0].size)
        needed = [needed_bytes(sized.size, largest, calls[0].size, first=True) for sized in calls[1:]]
        seconds, size = largest.capture_seconds * len(calls), largest.memory_bytes + sum(needed)
        told.estimated(
            f"graphs: size {calls[0].size} took {first.seconds:.2f} s and {mib(first.bytes)}; all {len(calls)} sizes will take "
            f"about {seconds:.1f} s and {mib(size)} (an estimate from this one)"
        )
        for sized in calls[1:]:
            told.begun(sized.size)
            row, made = self._next(sized, *known, limit, first=known[0] is largest)
            known = (made, sized.size) if made is not None else known
            told.ended(row)
            rows.append(row)
        return SizesReport(str(device), limit, seconds, size, tuple(rows))

    def _first(self, calls: Sequence[Sized], limit: int, told: Told) -> tuple[SizeReport, RecordedStep]:
        """The largest size. What it takes is known only now: where that is more than the budget, it is dropped.

        Raises:
            OverBudget: it is.
        """
        sized = calls[0]
        told.begun(sized.size)
        row, entry = self._recorded(sized)
        if self._taken() > limit:
            others = self._taken() - entry.memory_bytes
            self._routes.discard(entry)

            def needed(size: int) -> int:
                return others + entry.memory_bytes * size // sized.size

            fitting = largest_that_fits([call.size for call in calls[1:]], needed, limit)
            raise OverBudget(
                f"size {sized.size} took {mib(entry.memory_bytes)} beside {mib(others)} of others, of {mib(limit)}; "
                f"by its measure {fitting}",
                operator="record",
            )
        told.ended(row)
        return row, entry

    def _next(
        self, sized: Sized, known: RecordedStep, known_size: int, limit: int, *, first: bool
    ) -> tuple[SizeReport, RecordedStep | None]:
        needed = needed_bytes(sized.size, known, known_size, first=first)
        refusal = over_budget(limit, needed, self._taken(), f"size {sized.size}")
        if refusal is None or self._known(sized) is not None:
            return self._recorded(sized)
        if self._keys.config.strict:
            raise refusal
        self._log.refused(refusal, outcome=f"size {sized.size} is not recorded", calls=0)
        self._routes.refuse(sized.call, [refusal])
        return SizeReport(sized.size, recorded=False, note=f"{refusal.reason}: {refusal.detail}"), None

    def _recorded(self, sized: Sized) -> tuple[SizeReport, RecordedStep]:
        started, known = time.perf_counter(), self._known(sized)
        entry = known or self._made(sized)
        seconds = 0.0 if known else time.perf_counter() - started
        exact = self._keys.config.buckets is not None and entry.contract.rows is None
        note = "recorded before" if known else "at its exact size: padding it would change the real rows" if exact else ""
        replay = entry.replay
        us = max(replay.host_us, replay.device_us or 0.0) if replay is not None else None
        return SizeReport(sized.size, True, seconds, entry.memory_bytes, us, note), entry

    def _made(self, sized: Sized) -> RecordedStep:
        """The recording of a size, with the time of its replay. State is left as it was.

        Raises:
            Refusal: it cannot be recorded.
            Exception: what the step itself raises at this size.
        """
        step = self._keys.step(sized.call, sized.leaves)
        failure: RaisedWatched | None = None
        own: BaseException | None = None
        try:
            entry, rows = self._keys.record(step, ahead=True)
        except RaisedWatched as raised:
            failure, own = raised, raised.error
        except StepRaised as raised:
            own = raised.error
            if raised.undo is not None:
                raised.undo()
        except Refused as refused:
            if refused.undo is not None:
                refused.undo()
            raise refused.refusals[0] from refused
        except Deferred as deferred:
            deferred.undo()
            initialises = ChangingValue(f"the step initialises {deferred}; call it once first", operator=str(deferred))
            raise (deferred.refusal or initialises) from deferred
        if own is not None:
            raise refusal_of(failure) if failure is not None and is_of_our_own(own) else own
        entry.ahead = True
        if entry.replay is None:  # of a further size
            entry.replay = time_replay(step, entry, rows)
        self._routes.room.make(entry)
        return entry

    def _known(self, sized: Sized) -> RecordedStep | None:
        """The recording that serves calls of a size, as far as their sizes say; None where there is none."""
        return self._routes.entries.get(self._keys.plan(self._keys.step(sized.call, sized.leaves)).key)

    def _taken(self) -> int:
        """Bytes that all recordings of the module take."""
        return sum(entry.memory_bytes for entry in self._routes.recordings())


def _require_room(calls: Sequence[Sized], limit: int) -> None:
    """What is sure before anything runs: the copies of the arguments of the largest size fit into the budget.

    Raises:
        ConfigError: they do not; it names the largest size of which that is not known.
    """
    needed = {sized.size: copied_bytes(sized.call, sized.dims) for sized in calls}
    largest = calls[0].size
    if needed[largest] > limit:
        fitting = largest_that_fits([*needed], needed.__getitem__, limit)
        legal = f"{needed[largest]} bytes or more, for the arguments of size {largest} alone; {fitting}"
        raise ConfigError("memory_budget", limit, legal)
