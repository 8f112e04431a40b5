"""The experiments behind ``python -m graphs bench``: decode steps, the grouped projection, and what a captured call costs."""

from graphs.bench.experiment import run_bench
from graphs.bench.settings import BenchSettings
from graphs.bench.wo_a.tune import tune

__all__ = ["BenchSettings", "run_bench", "tune"]
