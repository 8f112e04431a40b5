"""Functions of torch that the program has put others in the place of: ``F.softmax = mine``, ``torch.Tensor.relu = mine``.

Torch hands a function mode the function that it finds under the name, so where a program wrapped one of them the mode is handed
the wrapper, which is running already: it called torch's own function, and that asked for modes. A mode that calls what it is
handed runs the wrapper twice. So every function mode of this project calls what `as_torch_made` gives.
"""

from __future__ import annotations

import gc
import os
from types import (
    BuiltinFunctionType,
    CodeType,
    FrameType,
    FunctionType,
    GetSetDescriptorType,
    MethodDescriptorType,
    MethodWrapperType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any

import torch

_OF_C = (BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType)
_TORCH = os.path.dirname(torch.__file__) + os.sep
_WRAPS = os.path.join(_TORCH, "_dynamo", "")
"""Functions in this part of torch run what the program gave them."""
_HANDS_OVER: CodeType = torch.overrides.handle_torch_function.__code__
_IN_C = {getattr(torch._C, name) for name in dir(torch._C) if isinstance(getattr(torch._C, name), ModuleType)}
_FUNCTIONS_IN_C = [(module, name, made) for module in _IN_C for name, made in vars(module).items() if isinstance(made, _OF_C)]
"""Modules that torch hands functions out of, their names, and what they were before a program could patch them."""
_made: dict[CodeType, list[FunctionType]] = {}


def as_torch_made(func: Any, caller: FrameType) -> Any:
    """What a function mode is to call for ``func``: itself, or the function of torch's that it was put in the place of.

    Args:
        caller: the frame that called the mode.
    """
    if isinstance(func, _OF_C):
        return func
    if isinstance(func, MethodWrapperType):
        return _accessor(func)
    if caller.f_code is not _HANDS_OVER or caller.f_back is None:
        return _in_c(func) if _is_foreign(func) else func
    code = getattr(func, "__code__", None)
    return func if code is caller.f_back.f_code or not _is_foreign(func) else _running(caller.f_back) or func


def tensor_method(name: str) -> Any:
    """A method or property of `torch.Tensor` as torch made it, where it is of C also if a program has put another there."""
    own, inherited = vars(torch.Tensor).get(name), vars(torch._C.TensorBase).get(name)
    return inherited if inherited is not None and (own is None or _is_foreign(own)) else getattr(torch.Tensor, name)


def _is_foreign(func: Any) -> bool:
    code = getattr(func, "__code__", None)
    file = code.co_filename if isinstance(code, CodeType) else ""
    return not file.startswith(_TORCH) or file.startswith(_WRAPS)


def _running(frame: FrameType) -> FunctionType | None:
    """The function that runs in a frame."""
    code = frame.f_code
    if code not in _made:
        _made[code] = [f for f in gc.get_referrers(code) if isinstance(f, FunctionType) and f.__code__ is code]
    return next((function for function in _made[code] if _closes_over(function, frame)), None)


def _closes_over(function: FunctionType, frame: FrameType) -> bool:
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    return all(name in frame.f_locals and cell.cell_contents is frame.f_locals[name] for name, cell in cells.items())


def _in_c(func: Any) -> Any:
    """The function or method in C that ``func`` was put in the place of."""
    made = _of_tensors(func)
    if made is not func:
        return made
    return next((made for module, name, made in _FUNCTIONS_IN_C if vars(module).get(name) is func), func)


def _of_tensors(func: Any) -> Any:
    """The method in C that ``func`` was put in the place of: torch looks it up in `torch.Tensor`, which inherits it."""
    return next((_inherited(name, func) for name, value in vars(torch.Tensor).items() if value is func), func)


def _accessor(func: Any) -> Any:
    """``property.__get__``, where torch has a property in C."""
    if not isinstance(func.__self__, property):
        return func
    own = _of_tensors(func.__self__)
    return getattr(own, func.__name__) if isinstance(own, GetSetDescriptorType) else func


def _inherited(name: str, default: Any) -> Any:
    return vars(torch._C.TensorBase).get(name, default)
