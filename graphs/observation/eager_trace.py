"""Watching one step run: every operator, host syncs, host constants, what it reads in place and what it writes.

Two modes see everything on any device and need no driver: a dispatch mode sees operators, a function mode sees the
conversions that never reach the dispatcher on CPU tensors (``tolist``, ``numpy``, ``cpu``, ``print``). The watched run
is an ordinary eager run: its outputs and effects are real.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from graphs.errors import (
    AutogradInput,
    ChangingValue,
    Collective,
    HiddenRead,
    HigherOrder,
    HostSync,
    OpaqueKernel,
    Refusal,
    Site,
    StepRaises,
    UndeclaredWrite,
    UnsupportedArgument,
    UnsupportedTensor,
)
from graphs.observation.fused_modules import unnoticed
from graphs.observation.grad_questions import GRAD_PROPERTIES, GradWrites, grad_questions
from graphs.observation.host_reads import (
    FILLS,
    FROM_LISTS,
    OF_THE_OBJECT,
    SPLITS,
    TO_HOST,
    HostRead,
    finding,
    leaves_the_device,
    may_read,
    values_read,
)
from graphs.state.op_registry import check_once
from graphs.state.storage import has_storage, is_wrapper, storage_id, tensors_in, wrapped_tensors, written_tensors
from graphs.state.tensor_state import TensorState
from passes import Place, inside, user_place
from passes.core.composites import Calls, as_eager, called, run, taken_apart

Tensor = torch.Tensor
aten = torch.ops.aten
_LIBRARIES = frozenset(("torch", "triton", "contextlib", "functools", "passes"))
_VERSION = getattr(Tensor, "_version").__get__  # noqa: B009  # its stub is a number
_ASKED = "decide by shape, strides, dtype or values instead, or pass what was decided as an argument"
MODELS = frozenset(["bench", "models", "ops"])  # where this package has lines that a step may consist of
_WIDTH = 2048
_LENDS = ("numpy", "__array__", "__dlpack__")


def user_frame(frame: FrameType | None) -> tuple[str, int]:
    """File and line of the innermost frame that belongs neither to a library below the model nor to this package."""
    while frame is not None:
        if is_users(frame):
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
    return "", 0


def is_users(frame: FrameType) -> bool:
    """Whether a frame runs the user's program, or a library above torch: what a line can be named in."""
    package, _, rest = str(frame.f_globals.get("__name__", "")).partition(".")
    library = package in _LIBRARIES or (package == "graphs" and rest.partition(".")[0] not in MODELS)
    return not library and not frame.f_code.co_filename.startswith("<")


def _asking(frame: FrameType) -> FrameType:
    """The frame that calls a function of torch's; one that is written in Python hands the call over in a frame of its own."""
    method = frame.f_back if frame.f_code is torch.overrides.handle_torch_function.__code__ else None
    return (method.f_back if method is not None else None) or frame


class TensorUse(NamedTuple):
    """A tensor as an operator was given it.

    ``origin`` is ``("argument", position)``, ``("operation", index)`` or ``("external", identity of its storage)``.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: str
    origin: tuple[str, int]


@dataclass(frozen=True, slots=True)
class Operation:
    """One operator call: constants by value, tensors as `TensorUse`, keywords as pairs after the positional arguments."""

    func: OpOverload
    arguments: tuple[Any, ...]
    frame: tuple[str, int]

    @property
    def site(self) -> Site:
        """The user's line that called the operator."""
        return Site.at(self.frame)

    def named(self) -> list[tuple[str, Any]]:
        """The arguments with their names; host data that becomes a tensor is called ``data``."""
        names = [argument.name for argument in self.func._schema.arguments]
        positional = [*names, "data"]
        return [
            value if type(value) is tuple and len(value) == 2 and value[0] in names else (positional[position], value)
            for position, value in enumerate(self.arguments)
        ]


@dataclass
class EagerTrace:
    """What one watched run did.

    Attributes:
        operations: the operators in order.
        findings: what cannot be recorded, in order, one per source line and operator.
        counts: how often each was met, by `Refusal.signature`.
        asked: the Python function of torch that was running when it was met first.
        reads: every value that the host got from a tensor, in order.
        externals: tensors that the step read without having been given or having made them: weights, buffers, caches.
        lent: those whose memory the host was given as an array of NumPy's, as they were then.
        written: externals and arguments that were written in place, saved before the first write.
        generators: generators named explicitly by an operator, with the states they had.
        checksums: of each external when it was first seen.
        origins: where each storage that was seen comes from, by its identity; see `TensorUse`.
        made_at: the lines that made each output and wrote each tensor, by what a mismatch calls them; filled by the trial.
        storages: what keeps identities of storages that are gone from being those of new ones.
    """

    operations: list[Operation] = field(default_factory=list)
    findings: list[Refusal] = field(default_factory=list)
    counts: Counter[tuple[str, str, str, int]] = field(default_factory=Counter)
    asked: dict[tuple[str, str, str, int], str] = field(default_factory=dict)
    reads: list[HostRead] = field(default_factory=list)
    externals: dict[int, Tensor] = field(default_factory=dict)
    lent: TensorState = field(default_factory=TensorState)
    written: TensorState = field(default_factory=TensorState)
    generators: dict[torch.Generator, Tensor] = field(default_factory=dict)
    checksums: dict[int, Tensor] = field(default_factory=dict)
    origins: dict[int, tuple[str, int]] = field(default_factory=dict)
    storages: list[StorageWeakRef] = field(default_factory=list)
    made_at: dict[str, Site] = field(default_factory=dict)

    def found(self, refusal: Refusal, asked: str = "") -> None:
        """Count a finding, and add it unless the same line has reported it."""
        if refusal.signature not in self.counts:
            self.findings.append(refusal)
            self.asked[refusal.signature] = asked
        self.counts[refusal.signature] += 1


class _Watching(TorchDispatchMode):
    """Fills a `EagerTrace` with what reaches the dispatcher."""

    supports_higher_order_operators = True

    def __init__(self, trace: EagerTrace, arguments: list[Tensor], before: EagerTrace | None) -> None:
        super().__init__()
        self.trace = trace
        self.before = before
        self.grad = GradWrites(torch.is_grad_enabled())  # the caller's mode; a step runs without
        self.inside = False
        self.function: list[Any] = []
        self.converting = False
        self.origins = trace.origins
        self.turns: Counter[tuple[str, Place]] = Counter()
        self.raised: list[tuple[str, tuple[str, int], Exception]] = []
        for index, tensor in enumerate(arguments):
            self.origins[storage_id(tensor)] = ("argument", index)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        frame = user_frame(sys._getframe(1))
        with inside(func, args):
            return self._run(func, types, args, kwargs or {}, frame)

    def _run(self, func: Any, types: Any, args: Any, kwargs: Any, frame: tuple[str, int]) -> Any:
        if isinstance(func, HigherOrderOperator):
            return self._run_higher_order(func, args, kwargs, frame)
        wrapper = next((tensor for tensor in tensors_in((*args, kwargs)) if is_wrapper(tensor)), None)
        if wrapper is not None:
            return self._run_wrapped(wrapper, func, types, args, kwargs, frame)
        whole = taken_apart(self, func, args, kwargs)
        if whole is not NotImplemented:
            return whole
        args = as_eager(func, args, kwargs)
        self.inside = True
        try:
            check_once(func, args, kwargs)
        finally:
            self.inside = False
        with torch._C.DisableTorchFunction():
            tensors = self._before(func, args, kwargs, frame)
        self.inside = True
        try:
            result = run(func, args, kwargs)
        except Exception as error:  # where the step goes on, a recording would not know of another outcome
            self.raised.append((str(func), frame, error))
            raise
        finally:
            self.inside = False
        with torch._C.DisableTorchFunction():
            self._after(result, tensors)
            place, turn = self._turn(func)
            if not self.converting and not self._fills_with_host_data(func, args):
                for value in values_read(func, args, kwargs, result):
                    self.read(str(func), frame, value, len(self.trace.operations) - 1, place, turn, self._source(func, args))
        return result

    def _run_wrapped(
        self, wrapper: Tensor, func: OpOverload, types: Any, args: Any, kwargs: dict[str, Any], frame: tuple[str, int]
    ) -> Any:
        """Let the class of a wrapper run an operator: what it calls on the tensors inside is watched."""
        with torch._C.DisableTorchFunction():
            inner = wrapped_tensors(wrapper)
            own = inner is not None and all(self._known(tensor) for tensor in inner)
        if not own:
            detail = f"a {type(wrapper).__name__} that the step did not make: its memory is in other tensors"
            self.trace.found(UnsupportedTensor(detail, operator=str(func), site=Site.at(frame)), self.asked)
        if _is_dispatched_in_c(wrapper):
            return self._run_below(wrapper, func, args, kwargs, frame)
        with self:
            return type(wrapper).__torch_dispatch__(func, types, args, kwargs)

    def _run_below(self, wrapper: Tensor, func: OpOverload, args: Any, kwargs: dict[str, Any], frame: tuple[str, int]) -> Any:
        """Run an operator on a wrapper that torch's own code takes apart, unwatched."""
        detail = f"what a {type(wrapper).__name__} does with the tensors inside it cannot be seen"
        self.trace.found(UnsupportedTensor(detail, operator=str(func), site=Site.at(frame)), self.asked)
        for tensor in written_tensors(func, args, kwargs):
            for each in wrapped_tensors(tensor) or ():
                if not self.made(each):
                    self.trace.written.save(each)
        return func(*args, **kwargs)

    def _known(self, tensor: Tensor) -> bool:
        return self.origins.get(storage_id(tensor), ("external",))[0] != "external"

    def _run_higher_order(self, func: HigherOrderOperator, args: Any, kwargs: dict[str, Any], frame: tuple[str, int]) -> Any:
        """Run an operator that takes functions, unwatched; what it is given may be written."""
        detail = "what the functions it is given do cannot be seen"
        self.trace.found(HigherOrder(detail, operator=func.name(), site=Site.at(frame)), self.asked)
        for tensor in tensors_in((*args, kwargs)):
            if has_storage(tensor) and not self.made(tensor):
                self.trace.written.save(tensor)
        return func(*args, **kwargs)

    def is_argument(self, tensor: Tensor) -> bool:
        """Whether a tensor is an argument or a view of one."""
        return tensor.layout == torch.strided and self.origins.get(storage_id(tensor), ("", 0))[0] == "argument"

    def _turn(self, func: OpOverload) -> tuple[Place | None, int]:
        """The place that calls an operator which may be read from, and how often it did so before."""
        if self.converting or not may_read(func):
            return None, 0
        place = user_place()
        self.turns[str(func), place] += 1
        return place, self.turns[str(func), place] - 1

    def _source(self, func: OpOverload, args: Any) -> str:
        """The operator that made the tensor whose one number is read; empty if none of the step's did."""
        if func is not aten._local_scalar_dense.default:
            return ""
        kind, index = self._origin(args[0])
        return str(self.trace.operations[index].func) if kind == "operation" else ""

    def read(
        self,
        operator: str,
        frame: tuple[str, int],
        value: Any,
        index: int,
        place: Place | None = None,
        turn: int = 0,
        source: str = "",
    ) -> None:
        """Note a value that the host got."""
        self.trace.reads.append(HostRead(operator, self.asked, frame, value, index, place or user_place(), turn, source))

    def made(self, tensor: Tensor) -> bool:
        """Whether a tensor is of the step's own making."""
        return self.origins.get(storage_id(tensor), ("", 0))[0] == "operation"

    @property
    def asked(self) -> str:
        """Name of the Python function of torch that is running, or an empty string."""
        return getattr(self.function[-1], "__name__", "") if self.function else ""

    def _before(self, func: OpOverload, args: Any, kwargs: Any, frame: tuple[str, int]) -> list[Tensor]:
        trace, tensors = self.trace, list[Tensor]()
        if func is aten.lift_fresh.default:  # made from host data just now, at another address each time
            self.origins[storage_id(args[0])] = ("operation", len(trace.operations))
        described = self._describe((*args, *kwargs.items()), tensors)
        if func is aten.lift_fresh.default:
            described = (*described, _host_data(tensors[0]))
        operation = Operation(func, described, frame)
        refusal = None if self._fills_with_host_data(func, args) else finding(func, args, kwargs, tensors, self.function)
        refusal = _unrecordable(func, tensors) or refusal
        if refusal is not None and not self.converting:  # a conversion was reported as a whole
            trace.found(refusal(operator=str(func), site=operation.site), self.asked)
        trace.operations.append(operation)
        written = written_tensors(func, args, kwargs)
        if self.grad.refused(func, tensors, written):
            detail = "in grad mode autograd refuses to write this tensor, or to write to it from one that requires a gradient"
            trace.found(AutogradInput(detail, operator=str(func), site=operation.site), self.asked)
        for tensor in written:
            saved = self.before is not None and storage_id(tensor) in self.before.written
            if self._origin(tensor)[0] != "operation" and not saved:
                trace.written.save(tensor)
        return tensors

    def _fills_with_host_data(self, func: OpOverload, args: Any) -> bool:
        """Whether a mask is filled with a number that the step made from host data: there is nothing to wait for."""
        kind, index = self._origin(args[2]) if func in FILLS else ("", -1)
        return kind == "operation" and self.trace.operations[index].func is aten.lift_fresh.default  # type: ignore[index, call-overload, no-any-return]

    def _after(self, result: Any, tensors: list[Tensor]) -> None:
        """Remember the operation as the origin of every new storage; views keep the origin of their base."""
        index = len(self.trace.operations) - 1
        self.grad.made(self.trace.operations[index].func, tensors, tensors_in(result))
        for tensor in tensors_in(result):
            if not _aliases(tensor, tensors):
                self.origins[storage_id(tensor)] = ("operation", index)
                if has_storage(tensor):
                    self.trace.storages.append(StorageWeakRef(tensor.untyped_storage()))

    def _describe(self, value: Any, tensors: list[Tensor]) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value)
            strides = value.stride() if has_storage(value) else ()
            shape = () if value.is_nested else tuple(value.shape)
            return TensorUse(shape, strides, value.dtype, value.device.type, self._origin(value))
        if isinstance(value, (tuple, list)):
            return tuple(self._describe(item, tensors) for item in value)
        if isinstance(value, torch.Generator):
            if value not in self.trace.generators:
                self.trace.generators[value] = value.get_state()
            return "generator"
        if isinstance(value, torch.ScriptObject):  # not comparable, and another Python object each time it is passed
            return str(value._type().qualified_name())
        return value

    def _origin(self, tensor: Tensor) -> tuple[str, int]:
        storage = storage_id(tensor)
        origin = self.origins.get(storage)
        if origin is None:
            self.trace.externals[storage] = tensor
            if self.before is None and has_storage(tensor):
                self.trace.checksums[storage] = _checksum(tensor)
            origin = self.origins[storage] = ("external", storage)
        return origin


def _is_dispatched_in_c(wrapper: Tensor) -> bool:
    """Whether the class of a wrapper only calls the operator again, which C++ then takes apart: a `DTensor`."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(wrapper, module.DTensor)


def _unrecordable(func: OpOverload, tensors: list[Tensor]) -> Callable[..., Refusal] | None:
    """What no recording can hold whatever the values are: a collective, a tensor without a storage."""
    if func.namespace == "c10d":
        return functools.partial(Collective, "what was begun here is waited for by Python")
    odd = next((tensor for tensor in tensors if not has_storage(tensor)), None)
    if odd is None:
        return None
    kind = "nested tensor" if odd.is_nested else f"tensor with layout {odd.layout}"
    return functools.partial(UnsupportedTensor, f"a {kind} is no dense memory of its own")


class _Conversions(Calls):
    """Reports conversions to host objects, and tells the dispatch mode which Python function is running."""

    def __init__(self, watch: _Watching) -> None:
        super().__init__()
        self.watch = watch
        self.grad_mode = torch.is_grad_enabled()  # the caller's; a step runs without

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with inside(func, args):
            return self._run(func, args, kwargs or {}, sys._getframe(1))

    def _run(self, func: Any, args: Any, kwargs: Any, caller: FrameType) -> Any:
        if self.grad_mode and func in GRAD_PROPERTIES:
            self._asked_of(args[0], GRAD_PROPERTIES[func], caller)
        if func is torch._C._set_grad_enabled:
            self.watch.grad.switched(args[0], caller)
        if func in FROM_LISTS:
            self._read_elements(func, args, kwargs)
        elif func in SPLITS and any(isinstance(value, Tensor) for value in (*args[1:], *kwargs.values())):
            detail, site = "the boundaries are read on the host", Site.at(user_frame(caller))
            self.watch.trace.found(HiddenRead(detail, operator="torch.tensor_split", site=site), "tensor_split")
        elif func in OF_THE_OBJECT and not self.watch.inside:
            self._read_property(func, args, _asking(caller))
        self.watch.function.append(func)
        try:
            if func in TO_HOST and leaves_the_device(func, args, kwargs):
                return self._convert(func, args, kwargs)
            with called(func):
                return func(*args, **kwargs)
        finally:
            self.watch.function.pop()

    def _asked_of(self, tensor: Tensor, name: str, frame: FrameType) -> None:
        """Report that the step asks of a tensor of its own making what autograd keeps of it."""
        if is_users(frame) and self.watch.made(tensor):
            self.asked_by(frame, f"Tensor.{name}")

    def asked_by(self, frame: FrameType, operator: str = "torch.is_grad_enabled") -> None:
        """Report that the step asks whether gradients are recorded, in grad mode."""
        at = Site.at(user_frame(frame))
        detail = "the step asks whether gradients are recorded: they are, but not in a recording"
        self.watch.trace.found(AutogradInput(detail, operator=operator, site=at), operator)

    def _read_property(self, func: Any, args: Any, frame: FrameType) -> None:
        """Report what the user's own code asks of an argument and no copy of it can answer."""
        if not is_users(frame) or not issubclass(type(args[0]), Tensor):
            return
        of_state = func is _VERSION and not self.watch.made(args[0])  # where a tensor of the step's own lies is checked
        if of_state or self.watch.is_argument(args[0]):
            operator = f"Tensor.{OF_THE_OBJECT[func]}"
            detail = "it is asked of an argument, has another answer at each call, and a replay would know only the recorded one"
            self.watch.trace.found(UnsupportedArgument(detail, operator=operator, site=Site.at(user_frame(frame)), remedy=_ASKED))

    def _convert(self, func: Any, args: Any, kwargs: Any) -> Any:
        watch, operator = self.watch, f"Tensor.{TO_HOST[func]}"
        frame, index = user_frame(sys._getframe(2)), len(watch.trace.operations)
        watch.trace.found(HostSync(f"{operator}() copies a tensor to the host", operator=operator, site=Site.at(frame)))
        if TO_HOST[func] in _LENDS and not watch.made(args[0]) and args[0].device.type == "cpu" and has_storage(args[0]):
            with _disable_current_modes():  # what is looked at here is not done by the step
                watch.trace.lent.save(args[0])
        watch.converting = True
        try:
            result = func(*args, **kwargs)
        finally:
            watch.converting = False
        watch.read(
            operator,
            frame,
            result.tolist() if operator == "Tensor.numpy" else result if operator == "Tensor.tolist" else None,
            index,
        )
        return result

    def _read_elements(self, func: Any, args: Any, kwargs: Any) -> None:
        """Report tensors in a list that becomes a tensor: they are read below the dispatcher."""
        data = [*args, *kwargs.values()]
        elements = [tensor for value in data if not isinstance(value, Tensor) for tensor in tensors_in(value)]
        if not elements:
            return
        watch, operator = self.watch, f"torch.{func.__name__}"
        frame, index = user_frame(sys._getframe(2)), len(watch.trace.operations)
        watch.trace.found(HostSync("the elements of the new tensor are read by the host", operator=operator, site=Site.at(frame)))
        watch.function.append(func)
        with _disable_current_modes():
            for tensor in elements:
                watch.read(operator, frame, tensor.tolist(), index)
        watch.function.pop()


def _host_data(tensor: Tensor) -> str:
    """Host data that becomes a tensor, as text to compare."""
    return str(tensor.tolist()) if tensor.numel() <= 64 else f"{tensor.numel()} numbers with checksum {int(_checksum(tensor)):#x}"


def _aliases(tensor: Tensor, others: list[Tensor]) -> bool:
    storage = storage_id(tensor)
    return any(storage_id(other) == storage for other in others)


@contextlib.contextmanager
def _raw_launches(watch: _Watching) -> Iterator[None]:
    """Report Triton kernels that are launched outside any operator: no schema says what they write."""
    triton = sys.modules.get("triton")
    if triton is None:
        yield
        return

    def launched(metadata: Any) -> None:
        if not watch.inside:
            name = metadata.get()["name"] if hasattr(metadata, "get") else "triton kernel"
            watch.trace.found(
                OpaqueKernel(
                    "a Triton kernel is launched directly", operator=str(name), site=Site.at(user_frame(sys._getframe(1)))
                )
            )

    hooks = triton.knobs.runtime.launch_enter_hook
    hooks.add(launched)
    try:
        yield
    finally:
        hooks.remove(launched)


def trace_again(fn: Callable[[], Any], arguments: list[Tensor], before: EagerTrace) -> tuple[Any, EagerTrace]:
    """Watch another run of a step; what it writes beyond what ``before`` saved is put back, also when it raises.

    So are generators that it draws from and ``before`` did not. `EagerTrace.written` tells what was written. What ``before``
    is the caller's to restore.
    """
    trace = EagerTrace()
    try:
        return trace_eager(fn, arguments, before, trace)
    finally:
        trace.written.restore()
        for generator, state in trace.generators.items():
            if generator not in before.generators:
                generator.set_state(state)


def trace_eager(
    fn: Callable[[], Any], arguments: list[Tensor], before: EagerTrace | None = None, into: EagerTrace | None = None
) -> tuple[Any, EagerTrace]:
    """Run ``fn`` once, eagerly and for real, and return its output with the trace.

    Args:
        fn: the step with its arguments bound.
        arguments: the tensor arguments, so that they are not taken for externals.
        before: the trace of an earlier run of the same step. What it saved is not saved again, so `EagerTrace.written` holds
            only what is written in addition, and checksums are not taken.
        into: the trace to fill, for callers that need it when ``fn`` raises.
    """
    trace = into if into is not None else EagerTrace()
    watch = _Watching(trace, arguments, before)
    conversions = _Conversions(watch)
    asking = grad_questions(conversions.asked_by, is_users) if conversions.grad_mode else contextlib.nullcontext()
    with torch.compiler.set_stance("force_eager"), _raw_launches(watch), unnoticed(), asking, conversions, watch:
        output = fn()
    for operator, frame, error in watch.raised:
        detail = f"the step catches the {type(error).__name__} that an operator raises with this call's data"
        trace.found(StepRaises(detail, operator=operator, site=Site.at(frame)))
    known = [trace.written, *([before.written] if before is not None else [])]
    written = trace.lent.changed(known)
    trace.written.also(written)
    for tensor in written.tensors:
        detail = f"memory of a tensor{tuple(tensor.shape)} that NumPy was given is written, which no operator says"
        trace.found(UndeclaredWrite(detail, operator="Tensor.numpy"))
    for storage, checksum in trace.checksums.items():
        tensor = trace.externals[storage]
        if storage not in trace.written and not torch.equal(checksum, _checksum(tensor)):
            by = _last_reader(trace, storage)
            detail = f"a tensor{tuple(tensor.shape)} changed though no operator says that it writes it"
            trace.found(UndeclaredWrite(detail, operator=str(by.func), site=by.site))
    return output, trace


def _last_reader(trace: EagerTrace, storage: int) -> Operation:
    """The operator that a write to an external is most likely to come from: the last that was given it, not ATen's."""
    readers = [o for o in trace.operations if _mentions(o.arguments, ("external", storage))]
    foreign = [o for o in readers if o.func.namespace != "aten"]
    return (foreign or readers)[-1]


def _mentions(value: Any, origin: tuple[str, int]) -> bool:
    return value == origin or (isinstance(value, tuple) and any(_mentions(item, origin) for item in value))


def _checksum(tensor: Tensor) -> Tensor:
    """A number of the bits of the whole storage and of their order: enough to notice that somebody wrote there."""
    with torch.inference_mode(False), torch.no_grad():
        storage = tensor.untyped_storage()
        flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)  # type: ignore[call-overload]
        words = flat[: flat.numel() // 8 * 8].view(torch.int64)
        table = words[: words.numel() // _WIDTH * _WIDTH].view(-1, _WIDTH)
        rest = flat[words.numel() * 8 :].to(torch.int64)
        parts = (table.sum(0), table.sum(1), words[table.numel() :], rest)
        return torch.stack([(part * torch.arange(1, part.numel() + 1, device=part.device)).sum() for part in parts]).sum()


def compare_traces(first: EagerTrace, second: EagerTrace) -> Refusal | None:
    """The first operator or value that differs between two consecutive steps, as a refusal, or None."""
    for index, (a, b) in enumerate(zip(first.operations, second.operations, strict=False)):
        if a.func is not b.func:
            return ChangingValue(f"operation {index} was {a.func}, then {b.func}", operator=str(b.func), site=b.site)
        difference = _difference(a.arguments, b.arguments)
        if difference:
            return ChangingValue(f"an argument of the operator {difference}", operator=str(b.func), site=b.site)
    if len(first.operations) != len(second.operations):
        extra = max(first.operations, second.operations, key=len)[min(len(first.operations), len(second.operations))]
        detail = f"one step ran {len(first.operations)} operators, the next {len(second.operations)}"
        return ChangingValue(detail, operator=str(extra.func), site=extra.site)
    return None


def _difference(a: Any, b: Any) -> str:
    if isinstance(a, tuple) and isinstance(b, tuple):
        if len(a) == len(b) == 2 and a[0] == b[0] == "external":
            return "" if a[1] == b[1] else "reads another tensor in place than in the step before"
        if len(a) != len(b):
            return f"had {len(a)} parts, then {len(b)}"
        return next((text for x, y in zip(a, b, strict=True) if (text := _difference(x, y))), "")
    if type(a) is type(b) and (a is b or a == b or (isinstance(a, float) and a != a and b != b)):
        return ""
    return f"was {a!r}, then {b!r}"


class _LastOperator(TorchDispatchMode):
    """Remembers the operator that runs now."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.operator = ""
        self.site = Site()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, HigherOrderOperator) or any(map(is_wrapper, tensors_in((*args, kwargs or {})))):
            self.operator, self.site = str(func), Site.at(user_frame(sys._getframe(1)))
            return func(*args, **(kwargs or {}))
        whole = taken_apart(self, func, args, kwargs or {})
        if whole is not NotImplemented:
            return whole
        self.operator, self.site = str(func), Site.at(user_frame(sys._getframe(1)))
        return run(func, args, kwargs or {})


def last_operation(body: Callable[[Any], Any]) -> tuple[Callable[[Any], Any], _LastOperator]:
    """``body`` run so that, when it raises, the second result names the operator and line it had reached."""
    mode = _LastOperator()

    def watched(tensors: Any) -> Any:
        with torch.compiler.set_stance("force_eager"), unnoticed(), Calls(), mode:
            return body(tensors)

    return watched, mode
