"""The recordings of one captured module, and the way of a call through them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch

from graphs.config import CaptureConfig
from graphs.contract.arguments import PLAIN_TENSORS, Call, flatten_call, leaf_names, replace_tensors
from graphs.contract.batch import BatchRule
from graphs.contract.eligibility import carries_objects, device_of, inadmissible, is_capturing, parameter_names
from graphs.contract.settings import active_mode, ambient_of
from graphs.dispatch.call_log import CallLog
from graphs.dispatch.fast_path import FastPath
from graphs.dispatch.habits import Habits
from graphs.eager_mode import forced_by, forced_eager
from graphs.errors import (
    AboveLargestBucket,
    AutogradInput,
    ChangingValue,
    ConfigError,
    GraphsError,
    InternalError,
    ManyWays,
    MovedStaticTensor,
    NestedCapture,
    Refusal,
    RowsInteract,
    Site,
    TooManyKeys,
    UnsupportedArgument,
)
from graphs.first_call.host_arguments import host_arguments, record_key_on_device
from graphs.first_call.outcomes import Deferred, Refused
from graphs.first_call.padding_proof import compare_padded
from graphs.first_call.record_key import record_key
from graphs.first_call.recorded_step import RecordedStep, reference_to
from graphs.first_call.verify_replay import compare_replay
from graphs.objects.cells import Difference
from graphs.recording.choose import recorder_for
from graphs.recording.failures import Eagerly, RaisedWatched, StepRaised, is_of_our_own, raised_refusal, refusal_of
from graphs.recording.recorder import Recorder, ReplayRaised, first_call_lock
from graphs.rehearsal.step import Step
from graphs.report import CaptureReport
from graphs.state.tensor_state import RandomState

_recording = first_call_lock
_increment_version: Callable[[Any], None] = getattr(torch._C, "_increment_version", torch.autograd.graph.increment_version)
_MAX_DEFERRALS = 3
_MAX_VARIANTS = 16  # recordings of one key, by the outcomes of what the step decides by host values
_PATIENCE = 4 * _MAX_VARIANTS  # calls that none of them could serve, before a step that mostly goes other variants is given up
_SHOWN = 4  # lines that a refusal for too many variants names
_OFTEN = 8  # replays a recording must serve before a changed value, for the change not to count as a habit


class _Refused(NamedTuple):
    """Why the calls of a signature run eagerly, and the opaque arguments (weakly) that this holds for."""

    refusals: list[Refusal]
    opaques: list[Callable[[], Any]]

    def serves(self, call: Call) -> bool:
        return all(reference() is opaque for reference, opaque in zip(self.opaques, call.opaques, strict=True))


Route = tuple[RecordedStep, int] | _Refused
"""Where a signature leads: a recording and the rows of the call, or the reasons why not."""


class _Outdated(NamedTuple):
    """A recording that froze what is not so any more.

    Attributes:
        change: the Python value that differs.
        moved: the tensor that is elsewhere.
        Neither is given where the object it was recorded for is gone and another took its identity.
    """

    change: Difference | None = None
    moved: Refusal | None = None

    @property
    def refusal(self) -> Refusal | None:
        """What has changed, as a reason not to record again."""
        if self.change is None:
            return self.moved
        path, before, after = self.change.path, self.change.before, self.change.after
        kind = MovedStaticTensor if after.startswith("tensor(") else ChangingValue
        return kind(f"{path} was {before} when recorded and is {after} now", operator=path)


def _many_variants(variants: list[RecordedStep]) -> ManyWays:
    """The refusal for a call that takes none of the recorded variants; it names the lines that decide."""
    lines = list(dict.fromkeys(line for variant in variants for line in getattr(variant.candidate, "decided_at", ())))
    also = ", ".join(f"{file.rpartition('/')[2]}:{line}" for file, line in lines[1:_SHOWN])
    detail = f"{len(variants)} variants through the step are recorded, and this call takes another"
    detail += f"; {also} and others decide too" if len(lines) > _SHOWN else f"; {also} decides too" if also else ""
    return ManyWays(detail, operator="branch", site=Site.at(lines[0]) if lines else None)


class Dispatcher:
    """What was recorded and refused for one module, and the decision what a call gets.

    `call` is the main path: recognise the call, check the contract, replay; else try to record, else run the model.
    """

    def __init__(self, model: Callable[..., Any], config: CaptureConfig) -> None:
        self.model, self.config = model, config
        # verifying a replay runs the step as a first call does, so it needs their lock, and from the start of the call
        self.verifies_always = config.verify == "always"
        self.lock = _recording if self.verifies_always else threading.RLock()
        self.call_log = CallLog()
        self.routes: dict[tuple[Any, ...], Route] = {}
        self.entries: dict[tuple[Any, ...], RecordedStep] = {}
        self.recorders: dict[torch.device, Recorder] = {}
        self.last: tuple[FastPath, RecordedStep, int] | None = None
        self.batch = BatchRule()
        self.attempts: Counter[tuple[Any, ...]] = Counter()
        self.moving: dict[tuple[Any, ...], frozenset[int]] = {}  # positions of arguments that are elsewhere at each call
        self.parameters = parameter_names(model)
        self.habits = Habits(self.parameters, self.config.max_recordings)

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one step: replay it if its key is recorded, else try to record it, else run the model.

        Only what the model raises reaches the caller, and in strict mode a refusal.
        """
        failure: Exception | None = None
        own: BaseException | None = None
        try:
            return self._serve(args, kwargs)
        except Eagerly:
            pass
        except StepRaised as raised:
            own = raised.error
        except GraphsError:
            raise
        except Exception as error:
            failure = error
        if own is not None:
            self._raised(own)
            raise own
        return self.model(*args, **kwargs) if failure is None else self._despite(failure, args, kwargs)

    def _despite(self, failure: Exception, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model where something raised on the way to a recording: the model too, or only this project."""
        error = failure.error if isinstance(failure, (RaisedWatched, ReplayRaised)) else failure
        in_replay = isinstance(failure, ReplayRaised)
        if self.config.strict and not in_replay and is_of_our_own(error) and not self.config.raise_internal:
            raise refusal_of(failure)
        try:
            output = self.model(*args, **kwargs)
        except Exception as raised:
            self._raised(raised)
            raise
        if in_replay:  # the step catches it: for this call, which says nothing of the next
            self._count([raised_refusal(error)])
            return output
        refusal = refusal_of(failure)
        if self.config.raise_internal and isinstance(refusal, InternalError):
            raise error
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            self._remember_if_possible(refusal, args, kwargs)
        self._count([refusal])
        return output

    def _raised(self, error: BaseException) -> None:
        """Count a call that ended in what the step itself raises; no warning tells more than that does."""
        self.call_log.refused(raised_refusal(error), warn=False)
        self.call_log.eager_calls += 1

    def _remember_if_possible(self, refusal: Refusal, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run calls like this one eagerly from now on; a call that cannot be flattened has no key to remember it by."""
        try:
            call = flatten_call(args, kwargs, ambient_of(self.model))
            hash(call.signature)
        except Exception:  # that is what failed, then
            return
        with _recording, self.lock:
            self._remember(call, [refusal])

    def _serve(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a recording gives, or the watched run of a step that none can be made of.

        Raises:
            Eagerly, StepRaised: see there.
            Refusal: in strict mode.
        """
        ambient = ambient_of(self.model)
        last = self.last
        if last is not None:
            guard, entry, rows = last
            like = guard.match(args, kwargs, ambient)
            if like is not None:
                return self._replay(entry, rows, like, args, kwargs)
        inside = active_mode()
        if inside is not None:
            return self._refuse([inside], args, kwargs)
        try:
            call = flatten_call(args, kwargs, ambient)
        except (RuntimeError, NotImplementedError) as error:  # a tensor without strides: sparse, nested, mkldnn
            return self._refuse([UnsupportedArgument(f"{error}".splitlines()[0], operator="arguments")], args, kwargs)
        foreign = next((type(tensor) for tensor in call.tensors if type(tensor) not in PLAIN_TENSORS), None)
        if foreign is not None:
            detail = f"a {foreign.__name__}: what a subclass makes of an operator is not in a recording"
            return self._refuse([UnsupportedArgument(detail, operator="arguments")], args, kwargs)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in call.tensors):
            return self._refuse([AutogradInput("a tensor argument requires a gradient", operator="arguments")], args, kwargs)
        route = self.routes.get(call.signature)
        if route is None:
            return self._unknown(call, args, kwargs)
        if isinstance(route, _Refused):
            return self._refuse(route.refusals, args, kwargs) if route.serves(call) else self._unknown(call, args, kwargs)
        like_this = FastPath.of(args, kwargs, ambient, call)
        with self.lock:  # unless another thread has just dropped the route
            if self.routes.get(call.signature) is route:
                self.last = (like_this, *route) if like_this is not None else None
        return self._replay(route[0], route[1], call, args, kwargs)

    def _replay(self, entry: RecordedStep, rows: int, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Check the contract, replay, and put the output together."""
        with self.lock:
            stale = self._stale(entry, call)
            if stale is None:
                if self.verifies_always:
                    self._verify(entry, rows, call, args, kwargs)
                produced = self._replayed(entry, rows, call)
                if entry.checked is None or entry.checked.commit_or_rollback():
                    entry.replays += 1
                    entry.real_rows += rows
                    return self._filled(entry, produced, call)
        if stale is None:
            return self._another_variant(entry, rows, call, args, kwargs)
        if isinstance(stale, _Outdated):
            return self._outdated(entry, stale, call, args, kwargs)
        if isinstance(stale, MovedStaticTensor) and self._releases(entry, stale, call):
            return self._serve(args, kwargs)
        return self._refuse([stale], args, kwargs)

    @staticmethod
    def _replayed(entry: RecordedStep, rows: int, call: Call) -> list[torch.Tensor]:
        """What a replay produces.

        Raises:
            ReplayRaised: an operator refused its data, and nothing is left of the replay: the model is to be run.
            StepRaised: an operator refused its data, which the step does not catch, and others had written.
        """
        undone = not entry.on_device and (entry.catches or entry.checked is not None)
        copies = entry.written.copies() if undone else None
        draws = entry.generators is not None and not entry.on_device and (undone or not entry.written.tensors)
        random = RandomState(torch.device("cpu"), {g: g.get_state() for g in entry.generators or ()}) if draws else None
        try:
            produced = entry.recording.replay(call.tensors, rows)
        except ReplayRaised as raised:
            if random is not None:
                random.restore()
            if copies is not None:
                entry.written.restore(copies)
                if entry.checked is not None:
                    entry.checked.abandoned()
            elif entry.written.tensors:
                raise StepRaised(raised.error) from None
            raise
        if entry.bumped or entry.bumped_arguments:
            _increment_version([*entry.bumped, *map(call.tensors.__getitem__, entry.bumped_arguments)])
        return produced

    @staticmethod
    def _filled(entry: RecordedStep, produced: list[torch.Tensor], call: Call) -> Any:
        """The output of a replay. It was put together once at capture, so what raises is a class of the user's that now does."""
        try:
            return entry.template.fill(produced, call.tensors, call.opaques)
        except Exception as error:
            if entry.written.tensors:  # the step has taken place: the model must not run as well
                raise StepRaised(error) from None
            raise

    def _stale(self, entry: RecordedStep, call: Call) -> Refusal | _Outdated | None:
        """Why ``entry`` cannot serve this call after all, or None. Runs at every call."""
        tensors = call.tensors
        for position, opaque in enumerate(call.opaques):
            if entry.opaques[position]() is not opaque:
                return _Outdated()
        changed = entry.guards.changed()
        if changed is not None:
            return _Outdated(changed)
        if not entry.statics.unchanged(tensors):
            moved = entry.statics.moved(tensors)
            return _Outdated(moved=moved) if entry.statics.arguments_fit(tensors) else moved
        if entry.on_device and is_capturing():
            return NestedCapture("the current stream is being recorded by somebody else", operator="replay")
        return None

    def _releases(self, entry: RecordedStep, moved: MovedStaticTensor, call: Call) -> bool:
        """Whether a recording was dropped since arguments that it writes in place are elsewhere.

        One that stayed where it was for long, a cache, is recorded at its new address; others are copied from then on.
        """
        arguments = entry.statics.moved_arguments(call.tensors)
        declared = {name for _, name in arguments if name in self.config.static}
        known = self.moving.get(call.signature, frozenset())
        positions = {index for index, _ in arguments}
        if entry.contract.rows is not None or declared or positions <= known:
            return False
        with _recording, self.lock:
            if entry in self.entries.values():
                self.call_log.refused(moved, outcome="the step is recorded anew")
                self._drop(entry)
                if entry.replays < _OFTEN:
                    self.moving[call.signature] = known | positions
        return True

    def _another_variant(self, broken: RecordedStep, rows: int, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Serve a call that decides otherwise than ``broken`` assumes, whose replay was undone: by a variant recorded before,
        or by a new one.
        """
        with _recording, self.lock:
            variants = broken.group.variants
            for entry in [other for other in variants if other is not broken]:
                if self._stale(entry, call) is not None:
                    continue
                produced = self._replayed(entry, rows, call)
                if entry.checked is None or entry.checked.commit_or_rollback():
                    variants.remove(entry)
                    variants.insert(0, entry)
                    self._lead(call, entry, rows)
                    entry.replays += 1
                    entry.real_rows += rows
                    return self._filled(entry, produced, call)
            if broken.group.refusals:
                return self._refuse(broken.group.refusals, args, kwargs)
            refusal = _many_variants(variants)
            if len(variants) < _MAX_VARIANTS:
                return self._unknown(call, args, kwargs, beside=broken)
            broken.group.broken += 1
            if broken.group.broken > _PATIENCE and 2 * broken.group.broken > sum(variant.replays for variant in variants):
                self._remember(call, [refusal])
            return self._refuse([refusal], args, kwargs)

    def _lead(self, call: Call, entry: RecordedStep, rows: int) -> None:
        """Let calls of this signature try ``entry`` first."""
        self.last = None
        self.routes[call.signature] = (entry, rows)

    def _unknown(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], beside: RecordedStep | None = None) -> Any:
        """Try to record an unknown key; replay it, or return what the model gave, with the reason counted.

        Args:
            beside: a recording of the key whose assumptions do not hold for this call.
        """
        with _recording, self.lock:
            route = self.routes.get(call.signature)
            if route is not None and not isinstance(route, _Refused) and beside is None:  # another thread was faster
                return self._replay(route[0], route[1], call, args, kwargs)
            refusals = self._habitual(call, args, kwargs) if beside is None else []
            if refusals:
                return self._refuse(refusals, args, kwargs)
            self._forget_the_dead()
            refusal = self._inadmissible(call)
            if refusal is not None:
                return self._refuse([refusal], args, kwargs)
            try:
                found = self._record(call, args, kwargs) if beside is None else self._record_variant(beside, call, args, kwargs)
            except Deferred as deferred:
                self.habits.tried(call, args, kwargs, None)
                self.attempts[call.signature] += 1
                if self.attempts[call.signature] > _MAX_DEFERRALS:
                    changing = ChangingValue(f"{deferred} changes in most calls", operator=str(deferred))
                    self._remember(call, [deferred.refusal or changing])
                if deferred.refusal is not None:
                    if self.config.strict:
                        deferred.undo()
                        raise deferred.refusal from None
                    self.call_log.refused(deferred.refusal)
                self.call_log.eager_calls += 1
                return deferred.output
            except Refused as refused:
                if beside is None:
                    self.habits.tried(call, args, kwargs, None, refused.refusals)
                    self._remember(call, refused.refusals)
                else:
                    beside.group.refusals = refused.refusals
                return self._refused(refused, args, kwargs)
            except AboveLargestBucket as too_large:
                self._remember(call, [too_large])
                return self._refuse([too_large], args, kwargs)
            if not found[0].replays:
                self.habits.tried(call, args, kwargs, found[0])
        return self._replay(found[0], found[1], call, args, kwargs)

    def _habitual(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Refusal]:
        """Why an unknown signature is not recorded: it is other than those before in one place only, as those were in turn.

        The recordings of those are dropped.
        """
        refusals, given_up = self.habits.against(call, args, kwargs)
        for attempt in given_up:
            entry, route = attempt.entry(), self.routes.get(attempt.signature)
            if entry is not None:
                for variant in list(entry.group.variants):
                    self._drop(variant)
            elif isinstance(route, _Refused):
                del self.routes[attempt.signature]
        return refusals

    def _refused(self, refused: Refused, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of a first call that ended in a refusal; computed once more where autograd is to record it."""
        if refused.undo is None:
            self._count(refused.refusals)
            return refused.output
        if torch.is_grad_enabled() or self.config.strict:
            refused.undo()
            return self._refuse(refused.refusals, args, kwargs)
        self._count(refused.refusals)
        return refused.output

    def _remember(self, call: Call, refusals: list[Refusal]) -> None:
        opaques = [reference_to(opaque) for opaque in call.opaques]
        self.last = None
        self.routes[call.signature] = _Refused(refusals, opaques)

    def _forget_the_dead(self) -> None:
        """Drop what was recorded or refused for opaque arguments that are gone, and the memory it keeps."""
        for entry in list(self.entries.values()):
            if any(reference() is None for reference in entry.opaques):
                self._drop(entry)
        self.routes = {
            signature: route
            for signature, route in self.routes.items()
            if not (isinstance(route, _Refused) and any(reference() is None for reference in route.opaques))
        }

    def _record(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[RecordedStep, int]:
        """The recording for a call: an existing one of its bucket, or a new one. State is as before the call."""
        config = self.config
        step = self._step(call, args, kwargs)
        plan = self.batch.plan(call, step.names, config.buckets, config.batch_dims)
        while True:
            entry = self.entries.get(plan.key)
            if entry is None:
                try:
                    step.rows, step.batch_dims, step.real = plan.rows, plan.dims, plan.real
                    entry = self._try(step)
                    entry.group.unmerged = step.unmerged
                except RowsInteract as reason:
                    self.call_log.refused(reason, outcome="the step is recorded at its exact sizes")
                    plan = self.batch.reject(plan, call, for_good=not reason.unproved)
                    continue
                self.entries[plan.key] = entry
            elif plan.rows is not None and config.verify != "off" and self._stale(entry, call) is None:
                step.rows, step.batch_dims, step.real = plan.rows, plan.dims, plan.real
                try:
                    with forced_eager("first call"):
                        compare_padded(step, entry, plan.real)
                except RowsInteract as reason:
                    self.call_log.refused(reason, outcome="the step is recorded at its exact sizes")
                    plan = self.batch.reject(plan, call, for_good=True)
                    continue
            self.routes[call.signature] = (entry, plan.real)
            return entry, plan.real

    def _record_variant(
        self, beside: RecordedStep, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[RecordedStep, int]:
        """A recording of a call at its exact sizes, for other outcomes than those of ``beside``."""
        step = self._step(call, args, kwargs)
        step.unmerged = beside.group.unmerged
        entry = self._try(step)
        entry.group = beside.group
        entry.group.variants.insert(0, entry)
        self.entries[(call.signature, "variant", id(entry))] = entry
        self._lead(call, entry, 1)
        return entry, 1

    def _try(self, step: Step) -> RecordedStep:
        owned, check = self.config.outputs == "owned", self.config.verify != "off"
        cached = torch.is_autocast_cache_enabled()
        torch.clear_autocast_cache()  # a cast weight in the cache would be recorded in place of its cast
        torch.set_autocast_cache_enabled(False)
        try:
            with forced_eager("first call"):  # a captured module inside this one is recorded as a part of it
                record = record_key_on_device if step.host else record_key
                entry = record(step, self._recorder(step.device), owned=owned, check=check)
        finally:
            torch.set_autocast_cache_enabled(cached)
        if entry.not_compiled is not None:
            self.call_log.refused(entry.not_compiled, outcome="the step is recorded uncompiled")
        return entry

    def _step(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step:
        config = self.config
        names, opaque_names = leaf_names(args, kwargs, self.parameters)
        for setting, given in (("static", config.static), ("padding", config.padding), ("batch_dims", config.batch_dims or ())):
            for name in given:
                if name not in names and name.split(".")[0] not in self.parameters:
                    raise ConfigError(setting, name, names)
        return Step(
            model=self.model,
            call=call,
            args=args,
            kwargs=kwargs,
            names=names,
            opaque_names=opaque_names,
            static=tuple(i for i, name in enumerate(names) if name in config.static),
            padding=dict(config.padding),
            device=device_of(call, self.model),
            moving=self.moving.get(call.signature, frozenset()),
            host=self._host(call),
            compiler=config.compiler,
            compiler_options=config.compiler_options,
            passes=config.passes,
            bounds=config.bounds,
        )

    def _recorder(self, device: torch.device) -> Recorder:
        recorders = self.recorders
        if device not in recorders:
            recorders[device] = recorder_for(device)
        return recorders[device]

    def _inadmissible(self, call: Call) -> Refusal | None:
        limit = self.config.max_recordings
        if len(self.entries) >= limit or len(self.routes) >= 16 * limit:
            detail = f"{len(self.entries)} recordings for {len(self.routes)} keys (max_recordings={limit})"
            return TooManyKeys(detail, operator="key")
        return inadmissible(call, self.model, self._host(call)) or carries_objects(call)

    def _host(self, call: Call) -> tuple[int, ...]:
        """Positions of host tensors that a recording takes in; with buckets, which would have to pad them, none."""
        return host_arguments(call) if self.config.buckets is None else ()

    def _outdated(self, entry: RecordedStep, why: _Outdated, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Drop a recording that froze what has changed since; record anew, but refuse by name what changes often."""
        with _recording, self.lock:
            self._drop(entry)
            refusal = why.refusal
            if refusal is not None:
                self.attempts[call.signature] += entry.replays < _OFTEN
                if self.attempts[call.signature] > 1:
                    self._remember(call, [refusal])  # which this call is counted under
                else:
                    self.call_log.refused(refusal, outcome="the step is recorded anew")
        return self._serve(args, kwargs)

    def _drop(self, entry: RecordedStep) -> None:
        self.last = None
        self.habits.dropped(entry)
        entry.group.variants.remove(entry)
        self.entries = {key: other for key, other in self.entries.items() if other is not entry}
        self.routes = {s: r for s, r in self.routes.items() if isinstance(r, _Refused) or r[0] is not entry}
        self.call_log.dropped(entry)

    def _verify(self, entry: RecordedStep, rows: int, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step = self._step(call, args, kwargs)
        with forced_eager("first call"):
            mismatch = compare_replay(step, entry, rows)
        if mismatch is not None:
            self._drop(entry)
            raise mismatch

    def _count(self, refusals: list[Refusal]) -> None:
        """Count one eager call under its first reason, or raise that in strict mode; the others are reported beside it."""
        internal = next((refusal for refusal in refusals if isinstance(refusal, InternalError)), None)
        if internal is not None and internal.error is not None and self.config.raise_internal:
            raise StepRaised(internal.error)
        if self.config.strict:
            raise refusals[0]
        for index, refusal in enumerate(refusals):
            self.call_log.refused(refusal, calls=int(index == 0))
        self.call_log.eager_calls += 1

    def _refuse(self, refusals: list[Refusal], args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
        """Have `call` run the model."""
        self._count(refusals)
        raise Eagerly

    def run_eagerly(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model, because the caller asked for it, or the first call of a module around this one did."""
        if forced_by() != "first call":
            self.call_log.eager_calls += 1
        return self.model(*args, **kwargs)

    def report(self, mode: str) -> CaptureReport:
        """What was recorded, replayed and refused so far, and why."""
        with self.lock:
            devices = ", ".join(sorted(map(str, self.recorders))) or "no device"
            return self.call_log.report(devices, mode, list(self.entries.values()))

    def record_buckets(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record every bucket ahead of time, the largest first, with this call's rows repeated or cut as needed.

        The step's state is left as it was.

        Raises:
            ConfigError: there are no buckets, or the batch dimension is neither declared nor inferred yet.
            Refusal: a bucket cannot be recorded.
        """
        config = self.config
        call = flatten_call(args, kwargs, ambient_of(self.model))
        step = self._step(call, args, kwargs)
        plan = self.batch.plan(call, step.names, config.buckets, config.batch_dims, clamp=True)
        if plan.rows is None or config.buckets is None:
            raise ConfigError("batch_dims", config.batch_dims, "the batch dimension of each padded argument, with buckets= given")
        for rows in sorted(config.buckets, reverse=True):
            sized_args, sized_kwargs = replace_tensors((args, kwargs), iter(plan.resize(call.tensors, rows)))
            sized = flatten_call(sized_args, sized_kwargs, ambient_of(self.model))
            with _recording, self.lock:
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
        with _recording, self.lock:
            for entry in list(self.entries.values()):
                self.call_log.dropped(entry)
            self.entries, self.routes, self.attempts, self.last = {}, {}, Counter(), None
            self.batch, self.moving, self.habits = BatchRule(), {}, Habits(self.parameters, self.config.max_recordings)
