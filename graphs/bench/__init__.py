"""The experiments behind ``python -m graphs bench``: decode steps, the grouped projection, and what a captured call costs.

Names are imported when they are first used, so that the command line knows its options without waiting for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphs.bench.experiment import run_bench
    from graphs.bench.settings import BenchSettings
    from graphs.bench.wo_a.tune import tune

__all__ = ["BenchSettings", "run_bench", "tune"]

_HOME = {"BenchSettings": "graphs.bench.settings", "run_bench": "graphs.bench.experiment", "tune": "graphs.bench.wo_a.tune"}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
        return value
