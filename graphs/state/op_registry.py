"""What users said about their own operators, and what checking them found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils._python_dispatch import _disable_current_modes

from graphs.errors import CaptureFailed, ConfigError, Refusal, UnsafeOperator, WritesError
from graphs.state.storage import tensors_in

Check = Callable[[OpOverload, Sequence[Any], dict[str, Any]], None]
"""Raises what a recording of an operator would get wrong, on copies of the arguments: `graphs.capture_check`."""


@dataclass
class RegisteredOperator:
    """One operator made known with `graphs.register_op`.

    Attributes:
        function: the Python function behind it; None for an operator written in C++.
        graph_safe: what its author says; None if it is to be checked.
        check: how.
        writes: by name of an argument that it writes, what tells the rows; see `graphs.register_op`.
        verdicts: what the check found, by device type; None where it found nothing.
    """

    function: Callable[..., Any] | None
    graph_safe: bool | None
    check: Check
    writes: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    verdicts: dict[str, Refusal | None] = field(default_factory=dict)


_operators: dict[OpOverload, RegisteredOperator] = {}


def register(func: OpOverload, operator: RegisteredOperator) -> None:
    """Remember what was said about ``func``, in place of what was said before."""
    _operators[func] = operator


def registered(func: OpOverload) -> RegisteredOperator | None:
    """What was said about ``func``, or None."""
    return _operators.get(func)


def check_once(func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> WritesError | None:
    """Check ``func`` if that was asked for and has not been done on this device type; before its first call there.

    Returns:
        What is wrong about what its author says of it, if that is why it could not be checked.
    """
    operator = _operators.get(func) if _operators else None
    if operator is None or operator.graph_safe is not None:
        return None
    device = device_type(tensors_in((*args, kwargs)))
    if device in operator.verdicts:
        return None
    operator.verdicts[device] = None
    with _disable_current_modes():
        try:
            operator.check(func, args, kwargs)
        except Refusal as refusal:
            operator.verdicts[device] = refusal
        except WritesError as error:
            del operator.verdicts[device]
            return error
        except Exception as error:  # the operator's own, on data that is not the user's
            text = f"checking it raised {type(error).__name__}: {error}"
            remedy = "call graphs.capture_check on it with others=, or register it with graph_safe=True"
            operator.verdicts[device] = CaptureFailed(text, remedy=remedy)
    return None


def refusal_of(func: OpOverload, tensors: Sequence[torch.Tensor]) -> Callable[..., Refusal] | None:
    """Why a call of ``func`` is not recorded, as a function of where it is; None where it may be."""
    operator = _operators.get(func) if _operators else None
    if operator is None or operator.graph_safe:
        return None
    if operator.graph_safe is False:
        return lambda **where: UnsafeOperator("it is registered with graph_safe=False", **where)
    verdict = operator.verdicts.get(device_type(tensors))
    if verdict is None:
        return None
    kind, detail, remedy = type(verdict), verdict.detail, verdict.remedy
    return lambda **where: kind(detail, remedy=remedy, **where)


def device_type(tensors: Sequence[torch.Tensor]) -> str:
    """The type of device that an operator runs on: that of its tensors that are not on the CPU, if there are any."""
    return next((tensor.device.type for tensor in tensors if tensor.device.type != "cpu"), "cpu")


def overload_of(op: Any) -> OpOverload:
    """The operator behind what `graphs.register_op`, `torch.library.custom_op` or ``torch.ops`` give.

    Raises:
        ConfigError: it is no operator, or one with several overloads.
    """
    if isinstance(op, CustomOpDef):
        return op._opoverload
    if isinstance(op, OpOverloadPacket):
        names = op.overloads()
        if len(names) == 1:
            return getattr(op, names[0])
        raise ConfigError("op", op, "one overload: " + ", ".join(f"{op}.{name}" for name in names))
    if not isinstance(op, OpOverload):
        raise ConfigError("op", op, "what register_op or torch.library.custom_op returned, or torch.ops.<library>.<name>")
    return op
