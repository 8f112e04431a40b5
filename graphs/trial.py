"""The first call of a key: audit, warm-up, recording, verification, measurement.

Every run but the last is undone. The order of runs, each from the same state:

    A  watched, on the caller's stream: the call itself if nothing is recorded in the end
    B  watched, on the recording stream: the consecutive step that A is compared with
    C  watched, at the recorded size on stand-ins for the copied arguments: what the recording will read and write
    R  plain, likewise: warm-up of libraries, and the reference for the first replay
       the recording
    V  the first replay, compared with R
    P  with padding: an exact eager run with fewer rows, then replays with padded and with poisoned rows
"""

from __future__ import annotations

import copy
import dataclasses
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphs import verify
from graphs.audit import Trace, compare_traces, last_operation, watch_step
from graphs.contract.arguments import Call, replace_tensors
from graphs.contract.operators import storage_id
from graphs.contract.outputs import OutputTemplate, compare_templates, output_template
from graphs.contract.python_state import Difference, PythonState
from graphs.contract.slots import Contract, make_contract
from graphs.contract.static import StaticTensors
from graphs.contract.steering import Steering
from graphs.contract.tensor_state import RandomState, TensorState
from graphs.errors import (
    CaptureFailed,
    ChangingValue,
    Refusal,
    RowsInteract,
    UnsupportedArgument,
    UnsupportedOperator,
    VerifyMismatch,
)
from graphs.measure import CallTime, time_call
from graphs.record.step import Recorder, Recording

Tensor = torch.Tensor
aten = torch.ops.aten


class Deferred(Exception):
    """The call ran for real and initialised state; the next call with this key is tried again."""

    def __init__(self, output: Any, what: str, undo: Callable[[], None]) -> None:
        super().__init__(what)
        self.output, self.undo = output, undo


class Refused(Exception):
    """The call ran for real (``output``) and cannot be recorded (``refusals``). ``undo`` takes its effects back.

    ``undo`` is None where that is not possible: an iterator moved on.
    """

    def __init__(self, output: Any, refusals: Sequence[Refusal], undo: Callable[[], None] | None) -> None:
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

    def template(
        self, output: Any, tensors: Sequence[Tensor], externals: Sequence[Tensor]
    ) -> tuple[OutputTemplate, list[Tensor]]:
        """The output as a template and the tensors that a replay has to produce."""
        return output_template(output, tensors, self.call.opaques, externals)

    def produced(self, tensors: Sequence[Tensor], externals: Sequence[Tensor]) -> list[Tensor]:
        """Run at ``tensors`` and return the output tensors that a replay has to produce."""
        return self.template(self.run(tensors), tensors, externals)[1]

    def roots(self) -> list[tuple[str, Any]]:
        """Where Python state of the step can hang: the model and the opaque arguments."""
        model = getattr(self.model, "_orig_mod", self.model)  # a compiled module's own bookkeeping is not state
        model = getattr(model, "_torchdynamo_orig_callable", model)
        return [("self", model), *zip(self.opaque_names, self.call.opaques, strict=True)]

    def containers(self) -> list[tuple[str, Any]]:
        """Lists and dicts among the arguments, which a step may fill."""
        return [*_containers("argument", self.args), *_containers("argument", tuple(self.kwargs.values()))]


def _containers(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield path, value
        for key, item in value.items():
            yield from _containers(f"{path}[{key!r}]", item)
    elif isinstance(value, (tuple, list)):
        if isinstance(value, list):
            yield path, value
        for index, item in enumerate(value):
            yield from _containers(f"{path}[{index}]", item)


@dataclass
class Entry:
    """A recording with everything a replay needs.

    Attributes:
        python: the Python state that the recording froze.
        steering: the part of it that is compared with the present at every call.
        opaques: weak references to the opaque arguments it was recorded with.
        externals: tensors read in place that are not arguments.
        written: the tensors that the step writes in place.
        sentinels: padding rows that padded calls may write to.
        replays, real_rows: calls served and the rows they had.
        recheck_at: number of replays at which ``python`` is compared with the present again.
    """

    recording: Recording
    contract: Contract
    template: OutputTemplate
    statics: StaticTensors
    python: PythonState
    steering: Steering
    opaques: list[Callable[[], Any]]
    externals: list[Tensor]
    written: TensorState
    key: str
    device_free_delta: int = 0
    eager: CallTime | None = None
    replay: CallTime | None = None
    capture_seconds: float = 0.0
    replays: int = 0
    real_rows: int = 0
    recheck_at: int = 1

    @property
    def sentinels(self) -> list[int]:
        """Rows that padding may write to."""
        return [int(slot.padding.value) for slot in self.contract.slots if slot.padding.kind == "sentinel"]


class Checkpoint:
    """Python, random and tensor state at one moment; tensors as far as ``written`` covers them."""

    def __init__(self, step: Step, trace: Trace | None = None) -> None:
        self.python = PythonState(step.roots())
        self._arguments = PythonState.of_containers(step.containers())
        self._random = RandomState(step.device, {g: g.get_state() for g in trace.generators} if trace else None)
        self._written = trace.written if trace else None
        self._copies = trace.written.copies() if trace else None

    def covers(self, trace: Trace) -> None:
        """Take tensors and generators from ``trace``, which saved them before their first use."""
        self._written, self._copies = trace.written, None
        self._random.also(trace.generators)

    def differences(self) -> list[Difference]:
        """What Python state is not as it was."""
        return [*self._arguments.differences(), *self.python.differences()]

    def with_python_of(self, other: Checkpoint) -> Checkpoint:
        """This checkpoint with the Python state of another."""
        mixed = copy.copy(self)
        mixed.python, mixed._arguments = other.python, other._arguments
        return mixed

    def restore(self) -> None:
        """Put everything back."""
        if self._written is not None:
            self._written.restore(self._copies)
        self._random.restore()
        self._arguments.restore()
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
    origin.covers(trace)
    changed = origin.differences()
    lasting = next((change for change in changed if change.lasting), None)
    if lasting is not None:
        raise Refused(output, [*trace.findings, _changing(lasting)], None)
    if trace.findings:
        raise Refused(output, trace.findings, origin.restore)
    if not origin.python.complete:
        refusal = UnsupportedArgument("too much hangs on the model to be watched for changes", operator="self")
        raise Refused(output, [refusal], origin.restore)
    after = Checkpoint(step, trace)
    start = origin.with_python_of(after)  # what the step initialised stays; nothing else of it differs
    try:
        initialised = _compare_consecutive(step, recorder, start, trace, output, changed)
        if initialised:
            after.restore()
            raise Deferred(output, initialised, origin.restore)
        entry = _record(step, recorder, start, trace, output, owned=owned, check=check)
    except (RowsInteract, Deferred) as outcome:
        if isinstance(outcome, RowsInteract):
            start.restore()
        raise
    except Refusal as refusal:
        after.restore()
        raise Refused(output, [refusal], origin.restore) from refusal
    except Exception as error:  # whatever else a recording meets, the user gets the eager result and the reason
        after.restore()
        failure = CaptureFailed(f"recording raised {type(error).__name__}: {error}")
        raise Refused(output, [failure], origin.restore) from error
    start.restore()
    trace.written.release()
    entry.capture_seconds = time.perf_counter() - started
    return entry


def _changing(change: Difference, refusal: Refusal | None = None) -> ChangingValue:
    detail = f"{change.path} was {change.before}, then {change.after}; a replay would not change it"
    return ChangingValue(detail, operator=change.path, site=refusal.site if refusal is not None else None)


def _compare_consecutive(
    step: Step, recorder: Recorder, start: Checkpoint, first: Trace, output: Any, changed: list[Difference]
) -> str:
    """Run B: the next step from the same tensors, with Python state one step further.

    Returns what the step initialised in its first run, or an empty string.
    """
    second, changes, error, result = _again(step, recorder, start)
    refusal = compare_traces(first, second)
    if changes:
        raise _changing(changes[0], refusal)
    if error is not None:
        raise CaptureFailed(f"a second run of the step raised {type(error).__name__}: {error}") from error
    if changed:
        return changed[0].path
    if refusal is not None:
        third, changes, error, _ = _again(step, recorder, start)
        if error is None and not changes and compare_traces(second, third) is None:
            return f"a value computed once, at {refusal.site}"  # behind a cache that cannot be seen from here
        raise refusal
    externals, (tensors, opaques) = list(first.externals.values()), (step.call.tensors, step.call.opaques)
    templates = [output_template(value, tensors, opaques, externals)[0].structure for value in (output, result)]
    refusal = compare_templates(*templates)
    if refusal is not None:
        raise refusal
    return ""


def _again(step: Step, recorder: Recorder, start: Checkpoint) -> tuple[Trace, list[Difference], Exception | None, Any]:
    start.restore()
    trace, result, error = Trace(), None, None
    try:
        result, trace = recorder.run(lambda: watch_step(step.run, step.call.tensors))  # type: ignore[misc]
    except Exception as raised:  # the user's step may fail in its second run; the caller looks for the reason
        error = raised
    changes = start.differences()
    trace.written.restore()
    start.restore()
    return trace, changes, error, result


def _record(step: Step, recorder: Recorder, start: Checkpoint, trace: Trace, output: Any, *, owned: bool, check: bool) -> Entry:
    """C, R, the recording, V and P. Raises a `Refusal`; the caller restores the state."""
    tensors = step.call.tensors
    static = sorted({*step.static, *(i for i, t in enumerate(tensors) if storage_id(t) in trace.written)})
    contract = make_contract(step.names, tensors, static, step.padding, step.batch_dims, step.rows)
    stand_ins = contract.arrange([slot.fill(slot.allocate(), tensors[slot.index]) for slot in contract.slots], tensors)
    externals, template = _stand_in_run(step, recorder, start, trace, stand_ins, output)
    probe = _Probe(step, contract, start, trace, externals) if step.rows is not None else None
    start.restore()
    reference: list[Tensor] = _guarded(step, lambda: recorder.run(lambda: step.produced(stand_ins, externals)))
    state = trace.written.copies()
    dims = (None,) * len(reference) if probe is None else probe.output_dims(reference)
    contract = dataclasses.replace(contract, output_dims=dims)
    free = _free_memory(step.device)
    start.restore()
    recording = _recorded(step, recorder, contract, externals, start, trace, owned=owned)
    entry = Entry(
        recording,
        contract,
        template,
        StaticTensors([(i, step.names[i], tensors[i]) for i in static], externals, trace.written.tensors, start.python.owners),
        start.python,
        Steering(start.python.steering()),
        [reference_to(opaque) for opaque in step.call.opaques],
        externals,
        trace.written,
        ", ".join(f"{n}{list(t.shape)}" for n, t in zip(step.names, stand_ins, strict=True)) or "no tensor arguments",
        device_free_delta=free - _free_memory(step.device),
    )
    if check:
        start.restore()
        _verify_first_replay(entry, tensors, step.real, reference, state)
    if probe is not None:
        probe.prove(entry)
    entry.eager = time_call(lambda: step.run(stand_ins), step.device, before=start.restore)
    entry.replay = time_call(lambda: recording.replay(tensors, step.real), step.device, before=start.restore)
    return entry


def _stand_in_run(
    step: Step, recorder: Recorder, start: Checkpoint, first: Trace, stand_ins: list[Tensor], output: Any
) -> tuple[list[Tensor], OutputTemplate]:
    """Run C. Returns the tensors the recording reads in place, and the template of its output.

    Only here is an argument told apart from the step's own tensor that it happens to be, and a padded batch from the
    call's: the same operators must run, read and write the same.
    """
    start.restore()
    result, trace = _guarded(step, lambda: recorder.run(lambda: watch_step(lambda: step.run(stand_ins), stand_ins)))
    extra = [whole for whole in trace.written.tensors if storage_id(whole) not in first.written]
    trace.written.restore()
    start.restore()
    differing = RowsInteract if step.rows is not None else ChangingValue
    if extra:
        raise differing("a tensor is written only when the arguments are copies or padded")
    if [o.func for o in trace.operations] != [o.func for o in first.operations]:
        raise differing("other operators run when the arguments are copies or padded")
    scattered = any(not tensor.is_contiguous() for tensor in step.call.tensors)
    strided = next((o for o in trace.operations if o.func is aten.as_strided.default), None)
    if scattered and strided is not None:
        detail = "it may read an argument by its layout in memory, and the copies are contiguous"
        raise UnsupportedOperator(detail, operator=str(strided.func), site=strided.site)
    externals = list(trace.externals.values())
    template = step.template(result, stand_ins, externals)[0]
    exact = step.template(output, step.call.tensors, list(first.externals.values()))[0]
    refusal = compare_templates(exact.structure, template.structure, arguments=False)
    if refusal is not None:
        raise differing(refusal.detail)
    return externals, template


def _guarded(step: Step, run: Callable[[], Any]) -> Any:
    """``run()``; a step may well refuse a padded batch, and then it is recorded at its exact sizes."""
    try:
        return run()
    except Exception as error:
        text = f"raised {type(error).__name__}: {error}"
        if step.rows is None:
            raise CaptureFailed(f"a warm-up run of the step {text}") from error
        raise RowsInteract(f"a run with {step.rows} rows {text}") from error


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def reference_to(opaque: Any) -> Callable[[], Any]:
    """A weak reference where the object allows one, so that a recording does not keep a cache alive."""
    try:
        return weakref.ref(opaque)
    except TypeError:
        return lambda: opaque


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
        start.restore()
        try:
            self._expected = [out.clone() for out in step.produced(self._tensors, externals)]
        except Exception as error:  # for example a cache made for another batch size
            raise RowsInteract(f"a run with {self.rows} rows raised {type(error).__name__}: {error}") from error
        self._state = trace.written.copies()

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

    def prove(self, entry: Entry) -> None:
        """Replay with padding and with poison; raises `RowsInteract` unless the real rows and the state stay what they are."""
        if self.rows == self._bucket:
            return
        padded = self._replayed(entry, self._tensors, self.rows)
        state = entry.written.copies()
        self._compare(entry, self._expected, self._state, padded, "with padding")
        poisons = verify.poisons(entry.contract, self._tensors)
        if not poisons:
            raise RowsInteract("no padded row could be poisoned: this call's rows are all zeros or sentinels", unproved=True)
        for tensors in poisons:
            outputs = sliced(self._replayed(entry, tensors, self._bucket), entry.contract.output_dims, self.rows)
            if not verify.bitwise_equal(padded, outputs):
                again = self._replayed(entry, self._tensors, self.rows)
                if verify.bitwise_equal(padded, again):
                    raise RowsInteract("the content of padded rows reaches the real rows of an output")
                self._replayed(entry, tensors, self._bucket)  # the step is not deterministic: compare within tolerance
            self._compare(entry, padded, state, outputs, "with poisoned padding")

    def _compare(
        self, entry: Entry, expected: Sequence[Tensor], state: Sequence[Tensor], outputs: Sequence[Tensor], when: str
    ) -> None:
        found = verify.first_difference(expected, outputs)
        if found is not None:
            raise RowsInteract(f"{when}, the real rows of output {found[0]}: {found[1]}")
        found = verify.state_difference(state, entry.written.tensors, entry.sentinels)
        if found is not None:
            raise RowsInteract(f"{when}, the state written by the step, tensor {found[0]}: {found[1]}")

    def _replayed(self, entry: Entry, tensors: Sequence[Tensor], rows: int) -> list[Tensor]:
        self._start.restore()
        return [out.clone() for out in entry.recording.replay(tensors, rows)]


def compare_replay(step: Step, entry: Entry, rows: int) -> VerifyMismatch | None:
    """Run the call eagerly and as a replay from the same state, restore the state, and tell how they differ."""
    trace = Trace(written=entry.written)
    start = Checkpoint(step, trace)
    expected = [out.clone() for out in step.produced(step.call.tensors, entry.externals)]
    state = entry.written.copies()
    start.restore()
    try:
        produced = entry.recording.replay(step.call.tensors, rows)
        found, part = verify.first_difference(expected, produced), "output"
        if found is None:
            part = "state written by the step, tensor"
            found = verify.state_difference(state, entry.written.tensors, entry.sentinels)
        return VerifyMismatch(found[1], operator=f"{part} {found[0]}") if found is not None else None
    finally:
        start.restore()
