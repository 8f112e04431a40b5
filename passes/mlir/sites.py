"""Which line of the user's program an error, a node or an MLIR location speaks of."""

from __future__ import annotations

import linecache
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

from torch._ops import OpOverload
from torch.fx import traceback as node_meta
from torch.overrides import TorchFunctionMode

from passes.core.modes.patched_functions import as_torch_made
from passes.core.source_location import frames_of, is_user_file, line_of, raised_at, user_frame
from passes.errors import SourceLine


class SourceLines(TorchFunctionMode):
    """While entered, traced nodes carry the user's innermost line as their stack trace, not the line of a ``forward`` above it.

    Needs ``torch.fx.traceback.preserve_node_meta()`` around it.
    """

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = as_torch_made(func, sys._getframe(1))
        frame = user_frame()
        if frame is not None:
            node_meta.set_stack_trace(traceback.StackSummary.extract([(frame, line_of(frame)[1])]).format())
        return func(*args, **(kwargs or {}))


def blame(error: BaseException) -> tuple[str, SourceLine]:
    """The operator that was being traced and the innermost line of the user's code, from the traceback of ``error``."""
    held = [frame.f_locals.get(name) for frame in frames_of(error) for name in ("op", "func")]
    operators = [str(value) for value in held if isinstance(value, OpOverload)]
    return operators[-1] if operators else "", _line(*raised_at(error))


def _line(file: str, line: int) -> SourceLine:
    return SourceLine(file, line, linecache.getline(file, line).strip())


def source_of(trace: str | None) -> SourceLine:
    """The innermost line of the user's code in a stack trace, or in the printed form of an MLIR location."""
    found = re.findall(r'"([^"\n]+)"(?:, line |:)(\d+)', trace or "")
    users = [(file, int(line)) for file, line in found if is_user_file(file)]
    if not users:
        return SourceLine()
    return _line(*(users[-1] if trace and ", line " in trace else users[0]))  # a location begins with the innermost line
