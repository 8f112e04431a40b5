"""Proving that padding does not reach the real rows of a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphs.contract.outputs.template import compare_templates
from graphs.contract.slots import Contract
from graphs.errors import RowsInteract
from graphs.events.ranges import first_call_run
from graphs.first_call.recorded_step import RecordedStep, sliced
from graphs.first_call.verify_replay import find_written, judged, rehearsal_of
from graphs.numerics import tolerance
from graphs.numerics.judge import Rerun
from graphs.observation.eager_trace import trace_again
from graphs.recording.recorder import ReplayRaised
from graphs.rehearsal.rehearsal import Rehearsal
from graphs.rehearsal.step import Checkpoint, Step

Tensor = torch.Tensor


class PaddingProof:
    """P: the same step with at least one row fewer than the bucket, run eagerly at its exact size.

    It tells which output dimensions are the batch, and what the real rows have to be whatever the padding holds.
    """

    def __init__(self, step: Step, contract: Contract, rehearsal: Rehearsal, externals: list[Tensor]) -> None:
        assert step.rows is not None
        self.rows, self._bucket, self._rehearsal = min(step.real, max(step.rows - 1, 1)), step.rows, rehearsal
        self._tensors = sliced(step.call.tensors, step.batch_dims, self.rows)
        self._rerun = Rerun(
            rehearsal.reset, lambda: step.template(step.run(self._tensors), self._tensors, externals)[1], rehearsal.first.written
        )
        self._find_written(step, contract)
        rehearsal.run(lambda: self._run(step, externals))

    def _find_written(self, step: Step, contract: Contract) -> None:
        tensors = self._tensors
        try:
            find_written(
                step, self._rehearsal, lambda: [tolerance.padded(contract, tensors), *tolerance.poisons(contract, tensors)]
            )
        except Exception as error:  # a replay would be given the same
            raise RowsInteract(f"a run with padded rows raised {type(error).__name__}: {error}") from error

    def _run(self, step: Step, externals: list[Tensor]) -> None:
        try:
            output, watched = trace_again(lambda: step.run(self._tensors), self._tensors, self._rehearsal.first)
            shares = step.shares_memory(output, self._tensors, externals)
            self._expected = [out.clone() for out in step.template(output, self._tensors, externals)[1]]
        except Exception as error:  # for example a cache made for another batch size
            raise RowsInteract(f"a run with {self.rows} rows raised {type(error).__name__}: {error}") from error
        if shares:
            raise RowsInteract("an output shares memory with another tensor, and what is cut to its rows is a copy")
        if watched.written.tensors:
            raise RowsInteract(f"with {self.rows} rows the step writes tensors that it does not write with {step.real}")
        self._state, self._random = self._rehearsal.first.written.copies(), self._rehearsal.start.random_states()

    def output_dims(self, padded: Sequence[Tensor]) -> tuple[int | None, ...]:
        """The batch dimension of each output: this many rows here, and the bucket's when padded."""
        if len(padded) != len(self._expected):
            raise RowsInteract(f"the step has {len(self._expected)} outputs at {self.rows} rows, {len(padded)} at {self._bucket}")
        dims: list[int | None] = []
        for a, b in zip(self._expected, padded, strict=True):
            changed = [d for d, (m, n) in enumerate(zip(a.shape, b.shape, strict=False)) if m != n]
            if (
                a.ndim != b.ndim
                or len(changed) > 1
                or any((a.shape[d], b.shape[d]) != (self.rows, self._bucket) for d in changed)
            ):
                raise RowsInteract(f"an output of shape {tuple(a.shape)} becomes {tuple(b.shape)} at {self._bucket} rows")
            dims.append(changed[0] if changed else None)
        return tuple(dims)

    @first_call_run("P", "padding proof")
    def prove(self, entry: RecordedStep) -> None:
        """Replay with padding and with poison; raises `RowsInteract` unless the real rows and the state stay what they are."""
        if self.rows == self._bucket:
            return
        padded = self._replayed(entry, self._tensors, self.rows)
        state = entry.written.copies()
        self._compare(entry, self._expected, self._state, padded, "with padding")
        _compare_random(self._random, self._rehearsal.start)
        poisons = tolerance.poisons(entry.contract, self._tensors)
        if not poisons:
            kept = all(slot.written or slot.padding.kind not in ("repeat", "zero") for slot in entry.contract.slots)
            what = "padded rows are sentinels, or of arguments that are written" if kept else "this call's rows are all zeros"
            raise RowsInteract(f"no padded row could be poisoned: {what}", unproved=True)
        for tensors in poisons:
            outputs = sliced(self._replayed(entry, tensors, self._bucket), entry.contract.output_dims, self.rows)
            if not tolerance.bitwise_equal(padded, outputs):
                again = self._replayed(entry, self._tensors, self.rows)
                if tolerance.bitwise_equal(padded, again):
                    raise RowsInteract("the content of padded rows reaches the real rows of an output")
                self._replayed(entry, tensors, self._bucket)  # the step is not deterministic: compare within tolerance
            self._compare(entry, padded, state, outputs, "with poisoned padding")

    def _compare(
        self, entry: RecordedStep, expected: Sequence[Tensor], state: Sequence[Tensor], outputs: Sequence[Tensor], when: str
    ) -> None:
        """Raise unless a replay gave what it has to: ``expected``, or what eager gives but for rounding."""
        found = tolerance.run_difference(expected, outputs, state, entry.written.left(), entry.sentinels)
        if found is not None:
            found = judged(entry, self._expected, outputs, self._state, self._rerun)
        if found is not None:
            raise RowsInteract(f"{when}, {found[0]}: {found[1]}")

    def _replayed(self, entry: RecordedStep, tensors: Sequence[Tensor], rows: int) -> list[Tensor]:
        self._rehearsal.reset()
        return [out.clone() for out in entry.recording.replay(tensors, rows)]


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides that count: of dimensions with more than one element."""
    return tuple(stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)


def _compare_random(expected: Sequence[Tensor], start: Checkpoint) -> None:
    """Raise unless the random generators are where a run at exact sizes leaves them."""
    if not tolerance.bitwise_equal(expected, start.random_states()):
        raise RowsInteract("random numbers are drawn for padded rows too: those that come next would be others")


def prove_left_open(step: Step, entry: RecordedStep) -> None:
    """Prove of the first call with rows that count what a recording of padding alone left open; the state is as before.

    Raises:
        RowsInteract: padding reaches the rows.
    """
    if entry.left_open and not step.is_dummy:
        rehearsal = rehearsal_of(step, entry)
        padding = PaddingProof(step, entry.contract, rehearsal, entry.externals)
        rehearsal.run(lambda: padding.prove(entry))
        entry.left_open = False


def compare_padded(step: Step, entry: RecordedStep, rows: int) -> None:
    """Compare the first padded replay at ``rows`` rows with eager at exact sizes; the state is as before.

    What a step makes of the number of rows (a branch, a shape, an error) is proved for the numbers that occur, each once.

    Raises:
        RowsInteract: they differ.
        Exception: what the step raises at this size.
    """
    rehearsal, tensors = rehearsal_of(step, entry), step.call.tensors
    find_written(step, rehearsal, lambda: [tolerance.padded(entry.contract, tensors)])
    start, written = rehearsal.start, rehearsal.first.written
    expected, state, random = rehearsal.run(lambda: _exact_run(step, entry, rows, rehearsal))

    def replay() -> tuple[str, str] | None:
        try:
            produced = [out.clone() for out in entry.template.seen(entry.recording.replay(tensors, rows))]
        except ReplayRaised as raised:
            raise RowsInteract(f"with {rows} rows a replay raises {type(raised.error).__name__}") from raised
        _compare_random(random, start)
        if any(_strides(a) != _strides(b) for a, b in zip(expected, produced, strict=True)):
            raise RowsInteract(f"with {rows} rows an output lies in memory otherwise")
        found = tolerance.run_difference(expected, produced, state, written.left(), entry.sentinels)
        if found is None:
            return None
        rerun = Rerun(rehearsal.reset, lambda: entry.template.tensors(step.run(tensors)), written)
        return judged(entry, expected, produced, state, rerun)

    found = rehearsal.run(replay)
    if found is not None:
        raise RowsInteract(f"with {rows} rows, {found[0]}: {found[1]}")


def _exact_run(
    step: Step, entry: RecordedStep, rows: int, rehearsal: Rehearsal
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """An eager run at exact sizes: outputs, state written and random states, where all else is as it was recorded."""
    tensors, start = step.call.tensors, rehearsal.start
    output, watched = trace_again(step.run, tensors, rehearsal.first)
    state, random = rehearsal.first.written.copies(), start.random_states()
    changed = start.differences()
    if watched.written.tensors or changed:
        what = changed[0].path if changed else "tensors that it does not write at others"
        raise RowsInteract(f"with {rows} rows the step writes {what}")
    template, _ = step.template(output, tensors, entry.externals)
    differing = compare_templates(entry.template.structure, template.structure)
    if differing is not None or template.identities != entry.template.identities:
        what = differing.detail if differing else "other parts of the output are one object"
        raise RowsInteract(f"with {rows} rows {what}")
    if step.shares_memory(output, tensors, entry.externals):
        raise RowsInteract(f"with {rows} rows an output shares memory with another tensor")
    return [out.clone() for out in entry.template.tensors(output)], state, random
