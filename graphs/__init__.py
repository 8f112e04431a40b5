"""Record decode steps once and replay them: CUDA graphs, HIP graphs, and an operator tape on the CPU.

Names are imported when they are first used (PEP 562), so that ``python -m graphs --help`` does not wait for torch.
"""

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphs.audit import Audit, Finding, audit
    from graphs.backend import backend_report
    from graphs.capture import CapturedModule, capture
    from graphs.contract.padding import Padding, sentinel
    from graphs.errors import GraphsError, Refusal
    from graphs.modes import eager
    from graphs.operator_check import capture_check
    from graphs.ops import GroupedProjection
    from graphs.parity import ParityReport, parity
    from graphs.register import register_op
    from graphs.report import BackendReport, CaptureReport
    from graphs.route import route

__all__ = [
    "Audit",
    "BackendReport",
    "CaptureReport",
    "CapturedModule",
    "Finding",
    "GraphsError",
    "GroupedProjection",
    "Padding",
    "ParityReport",
    "Refusal",
    "audit",
    "backend_report",
    "capture",
    "capture_check",
    "eager",
    "parity",
    "register_op",
    "route",
    "sentinel",
]
__version__ = "0.1.0"

_MODULES = {
    "graphs.audit": ("Audit", "Finding", "audit"),
    "graphs.backend": ("backend_report",),
    "graphs.capture": ("CapturedModule", "capture"),
    "graphs.contract.padding": ("Padding", "sentinel"),
    "graphs.errors": ("GraphsError", "Refusal"),
    "graphs.modes": ("eager",),
    "graphs.operator_check": ("capture_check",),
    "graphs.ops": ("GroupedProjection",),
    "graphs.parity": ("ParityReport", "parity"),
    "graphs.register": ("register_op",),
    "graphs.report": ("BackendReport", "CaptureReport"),
    "graphs.route": ("route",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

if not TYPE_CHECKING:  # a type checker would take any name for one of this package

    def __getattr__(name: str) -> Any:
        """A public name, or a submodule, on its first use; found without this function from then on."""
        if name in _HOME:
            value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
            return value
        if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps ``graphs.capture`` the function: importing the submodule of that name would put the module in its place."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
