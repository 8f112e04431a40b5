"""`capture`: a step that looks like the model and replays a recording.

The main path is `CapturedModule.__call__`: flatten and form the key; known key: check the contract and replay; unknown
key: `_unknown`, which tries to record it and falls back to eager with a reason.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from graphs.config import MODES, CaptureConfig, choice
from graphs.contract.arguments import Call, flatten_call, leaf_names, replace_tensors
from graphs.contract.batch import BatchRule
from graphs.contract.last_call import LastCall
from graphs.contract.padding import Padding
from graphs.contract.python_state import Difference
from graphs.errors import (
    AboveLargestBucket,
    AutogradInput,
    ChangingValue,
    ConfigError,
    MixedDevices,
    NestedCapture,
    Refusal,
    RowsInteract,
    TooManyKeys,
    UnsupportedArgument,
)
from graphs.ledger import Ledger
from graphs.record.step import Recorder, recorder_for
from graphs.report import CaptureReport
from graphs.trial import Deferred, Entry, Refused, Step, compare_replay, reference_to, run_trial

Tensor = torch.Tensor
Model = TypeVar("Model", bound=Callable[..., Any])

_forced_eager: ContextVar[str] = ContextVar("graphs_forced_eager", default="")  # "", "caller" or "trial"
_recording = threading.RLock()  # one trial at a time in a process: a capture shares allocator and generator state
_SELF_RETURNING = frozenset(
    "eval train to cuda cpu half float double bfloat16 type requires_grad_ apply share_memory to_empty".split()  # noqa: SIM905
)
_is_capturing = getattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False)
_MAX_DEFERRALS = 3
_OFTEN = 8  # replays a recording must serve before a changed value, for the change not to count as a habit


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Run captured modules eagerly inside the ``with`` block (in this thread or task)."""
    with _forced("caller"):
        yield


@contextlib.contextmanager
def _forced(by: str) -> Iterator[None]:
    token = _forced_eager.set(by)
    try:
        yield
    finally:
        _forced_eager.reset(token)


def capture(
    model: Model,
    *,
    mode: str | None = None,
    buckets: Iterable[int] | None = None,
    batch_dims: Mapping[str, int] | None = None,
    static: Iterable[str] = (),
    padding: Mapping[str, Padding | str] | None = None,
    outputs: str = "owned",
    verify: str | None = None,
    strict: bool | None = None,
    max_recordings: int | None = None,
) -> CapturedModule[Model]:
    """Return a callable that looks like ``model`` and records its steps, to replay them without Python.

    The first call of a key (structure, shapes, dtypes, devices and constants of the arguments) is watched, recorded and
    compared with eager; later calls replay. Recorded calls run without autograd. Tensors are copied into the recording
    at each call, except those the step writes in place (a KV cache) and everything it reaches without being given it
    (weights, buffers, the tensors of a cache object): they are read where they are, and checked to be there.

    Args:
        model: an ``nn.Module`` or any callable, taking any pytree of arguments.
        mode: ``"graph"`` or ``"eager"``; default ``GRAPHS_MODE``, else ``"graph"``. `CapturedModule.mode` changes it.
        buckets: batch sizes to record at; a batch is padded to the next one and its outputs are cut back. A step whose
            rows are found to interact is recorded at its exact sizes. Default ``GRAPHS_BUCKETS``, else exact sizes.
        batch_dims: the batch dimension of each padded argument, by name (``{"input_ids": 0}``). Without it the
            dimension is inferred once two calls prove it.
        static: names of tensor arguments to read in place instead of copying; they must not move.
        padding: what padded rows hold, by argument: ``"repeat"`` (the last real row, default), ``"zero"``, ``"keep"``
            or ``graphs.sentinel(value)``.
        outputs: ``"owned"`` (default): new tensors at each call; ``"borrowed"``: the recording's own, overwritten by
            the next call.
        verify: ``"capture"`` (default) compares the first replay of each key with eager; ``"always"`` each replay;
            ``"off"`` none. Default ``GRAPHS_VERIFY``.
        strict: raise a refusal instead of running eagerly. Default ``GRAPHS_STRICT``, else False.
        max_recordings: keys to record at most. Default ``GRAPHS_MAX_RECORDINGS``, else 64.

    Raises:
        ConfigError: an argument or a ``GRAPHS_*`` variable is not legal.
        Refusal: with ``strict=True``, at a call that cannot be replayed.
    """
    config = CaptureConfig.resolve(
        mode=mode,
        buckets=buckets,
        batch_dims=batch_dims,
        static=static,
        padding=padding,
        outputs=outputs,
        verify=verify,
        strict=strict,
        max_recordings=max_recordings,
    )
    if not callable(model):
        raise ConfigError("model", model, "an nn.Module or a callable")
    return CapturedModule(model, config)


class _Refused(NamedTuple):
    """Why the calls of a signature run eagerly, and the opaque arguments (weakly) that this holds for."""

    refusals: list[Refusal]
    opaques: list[Callable[[], Any]]

    def serves(self, call: Call) -> bool:
        return all(reference() is opaque for reference, opaque in zip(self.opaques, call.opaques, strict=True))


Route = tuple[Entry, int] | _Refused
"""Where a signature leads: a recording and the rows of the call, or the reasons why not."""


class _State:
    """Everything of a captured module that is not the model's."""

    def __init__(self, model: Callable[..., Any], config: CaptureConfig) -> None:
        # verifying a replay is a trial of its own, so it needs the lock of trials, and from the start of the call
        self.lock = _recording if config.verify == "always" else threading.RLock()
        self.ledger = Ledger()
        self.routes: dict[tuple[Any, ...], Route] = {}
        self.entries: dict[tuple[Any, ...], Entry] = {}
        self.recorders: dict[torch.device, Recorder] = {}
        self.last: tuple[LastCall, Entry, int] | None = None
        self.batch = BatchRule()
        self.attempts: Counter[tuple[Any, ...]] = Counter()
        self.parameters = _parameter_names(model)


class CapturedModule(Generic[Model]):
    """A model with recordings: made by `capture`, called like the model.

    Attributes of the model are read and written through it (``step.config``, ``step.parameters()``, ``step.eval()``).
    Its own are `mode`, `report`, `record_buckets` and `invalidate`. Methods of the model that call the model
    themselves (``generate``) call the model, not its recordings.
    """

    def __init__(self, model: Model, config: CaptureConfig) -> None:
        object.__setattr__(self, "_graphs_model", model)
        object.__setattr__(self, "_graphs_config", config)
        object.__setattr__(self, "_graphs_mode", config.mode)
        object.__setattr__(self, "_graphs_state", _State(model, config))

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Run one step: replay it if its key is recorded, else try to record it, else run the model."""
        if self._graphs_mode == "eager" or _forced_eager.get():
            return self._run_eagerly(args, kwargs)
        ambient = _ambient(self._graphs_model)
        last = self._graphs_state.last
        if last is not None and (like := last[0].match(args, kwargs, ambient)) is not None:
            return self._replay(last[1], last[2], like, args, kwargs)
        try:
            call = flatten_call(args, kwargs, ambient)
        except (RuntimeError, NotImplementedError) as error:  # a tensor without strides: sparse, nested, mkldnn
            return self._refuse([UnsupportedArgument(f"{error}".splitlines()[0], operator="arguments")], args, kwargs)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in call.tensors):
            return self._refuse([AutogradInput("a tensor argument requires a gradient", operator="arguments")], args, kwargs)
        route = self._graphs_state.routes.get(call.signature)
        if route is None:
            return self._unknown(call, args, kwargs)
        if isinstance(route, _Refused):
            return self._refuse(route.refusals, args, kwargs) if route.serves(call) else self._unknown(call, args, kwargs)
        guard = LastCall.of(args, kwargs, ambient, call)
        self._graphs_state.last = (guard, *route) if guard is not None else None
        return self._replay(route[0], route[1], call, args, kwargs)

    def _replay(self, entry: Entry, rows: int, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Check the contract, replay, and put the output together."""
        with self._graphs_state.lock:
            stale = self._stale(entry, call)
            if stale is None:
                if self._graphs_config.verify == "always":
                    self._verify(entry, rows, call, args, kwargs)
                produced = entry.recording.replay(call.tensors, rows)
                entry.replays += 1
                entry.real_rows += rows
                return entry.template.fill(produced, call.tensors, call.opaques)
        if isinstance(stale, _Outdated):
            return self._outdated(entry, stale, call, args, kwargs)
        return self._refuse([stale], args, kwargs)

    def _stale(self, entry: Entry, call: Call) -> Refusal | _Outdated | None:
        """Why ``entry`` cannot serve this call after all, or None. Runs at every call."""
        for position, opaque in enumerate(call.opaques):
            if entry.opaques[position]() is not opaque:
                return _Outdated()
        if not entry.statics.unchanged(call.tensors):
            return entry.statics.moved(call.tensors)
        changed = entry.steering.changed()
        if changed is not None:
            return _Outdated(changed)
        if call.tensors and call.tensors[0].is_cuda and _is_capturing():
            return NestedCapture("the current stream is being recorded by somebody else", operator="replay")
        if entry.replays >= entry.recheck_at:
            unchecked, entry.recheck_at = entry.replays - entry.recheck_at // 2, entry.recheck_at * 2
            changes = entry.python.differences(between_calls=True)
            if changes:
                return _Outdated(changes[0], unchecked)
        return None

    def _unknown(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Try to record an unknown key; replay it, or return what the model gave, with the reason counted."""
        state = self._graphs_state
        with _recording, state.lock:
            route = state.routes.get(call.signature)
            if isinstance(route, tuple) and not isinstance(route, _Refused):  # another thread was faster
                return self._replay(route[0], route[1], call, args, kwargs)
            self._forget_the_dead()
            refusal = self._inadmissible(call)
            if refusal is not None:
                return self._refuse([refusal], args, kwargs)
            try:
                found = self._record(call, args, kwargs)
            except Deferred as deferred:
                state.attempts[call.signature] += 1
                state.ledger.eager_calls += 1
                if state.attempts[call.signature] > _MAX_DEFERRALS:
                    self._remember(call, [ChangingValue(f"{deferred} changes in most calls", operator=str(deferred))])
                return deferred.output
            except Refused as refused:
                self._remember(call, refused.refusals)
                return self._refused(refused, args, kwargs)
            except AboveLargestBucket as too_large:
                self._remember(call, [too_large])
                return self._refuse([too_large], args, kwargs)
        return self._replay(found[0], found[1], call, args, kwargs)

    def _refused(self, refused: Refused, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of a trial that ended in a refusal; computed once more where autograd is to record it."""
        if refused.undo is None:
            self._count(refused.refusals)
            return refused.output
        if torch.is_grad_enabled() or self._graphs_config.strict:
            refused.undo()
            return self._refuse(refused.refusals, args, kwargs)
        self._count(refused.refusals)
        return refused.output

    def _remember(self, call: Call, refusals: list[Refusal]) -> None:
        opaques = [reference_to(opaque) for opaque in call.opaques]
        self._graphs_state.routes[call.signature] = _Refused(refusals, opaques)

    def _forget_the_dead(self) -> None:
        """Drop what was recorded or refused for opaque arguments that are gone, and the memory it keeps."""
        state = self._graphs_state
        for entry in list(state.entries.values()):
            if any(reference() is None for reference in entry.opaques):
                self._drop(entry)
        state.routes = {
            signature: route
            for signature, route in state.routes.items()
            if not (isinstance(route, _Refused) and any(reference() is None for reference in route.opaques))
        }

    def _record(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Entry, int]:
        """The recording for a call: an existing one of its bucket, or a new one. State is as before the call."""
        state, config = self._graphs_state, self._graphs_config
        step = self._step(call, args, kwargs)
        plan = state.batch.plan(call, step.names, config.buckets, config.batch_dims)
        while True:
            entry = state.entries.get(plan.key)
            if entry is None:
                try:
                    step.rows, step.batch_dims, step.real = plan.rows, plan.dims, plan.real
                    entry = self._try(step)
                except RowsInteract as reason:
                    state.ledger.refused(reason, outcome="the step is recorded at its exact sizes")
                    plan = state.batch.reject(plan, call, for_good=not reason.unproved)
                    continue
                state.entries[plan.key] = entry
            state.routes[call.signature] = (entry, plan.real)
            return entry, plan.real

    def _try(self, step: Step) -> Entry:
        cached = torch.is_autocast_cache_enabled()
        torch.clear_autocast_cache()  # a cast weight in the cache would be recorded in place of its cast
        torch.set_autocast_cache_enabled(False)
        try:
            with _forced("trial"):  # a captured module inside this one is recorded as a part of it
                return self._run_trial(step)
        finally:
            torch.set_autocast_cache_enabled(cached)

    def _run_trial(self, step: Step) -> Entry:
        config = self._graphs_config
        return run_trial(step, self._recorder(step.device), owned=config.outputs == "owned", check=config.verify != "off")

    def _step(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step:
        config = self._graphs_config
        names, opaque_names = leaf_names(args, kwargs, self._graphs_state.parameters)
        for setting, given in (("static", config.static), ("padding", config.padding), ("batch_dims", config.batch_dims or ())):
            for name in given:
                if name not in names and name.split(".")[0] not in self._graphs_state.parameters:
                    raise ConfigError(setting, name, names)
        return Step(
            model=self._graphs_model,
            call=call,
            args=args,
            kwargs=kwargs,
            names=names,
            opaque_names=opaque_names,
            static=tuple(i for i, name in enumerate(names) if name in config.static),
            padding=dict(config.padding),
            device=_device_of(call, self._graphs_model),
        )

    def _recorder(self, device: torch.device) -> Recorder:
        recorders = self._graphs_state.recorders
        if device not in recorders:
            recorders[device] = recorder_for(device)
        return recorders[device]

    def _inadmissible(self, call: Call) -> Refusal | None:
        """Reasons that need no run to be seen."""
        devices = {tensor.device for tensor in call.tensors}
        if len(devices) > 1:
            return MixedDevices(f"tensor arguments are on {sorted(map(str, devices))}", operator="arguments")
        for tensor in call.tensors:
            if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
                return UnsupportedArgument(f"a {type(tensor).__name__} with layout {tensor.layout}", operator="arguments")
            if tensor.device.type not in ("cpu", "cuda"):
                return UnsupportedArgument(f"a tensor on {tensor.device}", operator="arguments")
        if _stream_is_capturing(call):
            return NestedCapture("the current stream is being recorded by somebody else", operator="record")
        state, limit = self._graphs_state, self._graphs_config.max_recordings
        if len(state.entries) >= limit or len(state.routes) >= 16 * limit:
            return TooManyKeys(
                f"{len(state.entries)} recordings for {len(state.routes)} keys (max_recordings={limit})", operator="key"
            )
        return None

    def _outdated(self, entry: Entry, why: _Outdated, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Drop a recording that froze what has changed since; record anew, but refuse by name what changes often."""
        state, change = self._graphs_state, why.change
        with _recording, state.lock:
            self._drop(entry)
            if change is not None:
                detail = f"{change.path} was {change.before} when recorded and is {change.after} now"
                if why.unchecked:
                    detail += f"; up to {why.unchecked} replays before this call may have used the old value"
                refusal = ChangingValue(detail, operator=change.path)
                state.ledger.refused(refusal, outcome="the step is recorded anew")
                state.attempts[call.signature] += entry.replays < _OFTEN
                if state.attempts[call.signature] > 1:
                    self._remember(call, [refusal])
        return self(*args, **kwargs)

    def _drop(self, entry: Entry) -> None:
        state = self._graphs_state
        state.last = None
        state.entries = {key: other for key, other in state.entries.items() if other is not entry}
        state.routes = {s: r for s, r in state.routes.items() if isinstance(r, _Refused) or r[0] is not entry}
        state.ledger.dropped(entry)

    def _verify(self, entry: Entry, rows: int, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step = self._step(call, args, kwargs)
        with _forced("trial"):
            mismatch = compare_replay(step, entry, rows)
        if mismatch is not None:
            self._drop(entry)
            raise mismatch

    def _count(self, refusals: list[Refusal]) -> None:
        """Count the reasons of one eager call, or raise the first in strict mode."""
        if self._graphs_config.strict:
            raise refusals[0]
        for refusal in refusals:
            self._graphs_state.ledger.refused(refusal)
        self._graphs_state.ledger.eager_calls += 1

    def _refuse(self, refusals: list[Refusal], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._count(refusals)
        return self._graphs_model(*args, **kwargs)

    def _run_eagerly(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _forced_eager.get() != "trial":
            self._graphs_state.ledger.eager_calls += 1
        return self._graphs_model(*args, **kwargs)

    @property
    def mode(self) -> str:
        """``"graph"`` or ``"eager"``; may be set at run time. Recordings are kept while eager."""
        return str(self._graphs_mode)

    @mode.setter
    def mode(self, value: str) -> None:
        object.__setattr__(self, "_graphs_mode", choice("mode", value, MODES))

    def report(self) -> CaptureReport:
        """What was recorded, replayed and refused so far, and why."""
        state = self._graphs_state
        with state.lock:
            devices = ", ".join(sorted(map(str, state.recorders))) or "no device"
            return state.ledger.report(devices, self._graphs_mode, list(state.entries.values()))

    def record_buckets(self, /, *args: Any, **kwargs: Any) -> None:
        """Record every bucket ahead of time, the largest first, with this call's rows repeated or cut as needed.

        The step's state is left as it was.

        Raises:
            ConfigError: there are no buckets, or the batch dimension is neither declared nor inferred yet.
            Refusal: a bucket cannot be recorded.
        """
        state, config = self._graphs_state, self._graphs_config
        call = flatten_call(args, kwargs, _ambient(self._graphs_model))
        step = self._step(call, args, kwargs)
        plan = state.batch.plan(call, step.names, config.buckets, config.batch_dims, clamp=True)
        if plan.rows is None or config.buckets is None:
            raise ConfigError("batch_dims", config.batch_dims, "the batch dimension of each padded argument, with buckets= given")
        for rows in sorted(config.buckets, reverse=True):
            sized_args, sized_kwargs = replace_tensors((args, kwargs), iter(plan.resize(call.tensors, rows)))
            sized = flatten_call(sized_args, sized_kwargs, _ambient(self._graphs_model))
            with _recording, state.lock:
                try:
                    self._record(sized, sized_args, sized_kwargs)
                except Refused as refused:
                    if refused.undo is not None:
                        refused.undo()
                    raise refused.refusals[0] from refused
                except Deferred as deferred:
                    deferred.undo()
                    raise ChangingValue(
                        f"the step initialises {deferred}; call it once first", operator=str(deferred)
                    ) from deferred

    def invalidate(self) -> None:
        """Drop every recording and every refusal remembered: after weights, caches or the model were replaced."""
        state = self._graphs_state
        with _recording, state.lock:
            for entry in list(state.entries.values()):
                state.ledger.dropped(entry)
            state.entries, state.routes, state.attempts, state.last = {}, {}, Counter(), None
            state.batch = BatchRule()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._graphs_model, name)
        if name in _SELF_RETURNING and callable(value):
            return self._returning_self(value)
        return value

    def _returning_self(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            return self if result is self._graphs_model else result

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "mode":
            object.__setattr__(self, name, value)
        else:
            setattr(self._graphs_model, name, value)
            self.invalidate()

    def __delattr__(self, name: str) -> None:
        delattr(self._graphs_model, name)
        self.invalidate()

    def __graphs_walk__(self) -> Any:
        """What a walk over Python state enters in place of this object."""
        return self._graphs_model

    def __dir__(self) -> list[str]:
        return sorted({*dir(self._graphs_model), *type(self).__dict__})

    def __repr__(self) -> str:
        return f"CapturedModule({self._graphs_model!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedModule[Model]:
        return CapturedModule(copy.deepcopy(self._graphs_model, memo), self._graphs_config)

    def __reduce__(self) -> tuple[Any, ...]:
        return CapturedModule, (self._graphs_model, self._graphs_config)


class _Outdated(NamedTuple):
    """A recording whose frozen Python state is not the present one.

    Attributes:
        change: what differs; None where the object it was recorded for is gone and another took its identity.
        unchecked: replays since the value was last known to be the recorded one.
    """

    change: Difference | None = None
    unchecked: int = 0


def _ambient(model: Any) -> tuple[Any, ...]:
    """Settings outside the arguments that change what a step does: training mode and autocast."""
    training = getattr(model, "training", None)
    if torch._C._is_any_autocast_enabled():
        return training, *((k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in ("cpu", "cuda"))
    return (training,)


def _stream_is_capturing(call: Call) -> bool:
    return bool(call.tensors) and call.tensors[0].is_cuda and _is_capturing()


def _device_of(call: Call, model: Any) -> torch.device:
    if call.tensors:
        return call.tensors[0].device
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else iter(())
    return next((parameter.device for parameter in parameters), torch.device("cpu"))


def _parameter_names(model: Any) -> list[str]:
    function = model.forward if isinstance(model, torch.nn.Module) else model
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature: arguments are named by position
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
