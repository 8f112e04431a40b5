"""What can be said about a call before anything runs: names and places of its arguments, reasons not to record it."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from graphs.contract.arguments import Call
from graphs.contract.slots import is_dense
from graphs.errors import MixedDevices, NestedCapture, Refusal, Scripted, UnsupportedArgument
from graphs.objects.keys import objects_on
from graphs.objects.torch_fast_paths import is_capturing

Tensor = torch.Tensor
SMALL = 4096
"""Bytes up to which a host argument gets a slot: the pinned ring holds 512 of each."""


def host_arguments(call: Call) -> tuple[int, ...]:
    """Positions of small dense host tensors among arguments on a device."""
    if all(tensor.device.type != "cuda" for tensor in call.tensors):
        return ()
    return tuple(index for index, tensor in enumerate(call.tensors) if _is_small(tensor))


def _is_small(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided and tensor.device.type == "cpu"
    return plain and tensor.nbytes <= SMALL and is_dense(tensor.shape, tensor.stride())


def inadmissible(call: Call, model: Any = None, host: Sequence[int] = ()) -> Refusal | None:
    """Reasons that need no run to be seen.

    Args:
        host: positions of host tensors that the recording will hold copies of; see `host_arguments`.
    """
    if isinstance(model, torch.nn.Module):
        scripted = next((name for name, part in model.named_modules() if isinstance(part, torch.jit.ScriptModule)), None)
        if scripted is not None:
            return Scripted("what it keeps cannot be compared between steps", operator=scripted or "self")
    devices = {tensor.device for index, tensor in enumerate(call.tensors) if index not in host}
    if len(devices) > 1:
        return MixedDevices(f"tensor arguments are on {sorted(map(str, devices))}", operator="arguments")
    for tensor in call.tensors:
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
            return UnsupportedArgument(f"a {type(tensor).__name__} with layout {tensor.layout}", operator="arguments")
        if tensor.is_quantized:
            return UnsupportedArgument("a quantised tensor, whose scale lies beside its memory", operator="arguments")
        if tensor.device.type not in ("cpu", "cuda"):
            return UnsupportedArgument(f"a tensor on {tensor.device}", operator="arguments")
    if _stream_is_capturing(call):
        return NestedCapture("the current stream is being recorded by somebody else", operator="record")
    return None


def uninitialised(model: Any) -> str | None:
    """A parameter or buffer of a lazy module that has no memory yet: the first call gives it a shape, and is an ordinary one."""
    if not isinstance(model, torch.nn.Module):
        return None
    held = (part for module in model.modules() for part in (module._parameters, module._buffers) if part)
    if not any(is_lazy(tensor) for part in held for tensor in part.values() if tensor is not None):
        return None
    named = (*model.named_parameters(), *model.named_buffers())
    return next((f"self.{name}" for name, tensor in named if is_lazy(tensor)), None)


def carries_objects(call: Call) -> Refusal | None:
    """The attribute of a tensor argument that no key can hold and no replay refresh, or None."""
    for tensor in call.tensors:
        for name in objects_on(tensor):
            kind = type(tensor.__dict__[name]).__name__
            detail = f"a {kind} hangs on a tensor argument, as its attribute {name!r}, where a replay does not look for it"
            remedy = "pass it as an argument of its own, or with the tensor in a tuple or dict"
            return UnsupportedArgument(detail, operator=name, remedy=remedy)
    return None


def _stream_is_capturing(call: Call) -> bool:
    return any(tensor.is_cuda for tensor in call.tensors) and is_capturing()


def device_of(call: Call, model: Any) -> torch.device:
    """The device of a call: of its arguments, a GPU if any is there; else of the model."""
    if call.tensors:
        return next((tensor.device for tensor in call.tensors if tensor.is_cuda), call.tensors[0].device)
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else iter(())
    return next((parameter.device for parameter in parameters), torch.device("cpu"))


def name_of(model: Any) -> str:
    """What a step is called where nobody has named it: the name of a function, else the class of the object."""
    while isinstance(model, functools.partial):
        model = model.func
    if isinstance(model, (types.FunctionType, types.MethodType)):
        return model.__qualname__
    return model.__name__ if isinstance(model, types.BuiltinFunctionType) else type(model).__name__


def parameter_names(model: Any) -> list[str]:
    """Names of the parameters of the model's call, as arguments are named by."""
    function = model.forward if isinstance(model, torch.nn.Module) else model
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature: arguments are named by position
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
