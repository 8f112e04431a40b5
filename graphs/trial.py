"""The first call of a key: audit, warm-up, recording, verification, measurement.

Every run but the last is undone. The order of runs, each from the same state:

    A  watched, on the caller's stream: the call itself if nothing is recorded in the end
    B  watched, on the recording stream: the consecutive step that A is compared with
    R  plain, at the recorded size: warm-up of libraries, and the reference for the first replay
       the recording
    V  the first replay, compared with R
    P  with padding: an exact eager run, then replays with padded and with poisoned rows
"""

from __future__ import annotations

import copy
import dataclasses
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphs import verify
from graphs.audit import Trace, compare_traces, last_operation, watch_step
from graphs.contract.arguments import Call, replace_tensors
from graphs.contract.operators import storage_id
from graphs.contract.outputs import OutputTemplate, compare_templates, output_template
from graphs.contract.slots import Contract, make_contract
from graphs.contract.state import PythonState, RandomState, TensorState
from graphs.contract.static import StaticTensors
from graphs.errors import CaptureFailed, ChangingValue, Refusal, RowsInteract, UnsupportedOperator, VerifyMismatch
from graphs.measure import CallTime, time_call
from graphs.record.step import Recorder, Recording

Tensor = torch.Tensor


class Deferred(Exception):
    """The call ran for real and initialised state; the next call with this key is tried again."""

    def __init__(self, output: Any, what: str) -> None:
        super().__init__(what)
        self.output = output


class Refused(Exception):
    """The call ran for real (``output``) and cannot be recorded (``refusals``). ``undo`` takes its effects back."""

    def __init__(self, output: Any, refusals: Sequence[Refusal], undo: Callable[[], None]) -> None:
        super().__init__(str(refusals[0]))
        self.output, self.refusals, self.undo = output, list(refusals), undo


@dataclass
class Step:
    """What a trial needs to know of the captured module and of one call.

    Attributes:
        model: the module or callable.
        call, args, kwargs: the call, flattened and as given.
        names, opaque_names: names of the tensor leaves and of the opaque leaves.
        static: positions of tensor arguments declared static.
        batch_dims: batch dimension of each tensor leaf; used when ``rows`` is not None.
        rows: bucket to record at, or None for exact sizes.
        real: rows of this call.
    """

    model: Callable[..., Any]
    call: Call
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: list[str]
    opaque_names: list[str]
    static: tuple[int, ...]
    padding: dict[str, Any]
    device: torch.device
    batch_dims: tuple[int | None, ...] = ()
    rows: int | None = None
    real: int = 1

    def run(self, tensors: Sequence[Tensor] | None = None) -> Any:
        """Call the model eagerly, with its tensor leaves replaced by ``tensors``."""
        with torch.no_grad():
            if tensors is None:
                return self.model(*self.args, **self.kwargs)
            args, kwargs = replace_tensors((self.args, self.kwargs), iter(tensors))
            return self.model(*args, **kwargs)

    def produced(self, tensors: Sequence[Tensor], externals: Sequence[Tensor]) -> list[Tensor]:
        """Run at ``tensors`` and return the output tensors that a replay has to produce."""
        return output_template(self.run(tensors), tensors, self.call.opaques, externals)[1]

    def roots(self) -> dict[str, Any]:
        """Where Python state of the step can hang: the model and the opaque arguments."""
        model = getattr(self.model, "_orig_mod", self.model)  # a compiled module's own bookkeeping is not state
        model = getattr(model, "_torchdynamo_orig_callable", model)
        return {"self": model, **dict(zip(self.opaque_names, self.call.opaques, strict=True))}


@dataclass
class Entry:
    """A recording with everything a replay needs.

    Attributes:
        python: the Python state that the recording froze.
        opaques: weak references to the opaque arguments it was recorded with.
        written: the tensors that the step writes in place.
        replays, real_rows: calls served and the rows they had.
        recheck_at: number of replays at which ``python`` is compared with the present again.
    """

    recording: Recording
    contract: Contract
    template: OutputTemplate
    statics: StaticTensors
    python: PythonState
    opaques: list[Callable[[], Any]]
    written: TensorState
    key: str
    device_free_delta: int = 0
    eager: CallTime | None = None
    replay: CallTime | None = None
    capture_seconds: float = 0.0
    replays: int = 0
    real_rows: int = 0
    recheck_at: int = 1


class Checkpoint:
    """Python, random and tensor state at one moment; tensors as far as ``written`` covers them."""

    def __init__(self, step: Step, written: TensorState | None = None) -> None:
        self.python = PythonState(step.roots())
        self._random = RandomState(step.device)
        self._written = written
        self._copies = written.copies() if written is not None else None

    def covers(self, written: TensorState) -> None:
        """Take the tensors from ``written``, which saved them before their first write."""
        self._written, self._copies = written, None

    def with_python(self, python: PythonState) -> Checkpoint:
        """This checkpoint with other Python state."""
        other = copy.copy(self)
        other.python = python
        return other

    def restore(self) -> None:
        """Put everything back."""
        if self._written is not None:
            self._written.restore(self._copies)
        self._random.restore()
        self.python.restore()


def run_trial(step: Step, recorder: Recorder, *, owned: bool, check: bool) -> Entry:
    """Record one key. On return the state is the one before the call: the caller replays.

    Raises:
        Deferred: the step initialised itself; it ran once, for real.
        Refused: the step cannot be recorded; it ran once, for real.
        RowsInteract: it cannot be recorded at ``step.rows`` rows; nothing ran, as far as state shows.
    """
    started = time.perf_counter()
    origin = Checkpoint(step)
    output, trace = watch_step(step.run, step.call.tensors)
    origin.covers(trace.written)
    if trace.findings:
        raise Refused(output, trace.findings, origin.restore)
    initialised = origin.python.differences()
    after = Checkpoint(step, trace.written)
    start = origin.with_python(after.python)  # what the step initialised stays; nothing else of it differs
    try:
        _compare_consecutive(step, recorder, start, trace, output, bool(initialised))
        if initialised:
            after.restore()
            raise Deferred(output, initialised[0].path)
        entry = _record(step, recorder, start, trace, output, owned=owned, check=check)
    except RowsInteract:
        start.restore()
        raise
    except Refusal as refusal:
        after.restore()
        raise Refused(output, [refusal], origin.restore) from refusal
    start.restore()
    trace.written.release()
    entry.capture_seconds = time.perf_counter() - started
    return entry


def _compare_consecutive(step: Step, recorder: Recorder, start: Checkpoint, first: Trace, output: Any, initialised: bool) -> None:
    """Run B: the next step from the same tensors, with Python state one step further."""
    start.restore()
    trace, second, error = Trace(), None, None
    try:
        second, trace = recorder.run(lambda: watch_step(step.run, step.call.tensors))  # type: ignore[misc]
    except Exception as raised:  # the user's step may fail in its second run; the reason is looked for below
        error = raised
    changes = start.python.differences()
    trace.written.restore()
    start.restore()
    if changes:
        change = changes[0]
        refusal = compare_traces(first, trace) if error is None else None
        raise ChangingValue(
            f"{change.path} was {change.before}, then {change.after}; a replay would not change it",
            operator=change.path,
            site=refusal.site if refusal is not None else None,
        )
    if error is not None:
        raise CaptureFailed(f"a second run of the step raised {type(error).__name__}: {error}") from error
    if initialised:
        return
    refusal = compare_traces(first, trace) or compare_templates(
        output_template(output, step.call.tensors, step.call.opaques, list(first.externals.values()))[0].structure,
        output_template(second, step.call.tensors, step.call.opaques, list(first.externals.values()))[0].structure,
    )
    if refusal is not None:
        raise refusal


def _record(step: Step, recorder: Recorder, start: Checkpoint, trace: Trace, output: Any, *, owned: bool, check: bool) -> Entry:
    """R, the recording, V and P. Raises a `Refusal`; the caller restores the state."""
    tensors, externals = step.call.tensors, list(trace.externals.values())
    written = {storage_id(whole) for whole in trace.written.tensors}
    static = sorted({*step.static, *(i for i, t in enumerate(tensors) if storage_id(t) in written)})
    contract = make_contract(step.names, tensors, static, step.padding, step.batch_dims, step.rows)
    template, exact = output_template(output, tensors, step.call.opaques, externals)
    padded = contract.arrange([slot.fill(slot.allocate(), tensors[slot.index]) for slot in contract.slots], tensors)
    probe = _Probe(step, contract, start, trace, externals) if step.rows is not None else None
    start.restore()
    reference: list[Tensor] = _reference(step, recorder, padded, externals)
    state = trace.written.copies()
    dims = (None,) * len(exact) if probe is None else probe.output_dims(reference)
    contract = dataclasses.replace(contract, output_dims=dims)
    free = _free_memory(step.device)
    start.restore()
    recording = _recorded(step, recorder, contract, externals, start, trace, owned=owned)
    entry = Entry(
        recording,
        contract,
        template,
        StaticTensors([(i, step.names[i], tensors[i]) for i in static], externals, start.python.owners),
        start.python,
        [_reference_to(opaque) for opaque in step.call.opaques],
        trace.written,
        ", ".join(f"{n}{list(t.shape)}" for n, t in zip(step.names, padded, strict=True)) or "no tensor arguments",
        device_free_delta=free - _free_memory(step.device),
    )
    if check:
        start.restore()
        _verify_first_replay(entry, tensors, step.real, reference, state)
    if probe is not None:
        probe.prove(entry)
    entry.eager = time_call(lambda: step.run(padded), step.device, before=start.restore)
    entry.replay = time_call(lambda: recording.replay(tensors, step.real), step.device, before=start.restore)
    return entry


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def _reference_to(opaque: Any) -> Callable[[], Any]:
    """A weak reference where the object allows one, so that a recording does not keep a cache alive."""
    try:
        return weakref.ref(opaque)
    except TypeError:
        return lambda: opaque


def _reference(step: Step, recorder: Recorder, padded: list[Tensor], externals: list[Tensor]) -> list[Tensor]:
    try:
        result: Any = recorder.run(lambda: step.produced(padded, externals))
    except Exception as error:  # a step may well refuse a padded batch: then it is recorded at its exact sizes
        text = f"raised {type(error).__name__}: {error}"
        if step.rows is None:
            raise CaptureFailed(f"a warm-up run of the step {text}") from error
        raise RowsInteract(f"a run with {step.rows} rows {text}") from error
    return list(result)


def _recorded(
    step: Step,
    recorder: Recorder,
    contract: Contract,
    externals: list[Tensor],
    start: Checkpoint,
    trace: Trace,
    *,
    owned: bool,
) -> Recording:
    """The recording; when the device refuses, the operator at fault is found by recording once more, watched."""

    def body(tensors: Sequence[Tensor]) -> list[Tensor]:
        return step.produced(tensors, externals)

    for operation in trace.operations:
        why = recorder.refuses(str(operation.func))
        if why is not None:
            raise UnsupportedOperator(why, operator=str(operation.func), site=operation.site)
    generators = tuple(trace.generators)
    try:
        return recorder.record(body, contract, step.call.tensors, owned=owned, generators=generators)
    except CaptureFailed as failure:
        start.restore()
        watched, last = last_operation(body)
        try:
            recorder.record(watched, contract, step.call.tensors, owned=owned, generators=generators)
        except CaptureFailed:
            raise CaptureFailed(failure.detail, operator=last.operator, site=last.site) from failure
        raise
    finally:
        start.restore()


def _verify_first_replay(
    entry: Entry, tensors: Sequence[Tensor], rows: int, reference: Sequence[Tensor], state: Sequence[Tensor]
) -> None:
    produced = entry.recording.replay(tensors, rows)
    found = verify.first_difference(sliced(reference, entry.contract.output_dims, rows), produced)
    if found is not None:
        raise VerifyMismatch(found[1], operator=f"output {found[0]}")
    found = verify.first_difference(state, entry.written.tensors)
    if found is not None:
        raise VerifyMismatch(found[1], operator=f"state written by the step, tensor {found[0]}")


def sliced(tensors: Sequence[Tensor], dims: Sequence[int | None], rows: int) -> list[Tensor]:
    """Outputs at recorded size cut to their real rows."""
    return [t if dim is None else t.narrow(dim, 0, rows) for t, dim in zip(tensors, dims, strict=True)]


class _Probe:
    """P: the same step with at least one row fewer than the bucket, run eagerly at its exact size.

    It tells which output dimensions are the batch, and what the real rows have to be whatever the padding holds.
    """

    def __init__(self, step: Step, contract: Contract, start: Checkpoint, trace: Trace, externals: list[Tensor]) -> None:
        assert step.rows is not None
        self.rows, self._bucket, self._start = min(step.real, max(step.rows - 1, 1)), step.rows, start
        self._tensors = sliced(step.call.tensors, step.batch_dims, self.rows)
        self._sentinels = [int(s.padding.value) for s in contract.slots if s.padding.kind == "sentinel"]
        start.restore()
        try:
            self._expected = [out.clone() for out in step.produced(self._tensors, externals)]
        except Exception as error:  # for example a cache made for another batch size
            raise RowsInteract(f"a run with {self.rows} rows raised {type(error).__name__}: {error}") from error
        self._state = trace.written.copies()

    def output_dims(self, padded: Sequence[Tensor]) -> tuple[int | None, ...]:
        """The batch dimension of each output: this many rows here, and the bucket's when padded."""
        dims: list[int | None] = []
        for a, b in zip(self._expected, padded, strict=True):
            changed = [d for d, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if m != n]
            if len(changed) > 1 or any((a.shape[d], b.shape[d]) != (self.rows, self._bucket) for d in changed):
                raise RowsInteract(f"an output of shape {tuple(a.shape)} becomes {tuple(b.shape)} at {self._bucket} rows")
            dims.append(changed[0] if changed else None)
        return tuple(dims)

    def prove(self, entry: Entry) -> None:
        """Replay with padding and with poison; raises `RowsInteract` unless the real rows stay what they are."""
        if self.rows == self._bucket:
            return
        padded = self._replayed(entry, self._tensors, self.rows)
        found = verify.first_difference(self._expected, padded)
        if found is not None:
            raise RowsInteract(f"with padding the real rows of output {found[0]}: {found[1]}")
        found = verify.state_difference(self._state, entry.written.tensors, self._sentinels)
        if found is not None:
            raise RowsInteract(f"with padding the state written by the step, tensor {found[0]}: {found[1]}")
        tensors, changed = verify.poisoned(entry.contract, self._tensors)
        if not changed:
            raise RowsInteract("no padded row could be poisoned: this call's rows are all zeros or sentinels", unproved=True)
        poisoned = self._cut(self._replayed(entry, tensors, self._bucket), entry)
        if not verify.bitwise_equal(padded, poisoned):
            again = self._replayed(entry, self._tensors, self.rows)
            found = verify.first_difference(padded, poisoned)
            if verify.bitwise_equal(padded, again) or found is not None:
                where = f"output {found[0]}" if found is not None else "an output"
                raise RowsInteract(f"the content of padded rows reaches the real rows of {where}")

    def _replayed(self, entry: Entry, tensors: Sequence[Tensor], rows: int) -> list[Tensor]:
        self._start.restore()
        return [out.clone() for out in entry.recording.replay(tensors, rows)]

    def _cut(self, outputs: Sequence[Tensor], entry: Entry) -> list[Tensor]:
        return sliced(outputs, entry.contract.output_dims, self.rows)


def compare_replay(step: Step, entry: Entry, rows: int) -> VerifyMismatch | None:
    """Run the call eagerly and as a replay from the same state, restore the state, and tell how they differ."""
    start = Checkpoint(step, entry.written)
    expected = [out.clone() for out in output_template(step.run(), step.call.tensors, step.call.opaques)[1]]
    state = entry.written.copies()
    start.restore()
    try:
        produced = entry.recording.replay(step.call.tensors, rows)
        found, part = verify.first_difference(expected, produced), "output"
        if found is None:
            found, part = verify.first_difference(state, entry.written.tensors), "state written by the step, tensor"
        return VerifyMismatch(found[1], operator=f"{part} {found[0]}") if found is not None else None
    finally:
        start.restore()
