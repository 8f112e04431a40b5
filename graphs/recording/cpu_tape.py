"""The CPU recorder: a tape of ATen operators with fixed storage for every intermediate.

Like a device graph it freezes host values, takes no Python branch and reads fixed addresses. Views are made once, since
their base never moves; operators that compute run again, through their ``out=`` overload where there is one, so that
nothing is allocated. What depends on nothing that changes is computed once.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import OpOverload

from graphs.contract.places import Spot
from graphs.contract.slots import Contract
from graphs.errors import UnsupportedOperator
from graphs.observation.fused_modules import unnoticed
from graphs.recording.recorder import Body, ReplayRaised, Storage
from graphs.state.storage import RESIZING, has_storage, is_wrapper, storage_id, tensors_in, written_tensors
from graphs.state.tensor_state import TensorState
from passes.core.composites import Calls, DispatchMode, as_eager, as_written, casts_inside, run, taken_apart

Tensor = torch.Tensor
_NOT_OF_OUT = {"dtype", "layout", "device", "pin_memory"}  # fixed by the tensor that is written


@dataclass
class _Instruction:
    """One operator of the tape and the storages it reads and writes.

    Attributes:
        make: makes ``call`` of ``keep``: arguments, keywords and results.
    """

    call: Callable[[], Any]
    reads: set[int]
    writes: set[int]
    creates: set[int]
    func: OpOverload
    make: Callable[..., Callable[[], Any]]
    keep: tuple[Any, ...] = field(repr=False, default=())

    def exchange(self, keep: tuple[Any, ...]) -> None:
        """Run on other tensors from now on."""
        self.keep, self.call = keep, self.make(*keep)


@functools.cache
def out_overload(func: OpOverload) -> tuple[OpOverload, tuple[str, ...]] | None:
    """The ``out=`` overload with the same arguments, and the names of its outputs; None where there is none."""
    returns = func._schema.returns
    if not returns or any(str(result.type) != "Tensor" for result in returns):
        return None
    wanted = {(a.name, str(a.type)) for a in func._schema.arguments if a.name not in _NOT_OF_OUT}
    packet = func._overloadpacket
    for name in packet.overloads():
        candidate = getattr(packet, name)
        arguments = candidate._schema.arguments
        outs = tuple(a.name for a in arguments if a.is_out)
        plain = {(a.name, str(a.type)) for a in arguments if not a.is_out}
        if len(outs) == len(returns) and plain - {p for p in plain if p[0] in _NOT_OF_OUT} == wanted:
            return candidate, outs
    return None


class _TapeMode(DispatchMode):
    """Writes the tape while the step runs for real."""

    def __init__(self) -> None:
        super().__init__()
        self.instructions: list[_Instruction] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        wrapper = next((tensor for tensor in tensors_in((*args, kwargs)) if is_wrapper(tensor)), None)
        if wrapper is not None:  # what its class runs on the tensors inside is recorded
            with self:
                return type(wrapper).__torch_dispatch__(func, types, args, kwargs)
        if func in RESIZING:
            raise UnsupportedOperator("the tape holds tensors at fixed storage and cannot resize them", operator=str(func))
        whole = taken_apart(self, func, args, kwargs)
        if whole is not NotImplemented:
            return whole
        args = as_eager(func, args, kwargs)
        result = run(func, args, kwargs)
        with torch._C.DisableTorchFunction():
            self._append(func, args, kwargs, result)
        return result

    def _append(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if func.namespace == "profiler":
            return  # the range of a profile, which ended with the recording
        if torch.Tag.inplace_view in func.tags:
            return  # nothing is computed: whoever reads the tensor later was given it as it is then
        result = _leaves(result)
        inputs, outputs = tensors_in((*args, kwargs)), tensors_in(result)
        reads = {storage_id(tensor) for tensor in inputs}
        fresh = [tensor for tensor in outputs if storage_id(tensor) not in reads]
        written = {storage_id(tensor) for tensor in written_tensors(func, args, kwargs)}
        made = {storage_id(tensor) for tensor in fresh}
        if not written and outputs and not fresh:
            return  # a view: made once, since its base never moves
        args, kwargs, result = _as_they_are(args), _as_they_are(kwargs), _as_they_are(result)
        make: Callable[..., Callable[[], Any]] = functools.partial(_in_place_call, func)
        if fresh and (written or len(fresh) != len(outputs)):
            make = functools.partial(_copying_call, func)
        elif fresh:
            make = functools.partial(_functional_call, func)
        casts = list(casts_inside(func, args, kwargs))
        if casts:
            make = functools.partial(_casting, make, casts)
        keep = args, kwargs, result
        self.instructions.append(_Instruction(make(*keep), reads, written | made, made, func, make, keep))

    def program(self, volatile: set[int]) -> list[_Instruction]:
        """The instructions that have to run at each replay.

        An operator that reads only what replays never change, and whose results nothing else writes, has its results
        in place already. ``volatile`` are storages that may change between replays: slots, and outputs lent to callers.
        """
        writers = Counter(storage for instruction in self.instructions for storage in instruction.writes)
        created = {storage for instruction in self.instructions for storage in instruction.creates}
        changing = volatile | {s for i in self.instructions for s in i.reads if s not in created}  # weights and caches
        kept = []
        for instruction in self.instructions:
            seeded = torch.Tag.nondeterministic_seeded in instruction.func.tags
            overwritten = any(writers[storage] > 1 for storage in instruction.writes)
            if seeded or overwritten or (instruction.reads | instruction.writes) & changing or not instruction.writes:
                kept.append(instruction)
                changing |= instruction.writes
        return kept


def _as_they_are(value: Any) -> Any:
    """Arguments with aliases for tensors: a later line of the step may lay those out otherwise, or exchange their memory."""
    return _mapped(value, lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf)


def _casting(make: Callable[..., Callable[[], Any]], casts: Sequence[tuple[str, torch.dtype]], *keep: Any) -> Callable[[], Any]:
    call = make(*keep)
    for kind, dtype in casts:
        call = torch.autocast(kind, dtype, cache_enabled=False)(call)
    return call


def _in_place_call(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Callable[[], Any]:
    return functools.partial(func._op, *args, **kwargs)


def _functional_call(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Callable[[], Any]:
    found = out_overload(func)
    outputs = tensors_in(result)
    if found is None or len(found[1]) != len(outputs):  # an operator may leave results undefined
        return _copying_call(func, args, kwargs, result)
    overload, names = found
    plain = {name: value for name, value in kwargs.items() if name not in _NOT_OF_OUT or _accepts(overload, name)}
    return functools.partial(overload._op, *args, **plain, **dict(zip(names, outputs, strict=True)))


def _copying_call(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Callable[[], Any]:
    """Run the operator and copy what it returns to the storage that the recording knows; in-place results are there."""
    targets = _leaves(result)

    def call_and_copy() -> None:
        for target, value in zip(targets, _leaves(func._op(*args, **kwargs)), strict=True):
            if isinstance(target, Tensor) and isinstance(value, Tensor) and target.data_ptr() != value.data_ptr():
                target.copy_(value)

    return call_and_copy


def _leaves(value: Any) -> list[Any]:
    """What an operator returned, flat, undefined tensors included."""
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


@functools.cache
def _accepts(overload: OpOverload, name: str) -> bool:
    return any(argument.name == name for argument in overload._schema.arguments)


class TapeRecording:
    """A tape with its slots and static outputs."""

    def __init__(
        self, program: list[_Instruction], contract: Contract, buffers: list[Tensor], outputs: list[Tensor], owned: bool
    ) -> None:
        self.contract = contract
        self.buffers = buffers
        self.outputs = outputs
        self._owned = owned
        self._program = program
        self._calls = [instruction.call for instruction in program]
        self._own = {storage for i in program for storage in i.creates} | {storage_id(buffer) for buffer in buffers}
        self._lasting = list(map(self._written_by, program))
        self._slots = list(zip(contract.slots, buffers, strict=True))
        self._written = [(slot, buffer) for slot, buffer in self._slots if slot.written]
        self.at: Sequence[Storage] | None = None
        self._in_place: _InPlace | None = None
        self.pool_bytes = sum(
            storage.nbytes()
            for storage in {
                s._cdata: s for i in program for t in tensors_in(i.keep[2]) for s in [t.untyped_storage()] if s._cdata in i.writes
            }.values()
        )

    def _written_by(self, instruction: _Instruction) -> list[Tensor]:
        """What an instruction writes beyond intermediates."""
        if not instruction.keep:
            return []
        written = written_tensors(instruction.func, instruction.keep[0], instruction.keep[1])
        return [tensor for tensor in written if storage_id(tensor) not in self._own]

    def _saving(self, journal: TensorState) -> Iterator[Callable[[], Any]]:
        """The operators, with what each is about to write beyond intermediates saved before it runs."""
        for instruction, written in zip(self._program, self._lasting, strict=True):
            for tensor in written:
                journal.save_written(instruction.func, instruction.keep[0], instruction.keep[1], tensor)
            yield instruction.call

    def poison(self) -> None:
        """Overwrite every intermediate that a replay computes, so that a result left over from recording is seen."""
        with torch.inference_mode():
            for instruction in self._program:
                for tensor in tensors_in(instruction.keep[2]):
                    if storage_id(tensor) in instruction.creates:
                        _spoil(tensor)

    def settle(self, storages: Sequence[Storage]) -> None:
        """Find the tensors that lie in memory used in place; see `graphs.recording.recorder.Recording`."""
        self._in_place = _InPlace([*(instruction.keep for instruction in self._program), self.outputs], storages)
        self.at = storages

    def point(self, recorded: Sequence[tuple[int, int]], storages: Sequence[Storage]) -> None:
        """Exchange tensors in the instructions; see `graphs.recording.recorder.Recording`."""
        assert self._in_place is not None
        for index, keep in self._in_place.on(storages).items():
            if index < len(self._program):
                self._program[index].exchange(keep)
                self._calls[index], self._lasting[index] = self._program[index].call, self._written_by(self._program[index])
            else:
                self.outputs = keep
        self.at = storages

    def let_go(self, recorded: Sequence[tuple[int, int]]) -> None:
        """Hold none of the tensors; see `graphs.recording.recorder.Recording`."""
        assert self._in_place is not None
        for index, keep in self._in_place.none().items():
            if index < len(self._program):
                self._program[index].keep, self._program[index].call = keep, _not_pointed
                self._calls[index], self._lasting[index] = _not_pointed, []
            else:
                self.outputs = keep
        self.at = None

    @property
    def operators(self) -> list[str]:
        """The operators that a replay runs, in order."""
        return [str(instruction.func) for instruction in self._program]

    def replay(self, tensors: Sequence[Tensor], rows: int, journal: TensorState | None = None) -> list[Tensor]:
        """Run the tape on the slots of ``tensors``; see `graphs.recording.recorder.Recording`."""
        calls = self._calls if journal is None else self._saving(journal)
        with torch.inference_mode(), torch._C._DisableAutocast():
            for slot, buffer in self._slots:
                slot.fill(buffer, tensors[slot.index])
            done = 0
            try:
                for done, call in enumerate(calls):  # noqa: B007
                    call()
            except Exception as error:
                raise ReplayRaised(error, str(self._program[done].func)) from error
            for slot, buffer in self._written:
                slot.copy_back(buffer, tensors[slot.index])
        outputs = [
            out if dim is None else out.narrow(dim, 0, rows)
            for out, dim in zip(self.outputs, self.contract.output_dims, strict=True)
        ]
        return [out.clone() for out in outputs] if self._owned else outputs


class _InPlace:
    """The parts of a tape that mention memory used in place, each with spots where tensors of it stand.

    Args:
        parts: arguments and results of the instructions, and the outputs.
        storages: the memory.
    """

    def __init__(self, parts: Sequence[Any], storages: Sequence[Storage]) -> None:
        numbers = {storage._cdata: number for number, storage in enumerate(storages)}
        self._parts: dict[int, tuple[Any, set[int]]] = {}
        for index, part in enumerate(parts):
            used: set[int] = set()
            spots = _mapped(part, functools.partial(_spot, numbers, used))
            if used:
                self._parts[index] = spots, used
        self._storages: list[Storage | None] = [*storages]

    def on(self, storages: Sequence[Storage]) -> dict[int, Any]:
        """The parts that have to be other ones with these storages, by position."""
        moved = {number for number, (old, new) in enumerate(zip(self._storages, storages, strict=True)) if old is not new}
        self._storages = list(storages)

        def tensor(leaf: Any) -> Any:
            return leaf.on(storages[leaf.place]) if isinstance(leaf, Spot) else leaf

        return {index: _mapped(spots, tensor) for index, (spots, used) in self._parts.items() if used & moved}

    def none(self) -> dict[int, Any]:
        """All parts, with spots in place of tensors."""
        self._storages = [None] * len(self._storages)
        return {index: spots for index, (spots, _) in self._parts.items()}


def _spot(numbers: dict[int, int], used: set[int], leaf: Any) -> Any:
    """The spot of a tensor of memory used in place; anything else as it is."""
    if not isinstance(leaf, Tensor) or not has_storage(leaf):
        return leaf
    place = numbers.get(storage_id(leaf))
    if place is None:
        return leaf
    used.add(place)
    return Spot.of(leaf, place)


def _mapped(value: Any, fn: Callable[[Any], Any]) -> Any:
    """``value`` with ``fn`` applied to what its lists, tuples and dictionaries hold."""
    if type(value) in (tuple, list):
        return type(value)([_mapped(item, fn) for item in value])
    return {key: _mapped(item, fn) for key, item in value.items()} if type(value) is dict else fn(value)


def _not_pointed() -> None:
    raise RuntimeError("the recording was not pointed at memory since it let go of what it used")


def _spoil(tensor: Tensor) -> None:
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        tensor.fill_(float("nan"))
    elif tensor.dtype is not torch.bool:
        tensor.fill_(torch.iinfo(tensor.dtype).max)


class TapeRecorder:
    """Records on the CPU by watching the dispatcher."""

    def run(self, fn: Callable[[], object]) -> object:
        """Run ``fn``; nothing has to be prepared on a CPU."""
        return fn()

    def refuses(self, operator: str) -> str | None:
        """Why an operator cannot be recorded; what else a tape cannot hold raises `UnsupportedOperator` while recording."""
        if operator.startswith("_c10d_functional."):
            return "its result is there once it was waited for, and a tape copies it before"
        return None

    def record(
        self,
        body: Body,
        contract: Contract,
        tensors: Sequence[Tensor],
        *,
        owned: bool,
        generators: Sequence[torch.Generator] = (),
    ) -> TapeRecording:
        """Run ``body`` once for real and keep its operators. The caller restores the state that the run changed."""
        buffers = contract.filled(tensors)
        mode = _TapeMode()
        with torch.no_grad(), as_written(), unnoticed(), Calls(), mode:
            arranged = contract.arrange(buffers, tensors)
            outputs = body(arranged)
            contract.settle(buffers, arranged)
        volatile = {storage_id(tensor) for tensor in (buffers if owned else [*buffers, *outputs])}
        recording = TapeRecording(mode.program(volatile), contract, buffers, [out.detach() for out in outputs], owned)
        recording.poison()
        return recording
