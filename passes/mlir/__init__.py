"""FX -> torch-mlir: a step in one of the dialects of MLIR, and its linalg form compiled and run on the CPU.

One call of ``to_mlir``: the model is exported (``program.py``), its operators are decomposed (``decompositions.py``), the graph
is imported and lowered by torch-mlir's own pipelines (``lower.py``). ``run_mlir`` compiles the linalg form (``engine.py``).
"""

from passes.mlir.decompositions import register_decompositions
from passes.mlir.engine import CompiledStep, compile_mlir, run_mlir
from passes.mlir.lower import DIALECTS, LoweredStep, to_mlir

__all__ = ["DIALECTS", "CompiledStep", "LoweredStep", "compile_mlir", "register_decompositions", "run_mlir", "to_mlir"]
