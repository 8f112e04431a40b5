"""Static tensors: what a recording reads in place has to be where it was.

Three things can go wrong, and each call checks all three: a static argument is another tensor, an attribute (a cache's
``keys``) was replaced, or the storage of a weight was exchanged under the same tensor (``param.data = ...``, ``.to()``).
A parameter or buffer replaced by assignment announces itself through torch's registration hooks, so that a call need not
look at every module: see `registrations`.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.modules import module as _module

from graphs.contract.operators import storage_id
from graphs.contract.state import Owner
from graphs.errors import MovedStaticTensor

Tensor = torch.Tensor


class _Registrations:
    """How many parameters, buffers and submodules were registered in this process."""

    def __init__(self) -> None:
        self.count = 0
        for register in (
            _module.register_module_parameter_registration_hook,
            _module.register_module_buffer_registration_hook,
            _module.register_module_module_registration_hook,
        ):
            register(self._registered)

    def _registered(self, *_: Any) -> None:
        self.count += 1


registrations = _Registrations()


def _pointers_equal_in_python(tensors: list[Tensor], pointers: list[int | None], indices: list[int]) -> bool:
    return all(tensors[index].data_ptr() == pointers[index] for index in indices)


_pointers_equal: Callable[[list[Tensor], list[int | None], list[int]], bool] = getattr(
    torch._C, "_tensors_data_ptrs_at_indices_equal", _pointers_equal_in_python
)


class StaticTensors:
    """Where the static tensors of one recording were when it was made.

    Args:
        arguments: position, name and tensor of the static arguments.
        externals: tensors read in place that are not arguments.
        owners: the places where tensors hang, from `PythonState`; those of other tensors are ignored.
    """

    def __init__(
        self, arguments: Sequence[tuple[int, str, Tensor]], externals: Sequence[Tensor], owners: Sequence[Owner]
    ) -> None:
        self._arguments = [(index, name, tensor.data_ptr()) for index, name, tensor in arguments]
        used = {storage_id(tensor) for tensor in externals}
        hanging = [owner for owner in owners if storage_id(owner.tensor) in used]
        self._registered = [owner for owner in hanging if owner.registered]
        self._attributes = [owner for owner in hanging if not owner.registered]
        self._places = [(o.container, o.key, o.tensor) for o in self._attributes if not isinstance(o.container, types.CellType)]
        self._cells = [(o.container, o.tensor) for o in self._attributes if isinstance(o.container, types.CellType)]
        self._tensors = list({id(t): t for t in [*externals, *(owner.tensor for owner in hanging)]}.values())
        self._pointers: list[int | None] = [tensor.data_ptr() for tensor in self._tensors]
        self._indices = list(range(len(self._tensors)))
        self._registration = registrations.count

    def unchanged(self, tensors: Sequence[Tensor]) -> bool:
        """Whether everything is where it was. ``tensors`` are the tensor leaves of this call."""
        for index, _, pointer in self._arguments:
            if tensors[index].data_ptr() != pointer:
                return False
        try:
            for container, key, tensor in self._places:
                if container[key] is not tensor:
                    return False
            for cell, tensor in self._cells:
                if cell.cell_contents is not tensor:
                    return False
        except (KeyError, IndexError, ValueError):
            return False
        if registrations.count != self._registration:
            if any(owner.container.get(owner.key) is not owner.tensor for owner in self._registered):
                return False
            self._registration = registrations.count
        return _pointers_equal(self._tensors, self._pointers, self._indices)

    def moved(self, tensors: Sequence[Tensor]) -> MovedStaticTensor:
        """The refusal for a call whose static tensors changed: names the first."""
        for index, name, pointer in self._arguments:
            if tensors[index].data_ptr() != pointer:
                return MovedStaticTensor(
                    f"the argument is at {tensors[index].data_ptr():#x}, recorded at {pointer:#x}", operator=name
                )
        for owner in [*self._attributes, *self._registered]:
            if _at(owner) is not owner.tensor:
                return MovedStaticTensor("the attribute holds another tensor than the one recorded", operator=owner.path)
        names = {id(owner.tensor): owner.path for owner in [*self._attributes, *self._registered]}
        for tensor, recorded in zip(self._tensors, self._pointers, strict=True):
            if tensor.data_ptr() != recorded:
                name = names.get(id(tensor), f"tensor{tuple(tensor.shape)}")
                return MovedStaticTensor(f"its storage is at {tensor.data_ptr():#x}, recorded at {recorded:#x}", operator=name)
        return MovedStaticTensor("a static tensor moved and moved back during the check")


def _at(owner: Owner) -> Any:
    try:
        if isinstance(owner.container, types.CellType):
            return owner.container.cell_contents
        return owner.container[owner.key]
    except (KeyError, IndexError, ValueError):
        return None
