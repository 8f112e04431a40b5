"""``torch.compile(model, backend="graphs")``: what Dynamo traces is compiled, recorded and replayed.

The entry point ``graphs`` of the group ``torch_dynamo_backends`` leads here, so nothing has to be imported for it. Each
graph of Dynamo's becomes a `Subgraph`; a graph break ends one and begins another. Dynamo's guards have checked structure,
shapes, strides, dtypes and devices before a subgraph is called, so what a call adds is one comparison of addresses and one
graph launch; where the graph writes, also a look that no copied input lies in that memory.
"""

from __future__ import annotations

import itertools
import re
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

import passes
from graphs.compile.torch_dynamo import private
from graphs.config import BackendOptions
from graphs.dispatch.call_log import CallLog
from graphs.dynamo.subgraph import RecordedSubgraph, record_subgraph
from graphs.eager_mode import forced_by, forced_eager
from graphs.errors import (
    AutogradInput,
    ConfigError,
    MovedStaticTensor,
    NestedCapture,
    Refusal,
    Site,
    TooManyKeys,
    UnsupportedArgument,
)
from graphs.events import Recorded, emit
from graphs.events.listeners import listeners
from graphs.events.ranges import attended_replay, recording_range
from graphs.objects.torch_fast_paths import is_capturing, profiler
from graphs.recording.choose import recorder_for
from graphs.recording.recorder import CannotPoint, Recorder, first_call_lock
from graphs.report import BackendReport, PieceReport
from graphs.state.storage import storage_id
from passes.forked_process import forkable_lock

if TYPE_CHECKING:
    from graphs.compile.compiled_graph import CompiledGraph

Tensor = torch.Tensor
_overlapping = private("compute_overlapping_tensors")
_MODES = (None, "default", "reduce-overhead")
_MOVES = 2  # times that a graph is recorded anew for an input before this is copied, or, if it is written, it runs unrecorded
_OVERLAP = "the graph writes in an input that overlaps with another, or inputs overlap otherwise than when it was compiled"
_count = itertools.count()


def graphs_backend(
    module: torch.fx.GraphModule, inputs: list[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Subgraph:
    """Compile one graph of Dynamo's and return what replays it. Called by ``torch.compile``, not by users.

    Args:
        mode: ``"reduce-overhead"`` changes nothing: every graph is recorded.
        options: of ``torch.compile(..., options={...})``: ``compiler`` (``"inductor"``, the default, or ``"aten"``),
            ``outputs``, ``verify``, ``strict``, ``max_recordings`` and ``compiler_options`` as for `graphs.capture`, and
            ``routes``, a routing table for `passes.routing`.

    Raises:
        ConfigError: an unknown option, one with a value that is not legal, or a ``mode`` that asks Inductor for more.
    """
    from graphs.compile.compiled_graph import compile_graph, device_of, needs_gradients

    if mode not in _MODES:
        legal = "left out or 'reduce-overhead', which is what this backend does: options={...} says the rest"
        raise ConfigError("mode", mode, legal)
    settings = BackendOptions.resolve(options)
    ending = _Ending.of(getattr(module, "compile_subgraph_reason", None))
    routed = _route(module, inputs, settings.routes) if settings.routes is not None else _Routed()
    pipeline = passes.DEFAULT
    if settings.compiler == "inductor":
        pipeline += settings.compiler_options.pipeline(device_of(module, inputs))
    if needs_gradients(module, inputs):
        pipeline = ()
    graph = compile_graph(module, inputs, settings.compiler, pipeline, settings.compiler_options.inductor)
    graph.changes[:0] = routed.changes
    return Subgraph(graph, settings, ending, routed)


def backend_report() -> BackendReport:
    """What the graphs compiled with ``backend="graphs"`` did in this process, in the order they were compiled.

    Those that ``torch.compiler.reset()`` or the end of their model dropped are not in it.
    """
    return BackendReport(tuple(subgraph.report() for subgraph in sorted(_pieces, key=lambda subgraph: subgraph.index)))


class Subgraph:
    """One graph of Dynamo's: a compiled function, and a recording of it for each value of its symbolic sizes.

    Attributes:
        index: order of compilation in this process.
    """

    def __init__(self, graph: CompiledGraph, options: BackendOptions, ending: _Ending, routed: _Routed) -> None:
        self.index, self.__name__ = next(_count), graph.name
        self._graph, self._options, self._ending, self._routed = graph, options, ending, routed
        self._place = _Place.of(graph.device)
        self._lock = self._place.lock
        self._on_device = graph.device.type == "cuda"
        self._varying = [i for i in range(len(graph.names)) if i not in graph.static] if graph.sizes else []
        self._recorded: dict[tuple[Any, ...], list[RecordedSubgraph]] = {}
        self._refused: dict[tuple[Any, ...], Refusal] = {}
        self._moves: Counter[int] = Counter()
        self._pointed = 0
        self._overlaps: tuple[tuple[int, int, int], ...] | None = None
        self._dropped = 0
        self._ledger = CallLog(graph.name)
        _pieces.add(self)

    def __call__(self, *inputs: Any) -> Any:
        """Replay the call; else record it, or run the compiled function and count why."""
        if self._routed.weights:
            self._routed.check(inputs)
        known = self._recorded.get(self._key(inputs))
        if known is not None and not forced_by() and not (self._on_device and is_capturing()):
            with self._lock:
                for recorded in known:
                    if recorded.fits(inputs):
                        return self._replayed(recorded, inputs)
        with self._ledger.warning_after():
            return self._not_replayed(inputs)

    def _replayed(self, recorded: RecordedSubgraph, inputs: Sequence[Any]) -> Any:
        """Replay; the lock is held."""
        if not listeners.at_replays and not profiler._is_profiler_enabled:
            recorded.replays += 1
            return recorded.replay(inputs)
        with self._attended(recorded, inputs):
            recorded.replays += 1
            return recorded.replay(inputs)

    def _attended(self, recorded: RecordedSubgraph, inputs: Sequence[Any]) -> AbstractContextManager[None]:
        """The lock, with a range in the traces that are being made, and an event for those who are told of replays."""
        return attended_replay(self._lock, recorded, None, step=self._graph.name, key=self._sizes(inputs), rows=None, real_rows=1)

    def _sizes(self, inputs: Sequence[Any]) -> str:
        """The inputs whose sizes Dynamo keeps symbolic, as text."""
        named = [(self._graph.names[i], inputs[i]) for i in self._varying]
        return ", ".join(f"{name}{list(x.shape)}" if isinstance(x, Tensor) else f"{name}={x}" for name, x in named)

    def _key(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """What a recording is found by: Dynamo has guarded everything but the sizes that it keeps symbolic."""
        if not self._varying:
            return ()
        return tuple(value.shape if isinstance(value, Tensor) else value for value in map(inputs.__getitem__, self._varying))

    def _not_replayed(self, inputs: Sequence[Any]) -> Any:
        if self._graph.writes and self._is_unsafe(inputs):
            return self._run(inputs, UnsupportedArgument(_OVERLAP, operator=self._graph.name), self._graph.as_traced)
        if forced_by():
            self._ledger.eager_calls += 1
            return self._graph(*inputs)
        if self._graph.training:
            return self._run(inputs, AutogradInput("the graph was compiled to record gradients", operator=self._graph.name))
        if self._on_device and is_capturing():
            return self._run(inputs, NestedCapture("the current stream is being recorded by somebody else", operator="replay"))
        with first_call_lock, self._lock:
            key = self._key(inputs)
            recorded = self._known(key, inputs)
            if recorded is not None:
                return self._replayed(recorded, inputs)
            if key not in self._refused:
                try:
                    return self._record(key, inputs)
                except Refusal as refusal:
                    self._refused[key] = refusal
            return self._run(inputs, self._refused[key])

    def _known(self, key: tuple[Any, ...], inputs: Sequence[Any]) -> RecordedSubgraph | None:
        """A recording for the static inputs of a call: one that fits (another thread was faster), or one that is pointed at them.

        Dynamo runs one graph for all models of a class. What is recorded of one that lives on stays with its weights.
        """
        known = self._recorded.get(key, [])
        fitting = next((recorded for recorded in known if recorded.fits(inputs)), None)
        if fitting is not None:
            return fitting
        has_room = self._count() < self._options.max_recordings
        for recorded in [one for one in known if not (has_room and one.is_of_another(inputs))]:
            moved = recorded.moved(inputs)
            try:
                recorded.point(self._graph, inputs)
            except CannotPoint as why:
                self._drop(key, recorded, moved, str(why))
            else:
                self._pointed += 1
                if recorded.fits(inputs):
                    return recorded
                self._drop(key, recorded, moved, "an input lies in memory that the graph writes")
        return None

    def _count(self) -> int:
        return sum(map(len, self._recorded.values()))

    def _is_unsafe(self, inputs: Sequence[Any]) -> bool:
        """Whether an input that is written overlaps with another, or inputs overlap otherwise than in the first call."""
        overlaps = _overlaps(inputs)
        if self._overlaps is None:
            self._overlaps = overlaps
        if not overlaps or overlaps != self._overlaps or self._graph.training:
            return bool(overlaps or self._overlaps)
        written = self._graph.written(inputs)
        return any(a in written or b in written for a, b, _ in overlaps)

    def _run(self, inputs: Sequence[Any], why: Refusal, function: Callable[..., Any] | None = None) -> Any:
        """The compiled function, with the reason counted, or raised in strict mode."""
        if self._options.strict:
            raise why
        self._ledger.refused(why, outcome="this graph runs compiled and is not recorded")
        self._ledger.eager_calls += 1
        return (function or self._graph)(*inputs)

    def _record(self, key: tuple[Any, ...], inputs: Sequence[Any]) -> Any:
        limit = self._options.max_recordings
        if self._count() >= limit:
            raise TooManyKeys(f"{limit} sizes are recorded (max_recordings={limit})", operator=self._graph.name)
        copied = [position for position, moves in self._moves.items() if moves > _MOVES]
        owned, check = self._options.outputs == "owned", self._options.verify != "off"
        name, sizes = self._graph.name, self._sizes(inputs)
        with recording_range(name, sizes, None, None), forced_eager("first call"):
            recorded, outputs = record_subgraph(self._graph, inputs, self._place.recorder, copied, owned=owned, check=check)
        self._recorded.setdefault(key, []).append(recorded)
        emit(Recorded(step=name, key=sizes, seconds=recorded.seconds, bytes=recorded.recording.pool_bytes))
        recorded.replays += 1
        return outputs

    def _drop(self, key: tuple[Any, ...], recorded: RecordedSubgraph, moved: Sequence[int], why: str) -> None:
        """Give up a recording whose static tensors moved; one that is written and moves again and again is refused."""
        self._recorded[key].remove(recorded)
        self._dropped += recorded.replays
        self._moves.update(moved)
        names = ", ".join(self._graph.names[position] for position in moved[:3])
        refusal = MovedStaticTensor(f"{len(moved)} of the tensors read in place moved: {why}", operator=names)
        if any(self._moves[position] > _MOVES for position in recorded.written):
            self._refused[key] = refusal
        else:
            self._ledger.recorded_otherwise(refusal, "the graph is recorded anew")

    def report(self) -> PieceReport:
        """What this subgraph is and what its calls got."""
        graph, recorded = self._graph, [one for known in self._recorded.values() for one in known]
        return PieceReport(
            index=self.index,
            name=graph.name,
            device=str(graph.device),
            compiler=graph.compiler,
            operators=graph.operators,
            ends=self._ending.reason,
            file=self._ending.site.file,
            line=self._ending.site.line,
            rewrites=tuple(f"{change.by}: {change.before} -> {change.after}" for change in graph.changes),
            recordings=len(recorded),
            replays=self._dropped + sum(one.replays for one in recorded),
            compiled_calls=self._ledger.eager_calls,
            capture_seconds=sum(one.seconds for one in recorded),
            pool_bytes=sum(one.recording.pool_bytes for one in recorded),
            refusals=self._ledger.refusals,
            moved=self._pointed,
        )


@dataclass
class _Place:
    """What the subgraphs on one device share: a recorder with its stream and pool, and the order of their replays."""

    recorder: Recorder
    lock: threading.RLock  # type: ignore[valid-type]

    @classmethod
    def of(cls, device: torch.device) -> _Place:
        """The place of a device; it lives as long as some subgraph there."""
        place = _places.get(device)
        if place is None:
            place = _places[device] = cls(recorder_for(device), forkable_lock())
        return place

    __hash__ = object.__hash__


_pieces: weakref.WeakSet[Subgraph] = weakref.WeakSet()
_places: weakref.WeakValueDictionary[torch.device, _Place] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class _Ending:
    """Why Dynamo ended a graph, and where; ``reason`` is empty where the function returned."""

    reason: str = ""
    site: Site = field(default_factory=Site)

    @classmethod
    def of(cls, reason: Any) -> _Ending:
        """From what Dynamo left at the graph."""
        if reason is None or not reason.graph_break:
            return cls()
        text = str(reason.reason)
        if text.startswith("generic_jump"):  # Dynamo's name for it
            text = f"a branch on a tensor ({text})"
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        frame = reason.user_stack[-1] if reason.user_stack else None
        site = Site.at((frame.filename, frame.lineno or 0)) if frame is not None else Site()
        return cls(" ".join(lines[:2]), site)


@dataclass(frozen=True)
class _Routed:
    """Weights that a graph holds prepared, since `passes.routing` routed them: the originals must not change any more."""

    changes: tuple[passes.Change, ...] = ()
    weights: tuple[tuple[int, str, Tensor, int], ...] = ()

    def check(self, inputs: Sequence[Any]) -> None:
        """Raise `MovedStaticTensor` where an original is another tensor or was written to."""
        for position, name, tensor, version in self.weights:
            if inputs[position] is not tensor or _version(tensor) != version:
                detail = "the weight was prepared for a routed projection and has changed since"
                raise MovedStaticTensor(detail, operator=name, remedy="call torch.compiler.reset(), and compile again")


def _route(module: torch.fx.GraphModule, inputs: Sequence[Any], routes: Any) -> _Routed:
    """Route the grouped projections of a graph whose weights Dynamo calls static; not of one that records gradients."""
    from graphs.compile.compiled_graph import needs_gradients, placeholders, static_inputs
    from passes.projections.route import routing

    if needs_gradients(module, inputs):
        return _Routed()
    nodes = placeholders(module)
    static = {str(nodes[index].target): index for index in static_inputs(module) if nodes[index].users}
    names = {target: _qualified(nodes[index]) for target, index in static.items()}

    def named(weight: Tensor, name: str, tokens: int | None) -> Any:
        return routes(weight, names.get(name, name), tokens)

    known = {name for name, _ in module.named_buffers()}
    sources: dict[str, Any] = vars(module)["_param_name_to_source"]
    made = routing(module, named, constants={target: inputs[index] for target, index in static.items()})
    for name in {name for name, _ in module.named_buffers()} - known:
        sources[name] = private("ConstantSource")(name)  # AOTAutograd asks where each tensor comes from
    prepared = [(index, names[target], inputs[index]) for target, index in static.items() if not nodes[index].users]
    weights = tuple((index, name, weight, _version(weight)) for index, name, weight in prepared)
    return _Routed(tuple(passes.Change("routing", before, after) for before, after in made), weights)


def _qualified(node: torch.fx.Node) -> str:
    """``layers.0.weight`` for a placeholder that Dynamo made of ``L['self']._modules['layers']...``."""
    source = getattr(node, "_dynamo_source", None)
    parts = re.findall(r"\['([^']+)'\]", str(getattr(source, "name", "")))
    return ".".join(parts[1:]) or node.name


def _overlaps(inputs: Sequence[Any]) -> tuple[tuple[int, int, int], ...]:
    """Which two inputs may have elements in common, and how far the second begins behind the first.

    Compilers rely on it where a graph writes, and Dynamo guards it for one and the same tensor alone.
    """
    by_storage: dict[int, list[int]] = {}
    for index, value in enumerate(inputs):
        if isinstance(value, Tensor) and value.layout == torch.strided:
            by_storage.setdefault(storage_id(value), []).append(index)
    pairs = (pair for members in by_storage.values() for pair in itertools.combinations(members, 2))
    offsets = [(a, b, int(inputs[b].storage_offset() - inputs[a].storage_offset())) for a, b in pairs]
    return tuple(found for found in offsets if _overlapping([inputs[found[0]], inputs[found[1]]], symbolic=False))


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
