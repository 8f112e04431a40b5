"""What every recorder produces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from graphs.contract.slots import Contract
from graphs.state.tensor_state import TensorState
from passes.forked_process import forkable_lock

Tensor = torch.Tensor
Storage = torch.UntypedStorage
Body = Callable[[Sequence[Tensor]], list[Tensor]]
"""A step bound to its constants: tensor leaves in, produced output tensors out."""

first_call_lock = forkable_lock()
"""One first call at a time in a process: a capture shares the state of allocators and generators."""


class ReplayRaised(Exception):
    """An operator of the step raised ``error`` in a replay, as it does in eager; those before it have run."""

    def __init__(self, error: Exception, operator: str = "") -> None:
        super().__init__(error)
        self.error, self.operator = error, operator


class CannotPoint(Exception):
    """Why a recording cannot be pointed at other memory. What it points at by now is not known: it must not be replayed."""


class Recording(Protocol):
    """A step that runs without the model's Python.

    Attributes:
        outputs: the static output tensors, at recorded sizes (None for owned outputs of a device graph, whose memory is
            shared with the other recordings of the module).
        at: the storages that it was pointed at last, as they were given; None before.
    """

    at: Sequence[Storage] | None

    def settle(self, storages: Sequence[Storage]) -> None:
        """Take note of the memory that was used in place, before anything of it moves."""
        ...

    def point(self, recorded: Sequence[tuple[int, int]], storages: Sequence[Storage]) -> None:
        """Read and write other memory from the next replay on, in place of what was recorded.

        Args:
            recorded: address and bytes of the memory at the time of the recording, one by one.
            storages: what takes their place, as large and apart from each other; the same where nothing moved.

        Raises:
            CannotPoint: an address is not found though it is used, or the device refuses.
        """
        ...

    def let_go(self, recorded: Sequence[tuple[int, int]]) -> None:
        """Hold none of that memory any more; the recording must be pointed before it is replayed."""
        ...

    def replay(self, tensors: Sequence[Tensor], rows: int, journal: TensorState | None = None) -> list[Tensor]:
        """Copy the slots of ``tensors`` in, run, and return the outputs with ``rows`` real rows.

        Args:
            journal: where a recording whose operators may raise saves what each is about to write; none of a device does.
        """
        ...

    @property
    def pool_bytes(self) -> int:
        """Memory that this recording added to its module's pool, in bytes."""
        ...


class Recorder(Protocol):
    """Records steps on one device."""

    def run(self, fn: Callable[[], object]) -> object:
        """Run ``fn`` where recording happens: the warm-up of libraries, handles and kernels."""
        ...

    def refuses(self, operator: str) -> str | None:
        """Why an operator cannot be recorded on this device, or None."""
        ...

    def record(
        self,
        body: Body,
        contract: Contract,
        tensors: Sequence[Tensor],
        *,
        owned: bool,
        generators: Sequence[torch.Generator] = (),
    ) -> Recording:
        """Record ``body`` at the sizes of ``contract``, with the slots filled from ``tensors``.

        Args:
            owned: whether replays return tensors of the caller's own, or the static outputs themselves.
            generators: generators that operators name explicitly.
        """
        ...
