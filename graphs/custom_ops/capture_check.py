"""`capture_check`: what a recording of one operator would get wrong. PyTorch's `opcheck` has nothing of this.

The operator runs many times on copies of the arguments: twice alike, with its arguments elsewhere, watched from inside, with
other data; then it is recorded and replayed. Each run is compared with the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch._ops import OpOverload
from torch.utils import _pytree

from graphs.contract.slots import make_contract
from graphs.errors import (
    CaptureFailed,
    ChangingValue,
    ConfigError,
    DataDependentShape,
    HiddenState,
    OpaqueKernel,
    Refusal,
    UndeclaredWrite,
    UnsupportedArgument,
    UnsupportedOperator,
    VerifyMismatch,
)
from graphs.numerics import tolerance
from graphs.observation.compare_traces import compare_traces
from graphs.observation.eager_trace import trace_eager
from graphs.observation.host_reads import host_finding
from graphs.observation.operations import EagerTrace, Operation, TensorUse
from graphs.recording.choose import recorder_for
from graphs.rehearsal.rehearsal import Runs, States
from graphs.state.op_registry import overload_of, registered
from graphs.state.python_state import PythonState
from graphs.state.regions import overlaps, written_region
from graphs.state.storage import tensors_in
from graphs.state.tensor_state import RandomState
from passes.core.schema import written_arguments

Tensor = torch.Tensor
_ITS_OWN_AFFAIR = (OpaqueKernel, UnsupportedArgument)  # an operator launches kernels, and asks where its arguments lie
_ALLOCATES = ("empty", "zeros", "ones", "full", "resize")
_MISMATCH = "look for work that leaves PyTorch: another stream, memory reached through its address, a value read by the host"


def capture_check(
    op: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, *, others: Sequence[Sequence[Any]] = ()
) -> None:
    """Raise what a recording of ``op`` would get wrong; return if it would get nothing wrong. For users' tests.

    The arguments are copied and left alone. Found are, each named with the operator, the line and what to change:

    - ``host-sync``, ``data-dependent-shape``, ``host-constant``: inside the operator, where a step's own check cannot look;
    - ``undeclared-write``: an argument is written that ``mutates_args`` does not name;
    - ``hidden-state``: a result depends on an earlier call (a counter, an address or tensor that was kept), on random
      numbers that no tag announces, or something that is no argument is changed;
    - ``changing-value``: other operators run with other data;
    - ``capture-failed``, ``unsupported-operator``: the device refuses to record it;
    - ``verify-mismatch``: a replay, with new data at new addresses, differs from eager.

    Args:
        op: what `register_op` or `torch.library.custom_op` returned, or an operator of ``torch.ops``.
        args, kwargs: of one call, as the operator takes them, on the device to check.
        others: arguments of further calls, alike in all but the data of tensors. Default: one with floating-point numbers
            drawn from those in ``args``, and smaller; integers and flags, which may be indices and masks, stay.

    Raises:
        Refusal: what was found first.
        ConfigError: ``op`` is no operator, ``others`` differ in more than data, or ``writes`` returns what is not legal.
    """
    subject = _Subject(overload_of(op), tuple(args), dict(kwargs or {}))
    datasets = [subject.leaves_of(other) for other in others] or [_redrawn(subject.tensors)]
    random, python = RandomState(subject.device), PythonState([("op", subject.function)])
    with torch.no_grad():
        Runs(States(random, python), EagerTrace(), is_there=True).run(lambda: _check(subject, datasets, random))


class _Subject:
    """The operator with the structure of its arguments."""

    def __init__(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.func = func
        self.leaves, self.structure = _pytree.tree_flatten((args, kwargs))
        self.positions = [index for index, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]
        self.tensors: list[Tensor] = [self.leaves[index].detach() for index in self.positions]
        self.device = _device_of(self.leaves)
        self.seeded = torch.Tag.nondeterministic_seeded in func.tags
        known = registered(func)
        definition = OPDEFS.get(func._schema.name)
        self.function = known.function if known is not None else getattr(definition, "_init_fn", None)
        self.names, self.declared = self._arguments(args, kwargs)

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[str], list[bool]]:
        """The argument that each tensor belongs to, and whether the schema says that it is written."""
        names = [argument.name for argument in self.func._schema.arguments]
        given = [*zip(names, args, strict=False), *kwargs.items()]
        owners = [name for name, value in given for leaf in _pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
        written = written_arguments(self.func)
        return owners, [name in written for name in owners]

    def leaves_of(self, other: Sequence[Any]) -> list[Tensor]:
        """The tensors of another call, which must be like the first in all but data."""
        leaves, structure = _pytree.tree_flatten((tuple(other), {}))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        alike = structure == self.structure and [_kind(leaf) for leaf in leaves] == [_kind(leaf) for leaf in self.leaves]
        if not alike:
            raise ConfigError("others", [_kind(leaf) for leaf in leaves], f"like args: {[_kind(leaf) for leaf in self.leaves]}")
        return [tensor.detach() for tensor in tensors]

    def bound(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with ``tensors`` in place of the given ones."""
        leaves = list(self.leaves)
        for index, tensor in zip(self.positions, tensors, strict=True):
            leaves[index] = tensor
        return _pytree.tree_unflatten(leaves, self.structure)

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Call the operator. Returns its results and the arguments it writes, as it left them."""
        args, kwargs = self.bound(tensors)
        return self._produced(self.func(*args, **kwargs), tensors)

    def run_inside(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The same, but the kernel is called directly, so that a mode sees the operators inside."""
        args, kwargs = self.bound(tensors)
        key = torch._C.DispatchKey.CUDA if self.device.type == "cuda" else torch._C.DispatchKey.CPU
        return self._produced(self.func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs), tensors)

    def _produced(self, result: Any, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [*tensors_in(result), *(t for t, written in zip(tensors, self.declared, strict=True) if written)]

    def error(self, kind: type[Refusal], detail: str, **more: Any) -> Refusal:
        """A refusal that names the operator."""
        return kind(detail, operator=str(self.func), **more)


def _check(subject: _Subject, datasets: list[list[Tensor]], random: RandomState) -> None:
    draws = Runs(random, EagerTrace())

    def eager(tensors: list[Tensor]) -> list[Tensor]:
        if subject.seeded:
            draws.reset()
        return _copies(subject.run(tensors))

    first = _copies(subject.tensors)
    reference = eager(first)  # kernels are compiled, caches are filled
    trace = _check_inside(subject)
    _check_repeats(subject, eager, first, reference)
    runs = [("the same data", subject.tensors, reference)]
    for data in datasets:
        given = _copies(data)
        result = eager(given)
        _check_written(subject, data, given)
        _check_other_data(subject, trace, reference, data, result)
        runs.append(("other data", data, result))
    _check_replays(subject, draws, [*runs, runs[0]], trace)


def _check_inside(subject: _Subject) -> EagerTrace:
    """Watch the kernel itself: what it asks of the host, what it changes that is not an argument, what it writes."""
    own = host_finding(subject.func, *subject.bound(subject.tensors), subject.tensors, [])
    if own is not None:
        raise own(operator=str(subject.func))
    tensors, before, states = _copies(subject.tensors), PythonState([("op", subject.function)]), _random_states(subject.device)
    trace = EagerTrace()

    def look_inside() -> None:
        trace_eager(lambda: subject.run_inside(tensors), tensors, into=trace)
        _check_trace(subject, trace, tensors, _externals_written(subject))
        _check_hidden(subject, before, states)

    Runs(trace.written, trace, is_there=True).run(look_inside)
    return trace


def _check_trace(subject: _Subject, trace: EagerTrace, tensors: list[Tensor], kept: set[int]) -> None:
    """What the operators inside ask of the host and write, of ``tensors`` and of storages that are no arguments (``kept``)."""
    found = next((found for found in trace.findings if not isinstance(found, _ITS_OWN_AFFAIR)), None)
    if found is not None:
        detail = f"inside it, {found.operator}: {found.detail}"
        raise subject.error(type(found), detail, site=found.site, remedy=found.remedy)
    _check_written(subject, subject.tensors, tensors)
    for operation in trace.operations:
        unnamed = [index for kind, index in (tensor.origin for tensor in operation.written()) if kind == "argument"]
        for index in unnamed:
            if not subject.declared[index]:
                detail = (
                    f"inside it, {operation.func} writes its argument {subject.names[index]!r}, which mutates_args does not name"
                )
                raise subject.error(UndeclaredWrite, detail, site=operation.site)
        if not kept.isdisjoint(_written_by(operation)):
            detail = f"inside it, {operation.func} writes a tensor that is not an argument"
            raise subject.error(HiddenState, detail, site=operation.site)


def _check_written(subject: _Subject, before: Sequence[Tensor], after: list[Tensor]) -> None:
    """That a call changed only the arguments that its author declares, and of them the rows that ``writes`` names."""
    for index, (name, declared) in enumerate(zip(subject.names, subject.declared, strict=True)):
        if not declared and not tolerance.bitwise_equal([before[index]], [after[index]]):
            raise subject.error(UndeclaredWrite, f"it writes its argument {name!r}, which mutates_args does not name")
        if declared and not tolerance.bitwise_equal([_with_rows_of(subject, before, after, index)], [after[index]]):
            raise subject.error(UndeclaredWrite, f"it writes its argument {name!r} beyond the rows that writes names")


def _with_rows_of(subject: _Subject, before: Sequence[Tensor], after: list[Tensor], index: int) -> Tensor:
    """An argument as it was before a call, with what its author says that is written as it is after it."""
    copies = _copies(before)
    args, kwargs = subject.bound(copies)
    region = written_region(subject.func, args, kwargs, copies[index])
    if region.indices is None:
        return after[index]
    region.write(region.entries_of(after[index].contiguous()))
    return copies[index]


def _check_hidden(subject: _Subject, before: PythonState, states: list[Tensor]) -> None:
    """What the function behind the operator changed of Python, and of generators that were in ``states``."""
    change = next(iter(before.differences()), None)
    if change is not None:
        detail = f"a call changed {change.path} from {change.before} to {change.after}, which a replay would not"
        raise subject.error(HiddenState, detail)
    if not subject.seeded and not all(map(torch.equal, states, _random_states(subject.device))):
        remedy = "register it with tags=(torch.Tag.nondeterministic_seeded,)"
        raise subject.error(HiddenState, "it draws random numbers, and no tag says so", remedy=remedy)


def _watched(subject: _Subject, tensors: list[Tensor]) -> EagerTrace:
    """A watched run of the kernel, undone."""
    trace = EagerTrace()
    runs = Runs(trace.written, trace, is_there=True)
    runs.run(lambda: trace_eager(lambda: subject.run_inside(tensors), tensors, into=trace))
    return trace


def _check_repeats(
    subject: _Subject, eager: Callable[[list[Tensor]], list[Tensor]], first: list[Tensor], reference: list[Tensor]
) -> None:
    """The first call, repeated at its addresses; then elsewhere, with nothing left at those addresses."""
    for tensor, given in zip(first, subject.tensors, strict=True):
        tensor.copy_(given)
    found = tolerance.first_difference(reference, eager(first))
    if found is not None:
        detail = f"called twice with the same arguments, output {found[0]} {found[1].replace('eager', 'the first call')}"
        raise subject.error(HiddenState, detail)
    for tensor in first:
        tensor.zero_()
    found = tolerance.first_difference(reference, eager(_copies(subject.tensors)))
    if found is not None:
        detail = f"called with its arguments elsewhere, output {found[0]} {found[1].replace('eager', 'the first call')}"
        raise subject.error(HiddenState, f"{detail}: it keeps an address or a tensor of an earlier call")


def _check_other_data(
    subject: _Subject, trace: EagerTrace, reference: list[Tensor], data: list[Tensor], result: list[Tensor]
) -> None:
    """Other data must give results of the same shapes, by the same operators."""
    for index, (one, other) in enumerate(zip(reference, result, strict=True)):
        if one.shape != other.shape:
            detail = f"output {index} has shape {tuple(one.shape)}, and {tuple(other.shape)} with other data"
            raise subject.error(DataDependentShape, detail)
    found = compare_traces(_comparable(trace), _comparable(_watched(subject, _copies(data))))
    if found is not None:
        sized = any(word in found.operator for word in _ALLOCATES)
        detail = f"inside it, with other data, {found.operator}: {found.detail}"
        raise subject.error(DataDependentShape if sized else ChangingValue, detail, site=found.site)


def _check_replays(
    subject: _Subject, draws: Runs, runs: Sequence[tuple[str, list[Tensor], list[Tensor]]], trace: EagerTrace
) -> None:
    """Record the operator, and replay it on every data set, each time at new addresses."""
    recorder, operator = recorder_for(subject.device), str(subject.func)
    why = recorder.refuses(operator)
    if why is not None:
        raise subject.error(UnsupportedOperator, why)
    contract = make_contract(subject.names, _copies(subject.tensors), (), {}, (), None)
    slots = tuple(dataclasses.replace(slot, strides=None) for slot in contract.slots)  # other data may have other strides
    contract = dataclasses.replace(contract, slots=slots, output_dims=(None,) * len(runs[0][2]))
    recorder.run(lambda: subject.run(_copies(subject.tensors)))
    try:
        generators = tuple(trace.generators)
        recording = recorder.record(subject.run, contract, _copies(subject.tensors), owned=True, generators=generators)
    except (CaptureFailed, UnsupportedOperator) as failure:
        raise subject.error(type(failure), failure.detail, remedy=failure.remedy) from failure
    kept = []
    for number, (what, data, wanted) in enumerate(runs, start=1):
        kept.append(_copies(data))  # so that no address comes back
        if subject.seeded:
            draws.reset()
        found = tolerance.first_difference(wanted, recording.replay(kept[-1], 1))
        if found is not None:
            detail = f"replay {number}, with {what} at new addresses: output {found[0]} {found[1]}"
            raise subject.error(VerifyMismatch, detail, remedy=_MISMATCH)


def _externals_written(subject: _Subject) -> set[int]:
    """The storages that another run writes and neither makes nor is given, as far as they are visible."""
    trace = _watched(subject, _copies(subject.tensors))
    return {storage for operation in trace.operations for storage in _written_by(operation)}


def _written_by(operation: Operation) -> set[int]:
    """The storages that one operator wrote, of those that nobody was seen to make."""
    return {int(tensor.origin[1]) for tensor in operation.written() if tensor.origin[0] == "external"}


def _comparable(trace: EagerTrace) -> EagerTrace:
    """The operations without the identity of memory: kernels in C++ allocate some of it out of sight."""

    def placeless(value: Any) -> Any:
        if isinstance(value, TensorUse):
            return value._replace(origin=("external", 0)) if value.origin[0] == "external" else value
        return tuple(map(placeless, value)) if type(value) is tuple else value

    operations = [dataclasses.replace(o, arguments=placeless(o.arguments)) for o in trace.operations]
    return EagerTrace(operations=operations)


def _random_states(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _device_of(value: Any) -> torch.device:
    """The device an operator runs on: that of a tensor on a GPU, if there is one."""
    devices = [leaf.device for leaf in _pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def _kind(leaf: Any) -> Any:
    return (tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same data elsewhere."""
    return [tensor.clone() for tensor in tensors]


def _redrawn(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Floating-point data drawn anew from the elements of each tensor, and up to halved: what is positive stays so."""
    generator = torch.Generator().manual_seed(0)
    return [_draw(tensor, generator) if tensor.is_floating_point() else tensor for tensor in tensors]


def _draw(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Other data in the same layout; the tensor itself where two of its elements are one memory."""
    if not tensor.numel() or overlaps(tensor):
        return tensor
    index = torch.randint(tensor.numel(), (tensor.numel(),), generator=generator).to(tensor.device)
    if tensor.element_size() == 1:  # few operators know 8-bit floating point
        drawn = tensor.contiguous().view(torch.uint8).reshape(-1)[index].view(tensor.dtype)
    else:
        factor = torch.rand(tensor.numel(), generator=generator).to(tensor.device) / 2 + 0.5
        drawn = (tensor.reshape(-1)[index] * factor).to(tensor.dtype)
    laid_out = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return laid_out.copy_(drawn.view(tensor.shape))
