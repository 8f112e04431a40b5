"""Operators as they arrive at a dispatch mode, run as eager runs them: composites in parts, each below its autocast kernel.

Under ``torch.inference_mode()``, and for tensors made there, the keys of autograd are off. What takes a composite operator
apart (``aten.is_nonzero``, ``aten.item``, ``aten.linear``, ``aten.matmul``) is its kernel for autograd, so that a mode is given
the whole one, and what it reads on the host goes unseen. Every dispatch mode of this project therefore asks here: a composite
operator is run by its composite kernel with the mode entered again, which gives the operators that ``torch.no_grad()`` gives.

A mode is called with the thread's state as it was before the first dispatch of the operator. There autocast is on again, though
an operator that autocast has a kernel for has either been through it, or was called by one that had: it would be cast twice, and
what ``linalg.pinv`` computes in float32 would be computed in bfloat16.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch._C import DispatchKey, _DisableAutocast
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Tensor = torch.Tensor
_has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
_COMPOSITE = DispatchKey.CompositeImplicitAutograd
_KINDS = ("", "Sparse", "SparseCsr", "NestedTensor", "Quantized")
_BACKENDS = (DispatchKey.Meta, *(getattr(DispatchKey, kind + device) for kind in _KINDS for device in ("CPU", "CUDA")))


def taken_apart(mode: TorchDispatchMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a composite operator whose parts ``mode`` is shown; ``NotImplemented`` for any other operator.

    Where torch's Python dispatcher is on, the parts are those of the composite's Python version, if it has one.
    """
    if not _is_composite(func):
        return NotImplemented
    tensors = _tensors(args, kwargs)
    if any(torch._C._dispatch_keys(tensor).has(key) for key in _own_kernels(func) for tensor in tensors):
        return NotImplemented
    with _below_autocast(func, tensors), mode:
        if _COMPOSITE in func.py_kernels and (_python_dispatcher_is_on() or not _has_kernel(func.name(), _COMPOSITE.name)):
            return func.py_kernels[_COMPOSITE](*args, **kwargs)
        return func._op_dk(_COMPOSITE, *args, **kwargs)


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an operator that arrived at a dispatch mode: not cast once more by autocast."""
    if not torch._C._is_any_autocast_enabled():
        return func(*args, **kwargs)
    with _below_autocast(func, _tensors(args, kwargs)):
        return func(*args, **kwargs)


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


def _below_autocast(func: Any, tensors: list[Tensor]) -> contextlib.AbstractContextManager[Any]:
    casts = _autocast_devices(func)
    passed = any(tensor.device.type in casts for tensor in tensors)
    return _DisableAutocast() if passed else contextlib.nullcontext()


@functools.cache
def _is_composite(func: Any) -> bool:
    """Whether an operator is taken apart above the kernels of devices, wherever there is no other kernel for autograd."""
    if not isinstance(func, OpOverload) or func.namespace == "prim":  # of what the dispatcher has never heard
        return False
    name = func.name()
    composite = _COMPOSITE in func.py_kernels or _has_kernel(name, _COMPOSITE.name)
    others = ("CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional", "Autograd")
    return composite and not any(_has_kernel(name, key) for key in others)


@functools.cache
def _own_kernels(func: OpOverload) -> tuple[DispatchKey, ...]:
    """The backends that run an operator whole, though it is composite for others."""
    return tuple(key for key in _BACKENDS if _has_kernel(func.name(), key.name))


@functools.cache
def _autocast_devices(func: Any) -> tuple[str, ...]:
    """Types of the devices for which autocast has a kernel of the operator."""
    if not isinstance(func, OpOverload) or func.namespace == "prim":
        return ()
    return tuple(kind for kind in ("cpu", "cuda") if _has_kernel(func.name(), "Autocast" + kind.upper()))


def _python_dispatcher_is_on() -> bool:
    return bool(torch._C._dispatch_tls_is_dispatch_key_included(DispatchKey.PythonDispatcher))
