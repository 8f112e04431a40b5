"""Tensors that a step writes, found by watching, and the generators it draws from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload

from graphs.errors import WritesError
from graphs.state.regions import Region, whole_region, written_region
from graphs.state.storage import has_storage, storage_id

Tensor = torch.Tensor
SMALL = 64 << 10
"""Bytes up to which a storage is saved whole, so that a write beside what eager writes is seen there as well."""


class Left(NamedTuple):
    """What runs left in regions that they write."""

    values: list[Tensor]
    regions: list[Region]


class TensorState:
    """What a step writes, saved before it is written: whole storages where they are small, else the elements written.

    A copy goes to host memory when the device has no room for it: slower once, and never an out-of-memory error.

    Attributes:
        misdeclared: an operator whose author says what is not legal of what it writes; all is saved then, since the step, which
            may catch what an operator raises, must not be told.
    """

    def __init__(self) -> None:
        self._known: dict[int, Tensor] = {}
        self._saved: list[tuple[Region, Tensor | None]] = []
        self._partial: dict[int, int] = {}  # bytes saved of storages that are not saved whole
        self.misdeclared: WritesError | None = None

    def __contains__(self, storage: int) -> bool:
        return storage in self._known

    def save(self, tensor: Tensor) -> None:
        """Copy the whole storage of ``tensor`` unless it is saved already; one without storage is copied itself."""
        self.save_region(whole_region(tensor))

    def save_region(self, region: Region) -> None:
        """Copy what is about to be written, and all of its storage if that is not much more; once."""
        if self._covers(region):
            return
        storage, whole, live = region.storage, region.whole, region.live
        size = self._partial.get(storage, 0) + (0 if region.is_whole else live.nbytes)
        if region.is_whole or whole.nbytes <= SMALL or 2 * size > whole.nbytes:
            region, live = Region(storage, whole, whole), whole
            self._partial.pop(storage, None)
        else:
            self._partial[storage] = size
        self._known.setdefault(storage, whole)
        self._saved.append((region, _copy(live)))

    def save_written(self, func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], tensor: Tensor) -> None:
        """Copy what a call of ``func`` is about to write of ``tensor``."""
        if not has_storage(tensor) or tensor.untyped_storage().nbytes() > SMALL:
            try:
                region = written_region(func, args, kwargs, tensor)
            except WritesError as error:
                self.misdeclared = self.misdeclared or error
                region = whole_region(tensor)
            self.save_region(region)
        elif storage_id(tensor) not in self._known:
            self.save(tensor)

    def expect(self, tensor: Tensor) -> None:
        """Know that the step writes to the storage of ``tensor``; what it writes there is saved when it is seen."""
        region = whole_region(tensor)
        if not has_storage(tensor) or region.whole.nbytes <= SMALL:
            self.save_region(region)
        elif region.storage not in self._known:
            self._known[region.storage], self._partial[region.storage] = region.whole, 0

    def _covers(self, region: Region) -> bool:
        if region.storage in self._known and region.storage not in self._partial:
            return True
        return any(known.storage == region.storage and known.is_same(region) for known, _ in self._saved)

    @property
    def is_partial(self) -> bool:
        """Whether of some storage not everything is saved: a run of which is not known where it writes has to be watched."""
        return bool(self._partial)

    def changed(self, known: Sequence[TensorState]) -> TensorState:
        """What is not as it was saved, and is not ``known`` to be written."""
        found = TensorState()
        for region, copy in self._saved:
            is_known = any(region.storage in state for state in known)
            if copy is not None and not is_known and not torch.equal(_bytes(region.live), _bytes(copy)):
                found._known[region.storage] = region.whole
                found._saved.append((region, copy))
        return found

    def also(self, other: TensorState) -> None:
        """Cover what another saved, as it was then."""
        self._saved += [(region, copy) for region, copy in other._saved if region.storage not in self._known]
        self._partial |= {storage: size for storage, size in other._partial.items() if storage not in self._known}
        self._known = {**other._known, **self._known}

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """Leave out the storages of ``tensors``."""
        for storage in map(storage_id, tensors):
            self._known.pop(storage, None)
            self._partial.pop(storage, None)
            self._saved = [(region, copy) for region, copy in self._saved if region.storage != storage]

    @property
    def tensors(self) -> list[Tensor]:
        """The live tensors that were written, each whole: the full storage, not the view that was written."""
        return [*self._known.values()]

    @property
    def regions(self) -> list[Region]:
        """What is saved, in the order of `copies`."""
        return [region for region, _ in self._saved]

    def left(self) -> Left:
        """What is saved, as it is now, in the order of `copies`."""
        return Left([region.live for region, _ in self._saved], self.regions)

    def copies(self) -> list[Tensor]:
        """Copies of what is saved, as it is now."""
        return [_copy(region.live) for region, _ in self._saved]

    def restore(self, copies: list[Tensor] | None = None) -> None:
        """Write back the saved values, or ``copies`` made by `copies`; what was saved since then as it was.

        Last saved, first restored: two regions may share memory, and the later copy then holds writes to the earlier.
        """
        with torch.no_grad():
            for index, (region, saved) in reversed([*enumerate(self._saved)]):
                values = saved if copies is None or index >= len(copies) else copies[index]
                if values is not None:
                    region.write(values)

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> TensorState:
        """Tensors that are known to be written, each the whole of its storage; nothing is copied."""
        state = cls()
        state._known = {storage_id(tensor): tensor for tensor in tensors}
        state._partial = dict.fromkeys(state._known, 0)
        return state

    def release(self) -> None:
        """Free the saved values and keep only which tensors were written; which elements of them, other calls tell anew."""
        self._saved = [(region, None) for region, _ in self._saved if region.storage not in self._partial]
        self._partial = dict.fromkeys(self._partial, 0)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _copy(whole: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return whole.clone() if _has_room(whole) else whole.cpu()


def _has_room(whole: Tensor) -> bool:
    """Whether the device can hold a copy and still run the step: a first call makes up to four, the step needs some too."""
    if not whole.is_cuda or not has_storage(whole) or whole.nbytes <= SMALL:
        return True
    free, _ = torch.cuda.mem_get_info(whole.device)
    if 8 * whole.nbytes < free:
        return True
    cached = torch.cuda.memory_reserved(whole.device) - torch.cuda.memory_allocated(whole.device)
    return 8 * whole.nbytes < free + cached


class RandomState:
    """The states of the default generators of the CPU and of one device, and of generators that a step names."""

    def __init__(self, device: torch.device, named: dict[torch.Generator, Tensor] | None = None) -> None:
        before = torch.get_rng_state()
        self._read: list[Callable[[], Tensor]] = [torch.get_rng_state]
        self._restore: list[Callable[[], object]] = [functools.partial(torch.set_rng_state, before)]
        self._on_host: list[tuple[Callable[[], Tensor], Tensor]] = [(torch.get_rng_state, before)]
        if device.type == "cuda":
            self._read.append(functools.partial(torch.cuda.get_rng_state, device))
            self._restore.append(functools.partial(torch.cuda.set_rng_state, torch.cuda.get_rng_state(device), device))
        self.also(named or {})

    def states(self) -> list[Tensor]:
        """The states of the generators now."""
        return [state() for state in self._read]

    def restore(self) -> None:
        """Put the generators back."""
        for put_back in self._restore:
            put_back()

    def also(self, named: dict[torch.Generator, Tensor]) -> None:
        """Cover generators that were found later, with the states they had when they were found."""
        self._read += [generator.get_state for generator in named]
        self._on_host += [(generator.get_state, state) for generator, state in named.items() if generator.device.type == "cpu"]
        self._restore += [functools.partial(generator.set_state, state) for generator, state in named.items()]

    def host_has_drawn(self) -> bool:
        """Whether a generator of the host is not where it was."""
        return any(not torch.equal(state(), before) for state, before in self._on_host)
