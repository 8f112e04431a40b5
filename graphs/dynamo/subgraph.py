"""Recording one compiled graph of Dynamo's, and replaying it.

What has to be static is known without asking: parameters, buffers and marked addresses by Dynamo, and what the graph
writes by one watched run of the graph as it was before it was compiled. All other inputs are copied at each call.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from graphs.contract.arguments import Call
from graphs.contract.eligibility import inadmissible
from graphs.contract.places import Places, Storage, lie_apart
from graphs.contract.slots import Contract, Slot
from graphs.errors import (
    CaptureFailed,
    HostConstant,
    MixedDevices,
    Refusal,
    UnsupportedArgument,
    UnsupportedOperator,
    UnsupportedOutput,
    VerifyMismatch,
)
from graphs.numerics import tolerance
from graphs.objects.torch_fast_paths import equal_addresses
from graphs.observation.operations import EagerTrace
from graphs.recording.recorder import CannotPoint, Recorder, Recording
from graphs.rehearsal.record_body import record_body
from graphs.rehearsal.rehearsal import Runs, States
from graphs.state.storage import storage_id
from graphs.state.tensor_form import form_of
from graphs.state.tensor_state import RandomState

if TYPE_CHECKING:
    from graphs.compile.compiled_graph import CompiledGraph

Tensor = torch.Tensor


@dataclass(frozen=True)
class _Made:
    """An output that a replay produces, by its position among those."""

    index: int


@dataclass(frozen=True)
class _View:
    """An output that is an input again, or a view of one.

    ``source`` is the position of the input, or a tensor of the graph's own.
    """

    source: int | Tensor
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int

    def of(self, inputs: Sequence[Any]) -> Tensor:
        """The view, of the inputs of this call."""
        base: Tensor = inputs[self.source] if isinstance(self.source, int) else self.source
        return base.as_strided(self.shape, self.strides, base.storage_offset() + self.offset)


class RecordedSubgraph:
    """A recording of a compiled graph, with where its static inputs have to be and how its outputs are put together.

    Attributes:
        written: positions of the inputs in whose memory the graph writes.
        replays: calls served.
        seconds: what recording took.
    """

    def __init__(self, recording: Recording, first: _FirstCall, static: Sequence[int], outputs: list[Any]) -> None:
        inputs = first.inputs
        self.recording, self.written = recording, first.written
        self.replays, self.seconds = 0, 0.0
        self._static = list(static)
        self._outputs = outputs
        self._as_produced = outputs == [_Made(index) for index in range(len(outputs))]
        self._copied = [i for i, v in enumerate(inputs) if isinstance(v, Tensor) and i not in static] if self.written else []
        self._forms = [form_of(inputs[index]) for index in static]
        self._proven: set[int] = set()
        storages = self._settle(inputs)
        self._recorded = [(storage.data_ptr(), storage.nbytes()) for storage in storages]
        recording.settle(storages)

    def _settle(self, inputs: Sequence[Any]) -> list[Storage]:
        """Expect the static inputs where they are now; returns their storages."""
        places = Places(inputs[index] for index in self._static)
        self._numbers = [places.number(inputs[index]) for index in self._static]
        self._static_addresses = [inputs[index].data_ptr() for index in self._static]
        known = dict(zip(self._static, self._static_addresses, strict=True))
        self._addresses = [known.get(index) for index in range(len(inputs))]
        self._memory = frozenset(storage_id(inputs[index]) for index in self.written)
        self._objects = [weakref.ref(inputs[index]) for index in self._static]
        return places.storages

    def fits(self, inputs: Sequence[Any]) -> bool:
        """Whether everything that is read in place is where it was, and no other input lies in the memory that is written."""
        if self._copied and not self._memory.isdisjoint([storage_id(inputs[index]) for index in self._copied]):
            return False
        if equal_addresses is not None:
            return bool(equal_addresses(list(inputs), self._addresses, self._static))
        return list(map(Tensor.data_ptr, map(inputs.__getitem__, self._static))) == self._static_addresses

    def moved(self, inputs: Sequence[Any]) -> list[int]:
        """Positions of the static inputs that are not where they were."""
        return [index for index in self._static if inputs[index].data_ptr() != self._addresses[index]]

    def is_of_another(self, inputs: Sequence[Any]) -> bool:
        """Whether inputs that the graph only reads moved, and what they were lives on: weights of another model."""
        moved = {*self.moved(inputs)} - {*self.written}
        before = [reference() for index, reference in zip(self._static, self._objects, strict=True) if index in moved]
        now = [inputs[index] for index in sorted(moved)]
        return any(old is not None and old is not new for old, new in zip(before, now, strict=True))

    def point(self, graph: CompiledGraph, inputs: Sequence[Any]) -> None:
        """Have the recording use the static inputs of a call, which moved.

        The first time that an input moves, a replay is compared with the compiled function, and both are undone.

        Raises:
            CannotPoint: more than addresses changed, or the recording does not let itself be pointed. It is not usable then.
        """
        moved, numbers = {*self.moved(inputs)}, self._numbers
        if [form_of(inputs[index]) for index in self._static] != self._forms:
            raise CannotPoint("a static input has another form than when it was recorded")
        storages = self._settle(inputs)
        if self._numbers != numbers or not lie_apart(storages):
            raise CannotPoint("other static inputs share memory than when it was recorded")
        self.recording.point(self._recorded, storages)
        if not moved <= self._proven:
            try:
                found = self._difference(graph, inputs)
            except Refusal as refusal:
                raise CannotPoint(refusal.detail) from refusal
            if found is not None:
                raise CannotPoint(f"{found[1]} once it is pointed at the inputs of this call ({found[0]})")
            self._proven |= moved

    def _difference(self, graph: CompiledGraph, inputs: Sequence[Any]) -> tuple[str, str] | None:
        """How a replay differs from the compiled function; nothing is left of either."""
        first = _FirstCall(graph, inputs)
        runs, written = first.runs, first.trace.written
        outputs, state = runs.run(lambda: (graph(*inputs), written.copies()))
        reference = [value for value, out in zip(outputs, self._outputs, strict=True) if isinstance(out, _Made)]
        return runs.run(lambda: tolerance.run_difference(reference, self.recording.replay(inputs, 1), state, written.left()))

    def replay(self, inputs: Sequence[Any]) -> list[Any]:
        """Run the recording and return the outputs of the graph."""
        produced = self.recording.replay(inputs, 1)
        return produced if self._as_produced else self.filled(produced, inputs)

    def filled(self, produced: Sequence[Tensor], inputs: Sequence[Any]) -> list[Any]:
        """The outputs of the graph, of which ``produced`` are new."""
        return [
            produced[out.index] if isinstance(out, _Made) else out.of(inputs) if isinstance(out, _View) else out
            for out in self._outputs
        ]


def record_subgraph(
    graph: CompiledGraph,
    inputs: Sequence[Any],
    recorder: Recorder,
    copied: Collection[int],
    *,
    owned: bool,
    check: bool,
) -> tuple[RecordedSubgraph, list[Any]]:
    """Record ``graph`` and run the call as the first replay.

    Args:
        inputs: of this call: tensors, and ints for symbolic sizes.
        copied: positions to copy although Dynamo calls them static: they have moved before.

    Returns:
        The recording, and the outputs of this call.

    Raises:
        Refusal: the graph cannot be recorded. Nothing has run, as far as tensors and generators show.
    """
    started = time.perf_counter()
    first = _FirstCall(graph, inputs)
    memory = {storage_id(inputs[index]) for index in first.written}
    within = {i for i, value in enumerate(inputs) if isinstance(value, Tensor) and storage_id(value) in memory}
    static = sorted(({*graph.static} - {*copied}) | within)
    try:
        subgraph, made = _record(first, static, recorder, owned=owned, check=check)
    except Refusal:
        first.runs.undo()
        raise
    except Exception as error:  # whatever a recording meets, the compiled function still runs
        first.runs.undo()
        raise CaptureFailed(f"recording raised {type(error).__name__}: {error}", operator=graph.name) from error
    first.trace.written.release()
    subgraph.seconds = time.perf_counter() - started
    return subgraph, subgraph.filled(made, inputs)


class _FirstCall:
    """The watched run of a graph, undone: what it writes, and how to take back what later runs do."""

    def __init__(self, graph: CompiledGraph, inputs: Sequence[Any]) -> None:
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        refusal = inadmissible(Call(tensors, [], ()))
        if refusal is not None:
            raise refusal
        if any(tensor.is_conj() or tensor.is_neg() for tensor in tensors):
            raise UnsupportedArgument("an input is to be read conjugated or negated", operator=graph.name)
        if any(tensor.device != graph.device for tensor in tensors):
            raise MixedDevices(f"inputs are not on {graph.device}, where the graph runs", operator=graph.name)
        self.graph, self.inputs = graph, inputs
        self.trace = EagerTrace()
        self.runs = Runs(States(self.trace.written, RandomState(graph.device)), self.trace)
        aliases = [value.detach() if isinstance(value, Tensor) else value for value in inputs]  # for operators like t_()
        given = [value for i, value in enumerate(aliases) if isinstance(value, Tensor) and i not in graph.static]
        try:
            self.written = graph.watch(aliases, given, self.trace)
        except Exception as error:
            raise CaptureFailed(f"an eager run raised {type(error).__name__}: {error}", operator=graph.name) from error
        reshaped = any(isinstance(a, Tensor) and a.stride() != b.stride() for a, b in zip(aliases, inputs, strict=True))
        findings = [found for found in self.trace.findings if not isinstance(found, HostConstant)]  # the passes hoist those
        if reshaped:
            findings.append(UnsupportedOperator("it changes the shape or strides of an input", operator=graph.name))
        if findings:
            raise findings[0]


def _record(
    first: _FirstCall, static: Sequence[int], recorder: Recorder, *, owned: bool, check: bool
) -> tuple[RecordedSubgraph, list[Tensor]]:
    """Warm up, record, replay and verify; returns what the first replay produced, its effects in place."""
    graph, inputs, trace, runs = first.graph, first.inputs, first.trace, first.runs
    # first on the caller's stream: what kernels allocate to tune themselves stays out of the pool
    reference, state = runs.run(lambda: (graph(*inputs), trace.written.copies()))
    outputs, positions = _describe(reference, inputs, graph)
    runs.run(lambda: recorder.run(lambda: graph(*inputs)))
    slots = [
        Slot(graph.names[i], i, tuple(value.shape), value.dtype, value.device)
        for i, value in enumerate(inputs)
        if isinstance(value, Tensor) and i not in static
    ]
    contract = Contract(tuple(slots), tuple(static), None, (None,) * len(positions))

    def body(arranged: Sequence[Any]) -> list[Tensor]:
        values = list(arranged)
        for slot in slots:
            values[slot.index] = _strided_like(inputs[slot.index], arranged[slot.index])
        made = graph(*values)
        return [made[position] for position in positions]

    recording = record_body(body, recorder, contract, inputs, runs, owned=owned)
    subgraph = RecordedSubgraph(recording, first, static, outputs)
    runs.reset()
    made = recording.replay(inputs, 1)  # the call
    if check:
        found = tolerance.run_difference([reference[p] for p in positions], made, state, trace.written.left())
        if found is not None:
            raise VerifyMismatch(found[1].replace("eager", "the compiled graph"), operator=found[0])
    return subgraph, made


def _describe(reference: Sequence[Any], inputs: Sequence[Any], graph: CompiledGraph) -> tuple[list[Any], list[int]]:
    """How each output is put together, and the positions of those that a replay produces.

    Raises:
        UnsupportedOutput: an output is on another device, no plain tensor, or a view of one of several inputs.
    """
    outputs: list[Any] = []
    positions: list[int] = []
    sources = graph.view_sources()
    for position, value in enumerate(reference):
        if not isinstance(value, Tensor):
            outputs.append(value)
            continue
        if value.device != graph.device or type(value) is not Tensor:
            kind = f"a {type(value).__name__} on {value.device}"
            raise UnsupportedOutput(f"output {position} of the graph is {kind}", operator=graph.name)
        if value.is_conj() or value.is_neg():
            raise UnsupportedOutput(f"output {position} of the graph is to be read conjugated or negated", operator=graph.name)
        view: _View | _Made | None = _view_of(value, sources[position], inputs, graph)
        if view is None:
            view = _Made(len(positions))
            positions.append(position)
        outputs.append(view)
    return outputs, positions


def _view_of(value: Tensor, sources: Collection[int | Tensor], inputs: Sequence[Any], graph: CompiledGraph) -> _View | None:
    """What an output is a view of, by its ``sources`` in the graph; None where it is memory that the graph allocates."""
    candidates: list[tuple[int | Tensor, Any]] = [*enumerate(inputs), *((tensor, tensor) for tensor in graph.owned)]
    sharing = [(source, base) for source, base in candidates if isinstance(base, Tensor) and _share(base, value)]
    if not sharing:
        return None
    if len(sharing) > 1:  # in this call: in the next one they may lie otherwise
        sharing = [(source, base) for source, base in sharing if source in sources]
    if len(sharing) != 1:
        raise UnsupportedOutput("an output is a view of one of several inputs that share memory", operator=graph.name)
    source, base = sharing[0]
    if base.dtype != value.dtype:
        raise UnsupportedOutput(f"an output is an input seen as {value.dtype}", operator="view")
    return _View(source, value.shape, value.stride(), int(value.storage_offset() - base.storage_offset()))


def _share(base: Tensor, value: Tensor) -> bool:
    return bool(value.numel()) and storage_id(base) == storage_id(value)


def _strided_like(like: Tensor, dense: Tensor) -> Tensor:
    """``dense`` in the strides that the compiled graph was promised; itself where those are dense as well."""
    if like.is_contiguous():
        return dense
    for dim, stride in enumerate(like.stride()):
        if stride == 0 and like.shape[dim] > 1:
            dense = dense.narrow(dim, 0, 1)
    strided = torch.empty_strided(dense.shape, like.stride(), dtype=dense.dtype, device=dense.device)
    return strided.copy_(dense).expand(like.shape)
