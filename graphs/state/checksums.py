"""Sums of memory that is read in place: they tell of writes that no operator declares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from graphs.state.storage import has_storage, storage_id
from graphs.state.tensor_state import TensorState

Tensor = torch.Tensor
_WIDTH = 2048
_SUMMED = 1 << 20
"""Bytes up to which every tensor of the host that a step reads is summed. Larger ones are summed where operators that are not
ATen's, or code that asks for their address, are given them."""


class Checksums:
    """The sums of what one run reads in place, each taken when the tensor is first seen.

    Args:
        origins: where each storage that was seen comes from, kept by the caller: ``("external", storage)`` is read in place.
        taken: False for a run in which nothing is to be summed.
    """

    def __init__(self, origins: Mapping[int, tuple[str, int]], *, taken: bool) -> None:
        self._origins, self._taken = origins, taken
        self._handed_out: set[int] = set()
        self._sums: dict[int, Tensor] = {}

    def see(self, tensor: Tensor, storage: int) -> None:
        """Sum a tensor that is read in place for the first time, unless it is too large to be summed without a reason."""
        if self._taken and has_storage(tensor) and self._is_summed(tensor, storage):
            self._sums[storage] = checksum(tensor)

    def _is_summed(self, tensor: Tensor, storage: int) -> bool:
        return tensor.is_cuda or storage in self._handed_out or tensor.untyped_storage().nbytes() <= _SUMMED

    def hand_out(self, tensors: Iterable[Tensor]) -> None:
        """Have tensors summed, however large, that code which may write without saying so is about to be given."""
        for tensor in tensors:
            storage = storage_id(tensor)
            self._handed_out.add(storage)
            if self._origins.get(storage) == ("external", storage) and storage not in self._sums:
                self.see(tensor, storage)

    def changed(self, tensors: Mapping[int, Tensor], declared: TensorState) -> list[int]:
        """The storages whose sum is another now.

        Args:
            tensors: one of each storage that was seen.
            declared: what operators say they wrote, which are not looked at.
        """
        left = {storage: before for storage, before in self._sums.items() if storage not in declared}
        with torch.inference_mode(False), torch.no_grad():
            differs = [before != _sum(tensors[storage]) for storage, before in left.items()]
            found: dict[int, bool] = {}
            for device in {tensor.device for tensor in differs}:  # the host waits once for each
                here = {storage: one for storage, one in zip(left, differs, strict=True) if one.device == device}
                found.update(zip(here, torch.stack([*here.values()]).tolist(), strict=True))
        return [storage for storage in left if found[storage]]


def checksum(tensor: Tensor) -> Tensor:
    """A number of the bits of the whole storage and of their order: enough to notice that somebody wrote there."""
    if not torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return _sum(tensor)
    with torch.inference_mode(False), torch.no_grad():
        return _sum(tensor)


def _sum(tensor: Tensor) -> Tensor:
    storage = tensor.untyped_storage()
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)  # type: ignore[call-overload]
    words = flat[: flat.numel() // 8 * 8].view(torch.int64)
    rows = words.numel() // _WIDTH
    parts = [words[rows * _WIDTH :]]
    if rows:
        table = words[: rows * _WIDTH].view(-1, _WIDTH)
        parts += [table.sum(0), table.sum(1)]
    if flat.numel() % 8:
        parts.append(flat[words.numel() * 8 :].to(torch.int64))
    sums = [(part * torch.arange(1, part.numel() + 1, device=part.device)).sum() for part in parts]
    return torch.stack(sums).sum() if len(sums) > 1 else sums[0]
