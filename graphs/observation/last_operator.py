"""The operator at which a recording broke off."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch._ops import HigherOrderOperator

from graphs.errors import Site
from graphs.observation.fused_modules import unnoticed
from graphs.state.storage import is_wrapper, tensors_in
from passes.core.composites import Calls, DispatchMode, as_written, run, taken_apart
from passes.core.source_location import user_line


class LastOperator(DispatchMode):
    """Remembers the operator that runs now."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.operator = ""
        self.site = Site()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, HigherOrderOperator) or any(map(is_wrapper, tensors_in((*args, kwargs or {})))):
            self.operator, self.site = str(func), Site.at(user_line(sys._getframe(1)))
            return func(*args, **(kwargs or {}))
        whole = taken_apart(self, func, args, kwargs or {})
        if whole is not NotImplemented:
            return whole
        self.operator, self.site = str(func), Site.at(user_line(sys._getframe(1)))
        return run(func, args, kwargs or {})


def last_operation(body: Callable[[Any], Any]) -> tuple[Callable[[Any], Any], LastOperator]:
    """``body`` run so that, when it raises, the second result names the operator and line it had reached."""
    mode = LastOperator()

    def watched(tensors: Any) -> Any:
        with as_written(), unnoticed(), Calls(), mode:
            return body(tensors)

    return watched, mode
