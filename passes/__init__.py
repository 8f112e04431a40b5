"""Rewrites of FX graphs that make a step recordable, and their lowering to MLIR. Imports torch and nothing of `graphs`."""

from passes.constants import hoist_constants
from passes.mlir import compile_mlir, register_decompositions, run_mlir, to_mlir
from passes.pipeline import DEFAULT, Change, Pass, run

__all__ = [
    "DEFAULT",
    "Change",
    "Pass",
    "compile_mlir",
    "hoist_constants",
    "register_decompositions",
    "run",
    "run_mlir",
    "to_mlir",
]
