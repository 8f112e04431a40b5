"""Record decode steps once and replay them: CUDA graphs, HIP graphs, and an operator tape on the CPU.

As a command (``python -m graphs``), names are imported when they are first used (PEP 562), so that ``--help`` does not wait for
torch. A program that imports the package has all of it, operators included, from then on.
"""

import importlib
import importlib.util
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from graphs._version import __version__

if TYPE_CHECKING:
    from graphs.auditing.audit import Audit, Finding, audit
    from graphs.contract.padding import Padding, sentinel
    from graphs.custom_ops.capture_check import capture_check
    from graphs.custom_ops.register import register_op
    from graphs.dispatch.captured_module import CapturedModule, CapturedStep, capture
    from graphs.dynamo.backend import backend_report
    from graphs.eager_mode import eager
    from graphs.errors import GraphsError, Refusal
    from graphs.events import Event, on_event
    from graphs.generation.accelerate import accelerate, accelerated_report, restore
    from graphs.ops import GroupedProjection
    from graphs.ops.route import route
    from graphs.parity import ParityReport, parity
    from graphs.report import BackendReport, CaptureReport

__all__ = [
    "Audit",
    "BackendReport",
    "CaptureReport",
    "CapturedModule",
    "CapturedStep",
    "Event",
    "Finding",
    "GraphsError",
    "GroupedProjection",
    "Padding",
    "ParityReport",
    "Refusal",
    "__version__",
    "accelerate",
    "accelerated_report",
    "audit",
    "backend_report",
    "capture",
    "capture_check",
    "eager",
    "on_event",
    "parity",
    "register_op",
    "restore",
    "route",
    "sentinel",
]
_MODULES = {
    "graphs.auditing.audit": ("Audit", "Finding", "audit"),
    "graphs.dynamo.backend": ("backend_report",),
    "graphs.dispatch.captured_module": ("CapturedModule", "CapturedStep", "capture"),
    "graphs.contract.padding": ("Padding", "sentinel"),
    "graphs.events": ("Event", "on_event"),
    "graphs.errors": ("GraphsError", "Refusal"),
    "graphs.generation.accelerate": ("accelerate", "accelerated_report", "restore"),
    "graphs.eager_mode": ("eager",),
    "graphs.custom_ops.capture_check": ("capture_check",),
    "graphs.ops": ("GroupedProjection",),
    "graphs.parity": ("ParityReport", "parity"),
    "graphs.custom_ops.register": ("register_op",),
    "graphs.report": ("BackendReport", "CaptureReport"),
    "graphs.ops.route": ("route",),
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

if os.path.basename(sys.argv[0] if sys.argv else "") not in ("-m", "graphs"):  # "-m" while the package of a command is found
    for _module in _MODULES:
        importlib.import_module(_module)
    for _name in _HOME:
        getattr(sys.modules[__name__], _name)
    importlib.import_module("graphs.generation.captured_generate")
    importlib.import_module("graphs.dynamo.registered").register()
