"""Which line of the user's program an error, a node or an MLIR location speaks of."""

from __future__ import annotations

import linecache
import os
import re
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import traceback as node_meta
from torch.overrides import TorchFunctionMode

from passes.core.patched_functions import as_torch_made
from passes.errors import SourceLine

_TORCH = os.path.dirname(torch.__file__) + os.sep
_PASSES = os.path.dirname(os.path.dirname(__file__)) + os.sep


class SourceLines(TorchFunctionMode):
    """While entered, traced nodes carry the user's innermost line as their stack trace, not the line of a ``forward`` above it.

    Needs ``torch.fx.traceback.preserve_node_meta()`` around it.
    """

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        frame: FrameType | None = sys._getframe(1)
        func = as_torch_made(func, sys._getframe(1))
        while frame is not None and not _is_users(frame.f_code.co_filename):
            frame = frame.f_back
        if frame is not None:
            node_meta.set_stack_trace(traceback.StackSummary.extract([(frame, frame.f_lineno)]).format())
        return func(*args, **(kwargs or {}))


def _is_users(file: str) -> bool:
    return not file.startswith((_TORCH, _PASSES)) and os.path.isfile(file)


def blame(error: BaseException) -> tuple[str, SourceLine]:
    """The operator that was being traced and the innermost line of the user's code, from the traceback of ``error``."""
    operator, site = "", SourceLine()
    step = error.__traceback__
    while step is not None:
        code, values = step.tb_frame.f_code, step.tb_frame.f_locals
        if _is_users(code.co_filename):
            site = _line(code.co_filename, step.tb_lineno)
        operator = next((str(values[name]) for name in ("func", "op") if isinstance(values.get(name), OpOverload)), operator)
        step = step.tb_next
    return operator, site


def _line(file: str, line: int) -> SourceLine:
    return SourceLine(file, line, linecache.getline(file, line).strip())


def source_of(trace: str | None) -> SourceLine:
    """The innermost line of the user's code in a stack trace, or in the printed form of an MLIR location."""
    found = re.findall(r'"([^"\n]+)"(?:, line |:)(\d+)', trace or "")
    users = [(file, int(line)) for file, line in found if _is_users(file)]
    if not users:
        return SourceLine()
    return _line(*(users[-1] if trace and ", line " in trace else users[0]))  # a location begins with the innermost line
