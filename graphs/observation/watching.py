"""The dispatch mode of a watched run: every operator, what it reads in place and what it writes."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.multiprocessing.reductions import StorageWeakRef

from graphs.errors import (
    AutogradInput,
    Collective,
    HigherOrder,
    OpaqueKernel,
    Refusal,
    Site,
    UnsupportedTensor,
)
from graphs.observation.grad_questions import GradWrites
from graphs.observation.host_reads import FILLS, HostRead, finding, may_read, values_read
from graphs.observation.operations import EagerTrace, Operation, TensorUse
from graphs.python_reads.call_hook import Awake, resting, wake
from graphs.state.checksums import Checksums, checksum
from graphs.state.op_registry import check_once
from graphs.state.storage import has_storage, is_wrapper, storage_id, tensors_in, wrapped_tensors, written_tensors
from graphs.state.tensor_state import TensorState
from passes import Place, inside, user_place
from passes.core.composites import DispatchMode, as_eager, run, taken_apart
from passes.core.source_location import user_line

Tensor = torch.Tensor
aten = torch.ops.aten
_PLAIN = (Tensor, torch.nn.Parameter)
_CONSTANTS = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format))
_KNOWN = _CONSTANTS | {*_PLAIN}
"""Classes of arguments that are no wrappers and hold none."""


class Watching(DispatchMode):
    """Fills a `EagerTrace` with what reaches the dispatcher."""

    supports_higher_order_operators = True

    def __init__(self, trace: EagerTrace, arguments: list[Tensor], before: EagerTrace | None) -> None:
        super().__init__()
        self.trace = trace
        self.before = before
        self.grad = GradWrites(torch.is_grad_enabled())  # the caller's mode; a step runs without
        self.awake = Awake(None)
        self.inside = False
        self.function: list[Any] = []
        self.converting = False
        self.origins = trace.origins
        self.checksums = Checksums(trace.origins, taken=before is None)
        self.turns: Counter[tuple[str, Place]] = Counter()
        self.raised: list[tuple[str, tuple[str, int], Exception]] = []
        for index, tensor in enumerate(arguments):
            self.origins[storage_id(tensor)] = ("argument", index)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        hook = resting()
        try:
            if hook is not None:
                self.awake = Awake(hook)
            frame = user_line(sys._getframe(1))
            with inside(func, args):
                return self._run(func, types, args, kwargs or {}, frame)
        finally:
            wake(hook)

    def _run(self, func: Any, types: Any, args: Any, kwargs: Any, frame: tuple[str, int]) -> Any:
        if isinstance(func, HigherOrderOperator):
            return self._run_higher_order(func, args, kwargs, frame)
        plain = not kwargs and all([type(value) in _KNOWN for value in args])
        wrapper = None if plain else next((tensor for tensor in tensors_in((*args, kwargs)) if is_wrapper(tensor)), None)
        if wrapper is not None:
            return self._run_wrapped(wrapper, func, types, args, kwargs, frame)
        with self.awake:
            whole = taken_apart(self, func, args, kwargs)
        if whole is not NotImplemented:
            return whole
        args = as_eager(func, args, kwargs)
        self.inside = True
        try:
            self.trace.written.misdeclared = check_once(func, args, kwargs) or self.trace.written.misdeclared
        finally:
            self.inside = False
        with torch._C.DisableTorchFunction():
            tensors = self._before(func, args, kwargs, frame)
        self.inside = True
        try:
            with self.awake:
                result = run(func, args, kwargs)
        except Exception as error:  # where the step goes on, a recording would not know of another outcome
            self.raised.append((str(func), frame, error))
            raise
        finally:
            self.inside = False
        with torch._C.DisableTorchFunction():
            self._after(result, tensors)
            if self.converting or not may_read(func):
                return result
            place, turn = self._turn(func)
            if not self._fills_with_host_data(func, args):
                for value in values_read(func, args, kwargs, result):
                    self.read(str(func), frame, value, len(self.trace.operations) - 1, place, turn, self._source(func, args))
        return result

    def _run_wrapped(
        self, wrapper: Tensor, func: OpOverload, types: Any, args: Any, kwargs: dict[str, Any], frame: tuple[str, int]
    ) -> Any:
        """Let the class of a wrapper run an operator: what it calls on the tensors inside is watched."""
        with torch._C.DisableTorchFunction():
            inner = wrapped_tensors(wrapper)
            unknown = ("external", 0)
            own = inner is not None and all(self.origins.get(storage_id(each), unknown)[0] != "external" for each in inner)
        if not own:
            detail = f"a {type(wrapper).__name__} that the step did not make: its memory is in other tensors"
            self.trace.found(UnsupportedTensor(detail, operator=str(func), site=Site.at(frame)), self.asked)
        if _is_dispatched_in_c(wrapper):
            detail = f"what a {type(wrapper).__name__} does with the tensors inside it cannot be seen"
            self.trace.found(UnsupportedTensor(detail, operator=str(func), site=Site.at(frame)), self.asked)
            self._save(inside for tensor in written_tensors(func, args, kwargs) for inside in wrapped_tensors(tensor) or ())
            with self.awake:
                return func(*args, **kwargs)
        with self, self.awake:
            return type(wrapper).__torch_dispatch__(func, types, args, kwargs)

    def _run_higher_order(self, func: HigherOrderOperator, args: Any, kwargs: dict[str, Any], frame: tuple[str, int]) -> Any:
        """Run an operator that takes functions, unwatched; what it is given may be written."""
        detail = "what the functions it is given do cannot be seen"
        self.trace.found(HigherOrder(detail, operator=func.name(), site=Site.at(frame)), self.asked)
        self._save(tensor for tensor in tensors_in((*args, kwargs)) if has_storage(tensor))
        with self.awake:
            return func(*args, **kwargs)

    def _save(self, tensors: Iterable[Tensor]) -> None:
        """Save what may be written unseen, but for what the step made."""
        for tensor in tensors:
            if not self.made(tensor):
                self.trace.written.save(tensor)

    def is_argument(self, tensor: Tensor) -> bool:
        """Whether a tensor is an argument or a view of one."""
        return tensor.layout == torch.strided and self.origins.get(storage_id(tensor), ("", 0))[0] == "argument"

    def _turn(self, func: OpOverload) -> tuple[Place, int]:
        """The place that calls an operator which may be read from, and how often it did so before."""
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
        """Note a call of an operator and save what it writes; returns the tensors it is given."""
        trace, tensors = self.trace, list[Tensor]()
        if func is aten.lift_fresh.default:  # made from host data just now, at another address each time
            self.origins[storage_id(args[0])] = ("operation", len(trace.operations))
        described = tuple([self._describe(value, tensors) for value in (*args, *kwargs.items())])
        if func is aten.lift_fresh.default:
            described = (*described, _host_data(tensors[0]))
        if func.namespace != "aten":
            self.checksums.hand_out(tensors)
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
            if self._origin(tensor)[0] != "operation":
                self._saving(tensor).save_written(func, args, kwargs, tensor)
        return tensors

    def _saving(self, tensor: Tensor) -> TensorState:
        """Where what is written of a tensor is saved: with what the run before wrote of it, else with this one's."""
        before = self.before
        return before.written if before is not None and storage_id(tensor) in before.written else self.trace.written

    def _fills_with_host_data(self, func: OpOverload, args: Any) -> bool:
        """Whether a mask is filled with a number that the step made from host data: there is nothing to wait for."""
        kind, index = self._origin(args[2]) if func in FILLS else ("", -1)
        return kind == "operation" and self.trace.operations[index].func is aten.lift_fresh.default  # type: ignore[index, call-overload, no-any-return]

    def _after(self, result: Any, tensors: list[Tensor]) -> None:
        """Remember the operation as the origin of every new storage; views keep the origin of their base."""
        index = len(self.trace.operations) - 1
        results, given = tensors_in(result), {*map(storage_id, tensors)}  # as they are now: `set_` gives one another storage
        self.grad.made(self.trace.operations[index].func, tensors, results)
        for tensor in results:
            storage = storage_id(tensor)
            if storage not in given:
                self.origins[storage] = ("operation", index)
                if has_storage(tensor):
                    self.trace.storages.append(StorageWeakRef(tensor.untyped_storage()))

    def _describe(self, value: Any, tensors: list[Tensor]) -> Any:
        kind = type(value)
        if kind in _CONSTANTS:
            return value
        if kind in _PLAIN and value.layout is torch.strided and not value.is_nested:
            tensors.append(value)
            return TensorUse(tuple(value.shape), value.stride(), value.dtype, value.device.type, self._origin(value))
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
            self.checksums.see(tensor, storage)
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


def _host_data(tensor: Tensor) -> str:
    """Host data that becomes a tensor, as text to compare."""
    return str(tensor.tolist()) if tensor.numel() <= 64 else f"{tensor.numel()} numbers with checksum {int(checksum(tensor)):#x}"


@contextlib.contextmanager
def raw_launches(watch: Watching) -> Iterator[None]:
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
                    "a Triton kernel is launched directly", operator=str(name), site=Site.at(user_line(sys._getframe(1)))
                )
            )

    hooks = triton.knobs.runtime.launch_enter_hook
    hooks.add(launched)
    try:
        yield
    finally:
        hooks.remove(launched)
