"""The settings around a call that decide what a step does: part of its key, so that a recording serves the same ones only.

Read at every call. A getter of torch takes 30 to 190 ns; one C++ call of Dynamo's guard on the global state, 240 ns, tells that
eight of them have not changed. With it everything here takes about 0.7 us.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.backends import mha
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from graphs.errors import ActiveMode

_C: Any = torch._C
_Guard: Any = getattr(_C._dynamo.guards, "GlobalStateGuard", None)
_inference, _convolution_tf32 = _C.is_inference_mode_enabled, _C._get_cudnn_allow_tf32
_flash, _efficient = _C._get_flash_sdp_enabled, _C._get_mem_efficient_sdp_enabled
_math, _fused = _C._get_math_sdp_enabled, _C._get_cudnn_sdp_enabled
_cudnn, _benchmark, _same_algorithms = _C._get_cudnn_enabled, _C._get_cudnn_benchmark, _C._get_cudnn_deterministic
_tracing = _C._get_tracing_state
_transform = _C._functorch.peek_interpreter_stack
_function_modes, _dispatch_modes = _C._len_torch_function_stack, _C._len_torch_dispatch_stack
_known: tuple[Any, tuple[Any, ...]] = (None, ())
"""A guard on the global state, and what the state was when the guard was made; read and exchanged as one."""


def ambient_of(model: Any) -> tuple[Any, ...]:
    """Settings outside the arguments that change what a step does.

    Training mode, grad and inference mode, autocast, default dtype and device, modes that are entered, and what kernels are
    chosen by: determinism, reduced precision, the back ends of attention and of convolution.
    """
    guard, state = _known
    return (
        getattr(model, "training", None),
        state if guard is not None and guard.check() else _global_state(),
        *(_inference(), _flash(), _efficient(), _math(), _fused(), mha._is_fastpath_enabled),
        *(_cudnn(), _benchmark(), _same_algorithms(), _convolution_tf32()),
        _tracing() is None,
        forward_ad._current_level,  # what a tensor carries there no other question tells
        _modes_entered() if _function_modes() or _dispatch_modes() else None,
    )


def _global_state() -> tuple[Any, ...]:
    """What Dynamo's guard watches, and nothing else."""
    global _known
    state = (
        *(_C.is_grad_enabled(), _C.get_default_dtype()),
        *(_C._get_deterministic_algorithms(), _C._get_deterministic_algorithms_warn_only()),
        _C._get_cublas_allow_tf32(),
        _C._get_cublas_allow_fp16_reduced_precision_reduction(),
        _C._get_cublas_allow_bf16_reduced_precision_reduction(),
        *((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")),
    )
    if _Guard is not None:
        _known = (_Guard(), state)
    return state


def _modes_entered() -> tuple[Any, ...] | None:
    """Default devices by name, other modes by their type; None where all only look on."""
    entered = [mode for mode in _modes() if not getattr(type(mode), "graphs_observer", False)]
    return tuple(str(mode.device) if isinstance(mode, DeviceContext) else type(mode) for mode in entered) or None


def _modes() -> tuple[Any, ...]:
    return (*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack())


def active_mode() -> ActiveMode | None:
    """Why a call inside a mode or transform of the caller's cannot be served by a recording: a replay calls no operator that it
    could see.

    Default devices are no obstacle, nor are modes that say that they only look on (``graphs_observer = True``).
    """
    if _tracing() is not None:
        return ActiveMode("the call is traced by torch.jit, which writes down operators", operator="torch.jit.trace")
    transform = _transform()
    if transform is not None:
        kind = str(transform.key()).rpartition(".")[2].lower()
        detail = "the call is made inside a transform of torch.func, which replaces operators"
        return ActiveMode(detail, operator=f"torch.func.{kind}")
    if forward_ad._current_level >= 0:
        detail = "tensors may carry tangents there, of which a replay computes nothing"
        return ActiveMode(detail, operator="forward_ad.dual_level")
    if not _function_modes() and not _dispatch_modes():
        return None
    for mode in _modes():
        if not isinstance(mode, DeviceContext) and not getattr(type(mode), "graphs_observer", False):
            return ActiveMode("the call is made inside a mode that sees or changes operators", operator=type(mode).__name__)
    return None
