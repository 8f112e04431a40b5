"""torch-mlir: the one file that imports it, when it is first needed."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from passes.errors import MissingDependency

INSTALL = "pip install --upgrade torch-mlir"


class Bindings(NamedTuple):
    """What is used of torch-mlir."""

    ir: Any
    """``torch_mlir.ir``: contexts, modules, operations, types."""
    pass_manager: Any
    execution_engine: Any
    importer: Any
    """``FxImporter``: FX graphs of ATen operators to the torch dialect."""
    register_torch_dialect: Callable[[Any], None]
    decompositions: Callable[[], dict[Any, Callable[..., Any]]]
    """The ATen operators that torch-mlir wants decomposed first."""


@functools.cache
def bindings() -> Bindings:
    """Import torch-mlir once.

    Raises:
        MissingDependency: it is absent, or of a version that this torch cannot import or that lacks what is used here.
    """
    try:
        from torch_mlir import execution_engine, ir, passmanager
        from torch_mlir.dialects import torch as torch_dialect
        from torch_mlir.extras import fx_decomp_util, fx_importer

        return Bindings(
            ir,
            passmanager.PassManager,
            execution_engine.ExecutionEngine,
            fx_importer.FxImporter,
            torch_dialect.register_dialect,
            fx_decomp_util.get_decomposition_table,
        )
    except (ImportError, AttributeError, TypeError, RuntimeError) as error:
        raise MissingDependency("torch-mlir", "lowering to MLIR", _found(error), INSTALL) from error


def _found(error: Exception) -> str:
    try:
        version = importlib.metadata.version("torch-mlir")
    except importlib.metadata.PackageNotFoundError:
        return "it is not installed"
    return f"version {version} is installed and cannot be used with torch {torch.__version__} ({type(error).__name__}: {error})"
