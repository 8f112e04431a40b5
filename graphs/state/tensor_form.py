"""What a step can change of a tensor without writing to its memory: where it lies, its layout, what autograd keeps with it."""

from __future__ import annotations

from typing import Any

import torch

from graphs.objects.cells import Difference, text_of
from graphs.state.storage import has_storage

Tensor = torch.Tensor
_GRADIENT = vars(torch._C.TensorBase)["grad"]


class TensorForm:
    """Memory, shape, strides, ``requires_grad`` and gradient of one tensor at one moment.

    Args:
        path: what to call the tensor by.
        tensor: a plain tensor with a storage.
    """

    __slots__ = ("_alias", "_gradient", "_leaf", "_requires_grad", "path", "tensor")

    def __init__(self, path: str, tensor: Tensor) -> None:
        self.path, self.tensor = path, tensor
        self._alias = _alias_of(tensor)
        self._leaf, self._requires_grad = tensor.is_leaf, tensor.requires_grad
        self._gradient = gradient_of(tensor)

    def differences(self) -> list[Difference]:
        """What is not as it was; a history that is lost cannot be put back."""
        tensor, found = self.tensor, list[Difference]()
        if self._moved():
            found.append(Difference(self.path, text_of(self._alias), text_of(tensor)))
        if tensor.requires_grad != self._requires_grad or tensor.is_leaf != self._leaf:
            before, after = (f"requires_grad={value}" for value in (self._requires_grad, tensor.requires_grad))
            found.append(Difference(f"{self.path}.requires_grad", before, after, irreversible=tensor.is_leaf != self._leaf))
        if gradient_of(tensor) is not self._gradient:
            found.append(Difference(f"{self.path}.grad", text_of(self._gradient), text_of(gradient_of(tensor))))
        return found

    def restore(self) -> None:
        """Make the tensor what it was, as far as that is possible."""
        tensor = self.tensor
        if self._moved():
            tensor.data = self._alias
        if tensor.is_leaf and self._leaf and tensor.requires_grad != self._requires_grad:
            tensor.requires_grad_(self._requires_grad)
        if tensor.is_leaf and gradient_of(tensor) is not self._gradient:
            tensor.grad = self._gradient

    def _moved(self) -> bool:
        """Whether it lies elsewhere or otherwise; as a comparison of addresses also where two storages are one memory."""
        tensor, alias = self.tensor, self._alias
        return not (
            tensor.data_ptr() == alias.data_ptr()
            and tensor.shape == alias.shape
            and tensor.stride() == alias.stride()
            and tensor.dtype == alias.dtype
        )


def _alias_of(tensor: Tensor) -> Tensor:
    """Another tensor of the same memory, made in the mode that the tensor was made in."""
    if tensor.is_inference() == torch.is_inference_mode_enabled() and not torch.is_grad_enabled():
        return tensor.detach()
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        return tensor.detach()


class GradientView:
    """The gradient of a tensor as a mapping with one item, there while the tensor has one."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __getitem__(self, key: str) -> Any:
        gradient = gradient_of(self._tensor)
        if gradient is None:
            raise KeyError(key)
        return gradient


def gradient_of(tensor: Tensor) -> Tensor | None:
    """``tensor.grad``, without the warning that is given where it is never filled."""
    return _GRADIENT.__get__(tensor) if tensor.is_leaf or tensor.retains_grad else None  # type: ignore[no-any-return]


def has_form(value: Any) -> bool:
    """Whether a value is a plain tensor with memory of its own."""
    plain = type(value) in (Tensor, torch.nn.Parameter, torch.nn.Buffer)
    return plain and value.layout == torch.strided and has_storage(value)


def form_of(tensor: Tensor) -> tuple[Any, ...] | None:
    """What a tensor is but for its address, its content and what hangs on it; None where it has no memory to be exchanged."""
    if not has_storage(tensor):
        return None
    layout = tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.storage_offset()
    flags = tensor.requires_grad, tensor.is_inference(), tensor.is_conj(), tensor.is_neg()
    return (type(tensor), *layout, tensor.untyped_storage().nbytes(), *flags)
