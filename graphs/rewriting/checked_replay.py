"""Replays of a graph that assumes something of host values: each is asked whether it held, and undone where it did not."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence

import torch

import passes
from graphs.recording.recorder import CannotPoint, Recording, Storage
from graphs.state.counters import Counters
from graphs.state.tensor_state import RandomState, TensorState

Tensor = torch.Tensor


class Speculation:
    """Whether the host values of a run were as its graph assumes, and how to undo it if not.

    The graph counts its runs and leaves ``2 * runs + broken`` in host memory (pinned, where there is a device). The host
    waits for its own run's number to appear there. It is written at the end of the graph: an assumption may be about anything
    that the graph computes, and whoever undoes a run must not do so while it still writes.
    """

    def __init__(self, plan: Sequence[passes.Undo]) -> None:
        self._plan = plan
        self._runs: Tensor | None = None
        self._word = torch.zeros((), dtype=torch.int64, pin_memory=torch.cuda.is_available())
        self._memory = ctypes.c_int64.from_address(self._word.data_ptr())
        self._saved: Sequence[Tensor] = ()

    def ran(self, broken: Tensor, saved: Sequence[Tensor]) -> None:
        """Called by each run, eager or recorded, with what its graph computed."""
        if self._runs is None:
            self._runs = torch.zeros((), dtype=torch.int64, device=broken.device)
        if broken.device.type == "cpu":
            self._runs.add_(2)
            self._word.copy_(self._runs + broken)
        else:
            from graphs.recording.run_word import count_run

            count_run(self._runs, broken, self._word)
        self._saved = saved

    def runs(self) -> int:
        """How many runs there were. Waits for the device."""
        assert self._runs is not None
        return int(self._runs.item()) // 2

    def valid(self, run: int) -> bool:
        """Whether the assumption held in a run, the last one launched. Waits until the device knows.

        Raises:
            RuntimeError: the device failed before it could say.
        """
        spins = 0
        while self._memory.value >> 1 != run:
            spins += 1
            if spins % 4096 == 0 and torch.cuda.current_stream().query() and self._memory.value >> 1 != run:
                raise RuntimeError(f"run {run} of a recorded step ended without saying whether its assumptions held")
            if spins > 64:
                time.sleep(0)  # lets another thread have the interpreter
        return not self._memory.value & 1

    def undo(self) -> None:
        """Take back what the last run wrote."""
        with torch.no_grad():
            passes.undo(self._plan, self._saved)


class CheckedReplay:
    """A recording of a rewritten step: it knows whether its last replay was right, and keeps Python's numbers.

    Args:
        recording: what replays the graph.
        assumption: what the graph assumes of host values, if anything.
        counters: numbers that the step advances, if any.
        random: saves the random generators, for steps that draw from them.
    """

    def __init__(
        self,
        recording: Recording,
        assumption: Speculation | None,
        counters: Counters | None,
        random: Callable[[], RandomState] | None,
    ) -> None:
        self._recording, self._speculation, self._counters = recording, assumption, counters
        self._random = random if assumption is not None else None
        self._before: RandomState | None = None
        self._run = assumption.runs() if assumption is not None else 0
        self.outputs = recording.outputs  # type: ignore[attr-defined]
        self.at: Sequence[Storage] | None = None

    def replay(self, tensors: Sequence[Tensor], rows: int, journal: TensorState | None = None) -> list[Tensor]:
        """Replay; `commit_or_rollback` tells whether the results can be used."""
        if self._random is not None:
            self._before = self._random()
        if self._counters is not None:
            self._counters.load()
        produced = self._recording.replay(tensors, rows, journal)
        self._run += 1
        if self._counters is not None:
            self._counters.ran()
        return produced

    def settle(self, storages: Sequence[Storage]) -> None:
        """Nothing is noted; see `point`."""

    def point(self, recorded: Sequence[tuple[int, int]], storages: Sequence[Storage]) -> None:
        """Not possible: what undoes a replay, and the numbers that it advances, belong to the tensors it was recorded with."""
        raise CannotPoint("its replays are undone where an assumption does not hold")

    def let_go(self, recorded: Sequence[tuple[int, int]]) -> None:
        """Nothing is let go of; see `point`."""

    def abandoned(self) -> None:
        """Note that the last replay did not come to its end, and was undone by others."""
        if self._counters is not None:
            self._counters.unknown()

    def valid(self) -> bool:
        """Whether what the graph assumes was true in the last replay. Waits until the device knows."""
        return self._speculation is None or self._speculation.valid(self._run)

    def commit(self) -> None:
        """Give Python the numbers that the last replay advanced."""
        if self._counters is not None:
            self._counters.store()

    def commit_or_rollback(self) -> bool:
        """Whether the last replay counts: if so Python's numbers are advanced, else all that it did is undone."""
        try:
            held = self.valid()
        except RuntimeError:
            self._undo()  # the replay came to its end: eager, which follows, starts from before it
            raise
        if held:
            self.commit()
        else:
            self._undo()
        return held

    def _undo(self) -> None:
        """Take back all that the last replay did."""
        assert self._speculation is not None
        self._speculation.undo()
        if self._before is not None:
            self._before.restore()
        if self._counters is not None:
            self._counters.undone()

    @property
    def pool_bytes(self) -> int:
        """See `graphs.recording.recorder.Recording`."""
        return self._recording.pool_bytes
