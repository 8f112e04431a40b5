"""Finding a step that asks whether gradients are recorded, where they are.

A step is recorded without autograd. Called in grad mode, one that asks (``torch.is_grad_enabled()``, ``y.requires_grad``)
would be told something else than in eager. Modules of torch that choose their way by it ask too; context managers that keep
the mode do not count.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch

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


def _is_of_a_module(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).startswith("torch.nn.")
