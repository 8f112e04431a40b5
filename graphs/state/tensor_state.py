"""Tensors that a step writes, found by watching, and the generators it draws from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import torch

from graphs.state.storage import has_storage, storage_id

Tensor = torch.Tensor


class TensorState:
    """Copies of storages, each taken before its first write.

    A copy goes to host memory when the device has no room for it: slower once, and never an out-of-memory error.
    """

    def __init__(self) -> None:
        self._saved: dict[int, tuple[Tensor, Tensor]] = {}

    def __contains__(self, storage: int) -> bool:
        return storage in self._saved

    def save(self, tensor: Tensor) -> None:
        """Copy the whole storage of ``tensor`` unless it is saved already; one without storage is copied itself."""
        if not has_storage(tensor):
            self._saved.setdefault(storage_id(tensor), (tensor, tensor.clone()))
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self._saved:
            whole = _whole(tensor)
            self._saved[storage._cdata] = (whole, _copy(whole))

    def changed(self, known: Sequence[TensorState]) -> TensorState:
        """What is not as it was saved, and is not ``known`` to be written."""
        found = TensorState()
        found._saved = {
            key: (whole, copy)
            for key, (whole, copy) in self._saved.items()
            if not any(key in state for state in known) and not torch.equal(_bits(whole), _bits(copy))
        }
        return found

    def also(self, other: TensorState) -> None:
        """Cover what another saved, as it was then."""
        self._saved = {**self._saved, **other._saved}

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """Leave out the storages of ``tensors``."""
        for tensor in tensors:
            self._saved.pop(tensor.untyped_storage()._cdata, None)

    @property
    def tensors(self) -> list[Tensor]:
        """The live tensors that were written, each whole: the full storage, not the view that was written."""
        return [whole for whole, _ in self._saved.values()]

    def copies(self) -> list[Tensor]:
        """Copies of the live tensors as they are now."""
        return [_copy(whole) for whole, _ in self._saved.values()]

    def restore(self, copies: list[Tensor] | None = None) -> None:
        """Write back the saved values, or ``copies`` made by `copies`; what was saved since then as it was.

        Last saved, first restored: two storages may be one memory, of which the later copy holds writes to the earlier.
        """
        with torch.no_grad():
            for index, (whole, saved) in reversed([*enumerate(self._saved.values())]):
                whole.copy_(saved if copies is None or index >= len(copies) else copies[index])

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> TensorState:
        """Tensors that are known to be written, each the whole of its storage; nothing is copied."""
        state = cls()
        state._saved = {storage_id(tensor): (tensor, tensor) for tensor in tensors}
        return state

    def release(self) -> None:
        """Free the saved values and keep only which tensors were written."""
        self._saved = {key: (whole, whole) for key, (whole, _) in self._saved.items()}


def _whole(tensor: Tensor) -> Tensor:
    """The whole storage of ``tensor``, in the shape of its base where that is dense, else flat."""
    base = tensor if tensor._base is None else tensor._base
    storage = tensor.untyped_storage()
    count = storage.nbytes() // tensor.element_size()
    dense = base.is_contiguous() and base.dtype == tensor.dtype and base.numel() == count
    with torch.inference_mode(False):
        flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage, 0, (count,), (1,))  # type: ignore[call-overload]
        return flat.view(base.shape) if dense else flat


def _bits(whole: Tensor) -> Tensor:
    return whole.reshape(-1).view(torch.uint8)


def _copy(whole: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return whole.clone() if _has_room(whole) else whole.cpu()


def _has_room(whole: Tensor) -> bool:
    """Whether the device can hold a copy and still run the step: a first call makes up to four, the step needs some too."""
    if not whole.is_cuda:
        return True
    free, _ = torch.cuda.mem_get_info(whole.device)
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
