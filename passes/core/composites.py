"""Operators as they arrive at a dispatch mode, run as eager runs them: composites in parts, with their caller's autocast.

Under ``torch.inference_mode()``, and for tensors made there, the keys of autograd are off. What takes a composite operator
apart (``aten.is_nonzero``, ``aten.item``, ``aten.linear``, ``aten.matmul``) is its kernel for autograd, so that a mode is given
the whole one, and what it reads on the host goes unseen. Every dispatch mode of this project therefore asks here: a composite
operator is run by its composite kernel with the mode entered again, which gives the operators that ``torch.no_grad()`` gives.

Torch calls a mode with autocast off. That is right for an operator that autocast has a kernel for: its arguments are cast. Any
other one (an operator of the user's, ``aten.einsum``, the fused layer of a transformer) casts inside, if whoever called it had
autocast on, and that is asked before the operator is dispatched: by a function mode (`called`).
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch._C import DispatchKey
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode, _push_mode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from passes.core.modes.patched_functions import as_torch_made

Tensor = torch.Tensor
_has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
_COMPOSITE = DispatchKey.CompositeImplicitAutograd
_AUTOCAST = {"cpu": DispatchKey.AutocastCPU, "cuda": DispatchKey.AutocastCUDA}
_KINDS = ("", "Sparse", "SparseCsr", "NestedTensor", "Quantized")
_VECTORS = {torch.ops.aten._linalg_svd.default: 2, torch.ops.aten._linalg_eigh.default: 2}
"""Operators that may leave vectors out, with the position of the argument that says so."""
_VALUES = ("svdvals", "eigvalsh", "cond", "matrix_norm", "norm", "matrix_rank")
_VALUES_ONLY = frozenset((*_VALUES, *("linalg_" + name for name in _VALUES), "nuclear_norm"))
"""Functions that use no vectors of the operators above."""
_BACKENDS = (DispatchKey.Meta, *(getattr(DispatchKey, kind + device) for kind in _KINDS for device in ("CPU", "CUDA")))


class _Callers(threading.local):
    """Kinds of devices that the function of torch that runs now was called with autocast for, and does not cast for itself."""

    kinds: tuple[str, ...] = ()
    name: str = ""
    """Of that function."""


_callers = _Callers()
_set_excluded = torch._C._dispatch_tls_set_dispatch_key_excluded
_is_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded


class called:  # noqa: N801  # it is used as a function
    """To be entered by a function mode around each function: remembers what autocast there was."""

    __slots__ = ("_before", "_name")

    def __init__(self, func: Any) -> None:
        self._name = getattr(func, "__name__", "")

    def __enter__(self) -> None:
        self._before = _callers.kinds, _callers.name
        on = [kind for kind in _AUTOCAST if torch.is_autocast_enabled(kind)]
        _callers.kinds = tuple(kind for kind in on if kind not in _cast_by_itself(self._name)) if on else ()
        _callers.name = self._name

    def __exit__(self, *_: object) -> None:
        _callers.kinds, _callers.name = self._before


def calling() -> str:
    """The name of the function of torch's that `called` was entered for last; empty outside of any."""
    return _callers.name


class Calls(TorchFunctionMode):
    """A function mode that does nothing but that."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = as_torch_made(func, sys._getframe(1))
        with called(func):
            return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def suspended_calls() -> Iterator[None]:
    """Inside, no `Calls` is entered: for compilers, which would trace it."""
    modes = []
    while isinstance(_get_current_function_mode(), Calls):
        modes.append(_pop_mode())
    try:
        yield
    finally:
        for mode in reversed(modes):
            _push_mode(mode)


def taken_apart(mode: TorchDispatchMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a composite operator whose parts ``mode`` is shown; ``NotImplemented`` for any other operator.

    Where torch's Python dispatcher is on, the parts are those of the composite's Python version, if it has one.
    """
    if not _is_composite(func):
        return NotImplemented
    tensors = _tensors(args, kwargs)
    if any(torch._C._dispatch_keys(tensor).has(key) for key in _own_kernels(func) for tensor in tensors):
        return NotImplemented
    with _as_called(func, tensors), mode:
        if _COMPOSITE in func.py_kernels and (_python_dispatcher_is_on() or not _has_kernel(func.name(), _COMPOSITE.name)):
            return func.py_kernels[_COMPOSITE](*args, **kwargs)
        return func._op_dk(_COMPOSITE, *args, **kwargs)


def as_eager(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments that eager gives an operator, where its composite asks whether a mode is active and gives others then.

    ``svdvals`` and what is made of it have the vectors computed too under a mode, by another kernel, whose values differ in the
    last bit. They are not used, so leave them out.
    """
    if _callers.name not in _VALUES_ONLY or kwargs:
        return args
    position = _VECTORS.get(func)
    if position is None:
        return args
    given = [*args, *(argument.default_value for argument in func._schema.arguments[len(args) : position])]
    return (*given[:position], False, *args[position + 1 :])


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an operator that arrived at a dispatch mode, with the autocast of whoever called it."""
    if not _callers.kinds:
        return func(*args, **kwargs)
    with _as_called(func, _tensors(args, kwargs)):
        return func(*args, **kwargs)


def casts_inside(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[str, torch.dtype], ...]:
    """Kinds of devices and dtypes of the autocast that `run` would run an operator with."""
    kinds = _casting(func, _tensors(args, kwargs)) if _callers.kinds else ()
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds)


@contextlib.contextmanager
def _as_called(func: Any, tensors: list[Tensor]) -> Iterator[None]:
    """With the autocast that an operator was called with; what has a kernel for autocast runs its parts without."""
    before, kinds = _callers.kinds, _casting(func, tensors)
    keys = [key for kind in kinds if _is_excluded(key := _AUTOCAST[kind])]
    _callers.kinds = kinds
    try:
        for key in keys:
            _set_excluded(key, False)
        yield
    finally:
        for key in keys:
            _set_excluded(key, True)
        _callers.kinds = before


def _casting(func: Any, tensors: list[Tensor]) -> tuple[str, ...]:
    cast = _autocast_devices(func)
    return () if any(tensor.device.type in cast for tensor in tensors) else _callers.kinds


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


def _is_dispatched(func: Any) -> bool:
    """Whether the dispatcher knows an operator: some of TorchScript's (``prim::device``, ``aten::size``) it does not."""
    return isinstance(func, OpOverload) and bool(torch._C._dispatch_has_kernel(func.name()))


@functools.cache
def _is_composite(func: Any) -> bool:
    """Whether an operator is taken apart above the kernels of devices, wherever there is no other kernel for autograd."""
    if not _is_dispatched(func):
        return False
    name = func.name()
    composite = _COMPOSITE in func.py_kernels or _has_kernel(name, _COMPOSITE.name)
    others = ("CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional", "AutogradCPU", "AutogradCUDA")
    return composite and not any(_has_kernel(name, key) for key in others)


@functools.cache
def _own_kernels(func: OpOverload) -> tuple[DispatchKey, ...]:
    """The backends that run an operator whole, though it is composite for others."""
    return tuple(key for key in _BACKENDS if _has_kernel(func.name(), key.name))


@functools.cache
def _autocast_devices(func: Any) -> tuple[str, ...]:
    """Types of the devices for which autocast has a kernel of the operator."""
    if not _is_dispatched(func):
        return ()
    return tuple(kind for kind, key in _AUTOCAST.items() if _has_kernel(func.name(), key.name))


@functools.cache
def _cast_by_itself(name: str) -> frozenset[str]:
    """Types of the devices for which autocast has a kernel of the operator that a function of this name calls."""
    packet = getattr(torch.ops.aten, name, None) if name else None
    overloads = [getattr(packet, each) for each in packet.overloads()] if isinstance(packet, OpOverloadPacket) else []
    return frozenset(kind for func in overloads for kind in _autocast_devices(func))


def _python_dispatcher_is_on() -> bool:
    return bool(torch._C._dispatch_tls_is_dispatch_key_included(DispatchKey.PythonDispatcher))


class DispatchMode(TorchDispatchMode):
    """A dispatch mode whose code Dynamo is not asked to skip.

    Asking would import it at the first operator. Where it is there, a mode runs inside `as_written`, or in a graph that Dynamo
    made and does not look into.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def as_written() -> AbstractContextManager[object]:
    """A context in which functions of ``torch.compile`` run as they are written; where Dynamo was not imported there are none."""
    return torch.compiler.set_stance("force_eager") if is_dynamo_there() else contextlib.nullcontext()


def is_dynamo_there() -> bool:
    """Whether anything can have been compiled in this process."""
    return "torch._dynamo" in sys.modules
