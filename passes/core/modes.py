"""Dispatch modes and runs that do not need Dynamo: importing it takes seconds, in which most steps are recorded."""

from __future__ import annotations

import contextlib
import sys
from contextlib import AbstractContextManager

import torch
from torch.utils._python_dispatch import TorchDispatchMode


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
