"""Which line of the user's program an error, a node or an MLIR location speaks of."""

from __future__ import annotations

import linecache
import os
import re

import torch
from torch._ops import OpOverload

from passes.errors import SourceLine

_TORCH = os.path.dirname(torch.__file__) + os.sep
_PASSES = os.path.dirname(os.path.dirname(__file__)) + os.sep


def blame(error: BaseException) -> tuple[str, SourceLine]:
    """The operator that was being traced and the innermost line of the user's code, from the traceback of ``error``."""
    operator, site = "", SourceLine()
    step = error.__traceback__
    while step is not None:
        code, values = step.tb_frame.f_code, step.tb_frame.f_locals
        if os.path.isfile(code.co_filename) and not code.co_filename.startswith((_TORCH, _PASSES)):
            site = _line(code.co_filename, step.tb_lineno)
        operator = next((str(values[name]) for name in ("func", "op") if isinstance(values.get(name), OpOverload)), operator)
        step = step.tb_next
    return operator, site


def _line(file: str, line: int) -> SourceLine:
    return SourceLine(file, line, linecache.getline(file, line).strip())


def source_of(trace: str | None) -> SourceLine:
    """The innermost line of the user's code in a stack trace, or in the printed form of an MLIR location."""
    found = re.findall(r'"([^"\n]+)"(?:, line |:)(\d+)', trace or "")
    users = [(file, int(line)) for file, line in found if not file.startswith((_TORCH, _PASSES))]
    if not users:
        return SourceLine()
    return _line(*(users[-1] if trace and ", line " in trace else users[0]))  # a location begins with the innermost line
