"""Finding a step that asks whether gradients are recorded, where they are.

A step is recorded without autograd. Called in grad mode, one that asks (``torch.is_grad_enabled()``, ``y.requires_grad``)
would be told something else than in eager. Modules of torch that choose their way by it ask too; context managers that keep
the mode do not count.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch._ops import OpOverload

from graphs.state.storage import storage_id
from passes.core.source_location import first_frame

Tensor = torch.Tensor
_QUESTIONS = (torch.is_grad_enabled,)
GRAD_PROPERTIES = {getattr(Tensor, name).__get__: name for name in ("requires_grad", "grad_fn", "is_leaf")}
"""Getters of what autograd keeps of a tensor, as function modes see them."""


@contextlib.contextmanager
def grad_questions(asked: Callable[[FrameType], None], counts: Callable[[FrameType], bool]) -> Iterator[None]:
    """Call ``asked`` with each frame that asks whether gradients are recorded, of those that count.

    Args:
        counts: whether a frame is the user's; those of ``torch.nn`` count always.
    """

    def called(frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and function in _QUESTIONS and (counts(frame) or _is_of_a_module(frame)):
            asked(frame)

    called.graphs_hook = True  # type: ignore[attr-defined]  # others of this project may be chained to it
    before = sys.getprofile()
    sys.setprofile(called)
    try:
        yield
    finally:
        sys.setprofile(before)


class GradWrites:
    """Writes that autograd refuses, in a step that is run without it: to leaves that require a gradient, by ``out=`` from any.

    Args:
        on: whether the caller's grad mode is on.
    """

    def __init__(self, on: bool) -> None:
        self._on = on
        self._before: list[bool] = []
        self._leaves: set[int] = set()
        self._recorded: set[int] = set()

    def switched(self, on: bool, frame: FrameType) -> None:
        """Note that ``frame`` sets the grad mode: a context manager of torch's that is entered or left, or the step itself."""
        by, owner = frame.f_code.co_name, frame.f_locals.get("self")
        if _caller(frame).startswith("graphs."):
            return  # what runs the step without
        if by == "__enter__" and type(owner) is torch.set_grad_enabled:
            return  # it was set when that was made
        if by == "__init__" and frame.f_back is not None:  # `no_grad` makes one of those
            by = frame.f_back.f_code.co_name
        if by == "__exit__":
            self._on = self._before.pop() if self._before else self._on
        else:
            self._before.append(self._on)
            self._on = on

    def refused(self, func: OpOverload, tensors: Sequence[Tensor], written: Sequence[Tensor]) -> bool:
        """Whether autograd refuses a call of an operator on ``tensors``, of which it writes some."""
        if not self._on:
            return False
        leaves = {storage_id(tensor) for tensor in tensors if tensor.requires_grad}
        self._leaves |= leaves
        if any(storage_id(tensor) in self._leaves for tensor in written):
            return True
        return any(argument.is_out for argument in func._schema.arguments) and self._follows(tensors)

    def made(self, func: OpOverload, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Note what autograd would have recorded the making of."""
        if self._on and self._follows(tensors) and func is not torch.ops.aten.detach.default:
            self._recorded |= {storage_id(tensor) for tensor in results if tensor.is_floating_point() or tensor.is_complex()}

    def _follows(self, tensors: Sequence[Tensor]) -> bool:
        known = self._recorded | self._leaves
        return any(tensor.requires_grad or storage_id(tensor) in known for tensor in tensors)


def _caller(frame: FrameType | None) -> str:
    """The module that uses a context manager of torch's, of which ``frame`` is a method."""
    caller = first_frame(frame, lambda frame: not _module(frame).startswith("torch."))
    return _module(caller) if caller is not None else ""


def _is_of_a_module(frame: FrameType) -> bool:
    return _module(frame).startswith("torch.nn.")


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))
