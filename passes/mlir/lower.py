"""A step in one of the dialects of MLIR: imported and lowered by torch-mlir's own pipelines."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from passes.errors import LoweringError, OptionError
from passes.mlir.bindings import bindings
from passes.mlir.decompositions import Decompositions
from passes.mlir.program import Program, export_program
from passes.mlir.sites import source_of

_TO_TORCH = "builtin.module(func.func(torch-match-quantized-custom-ops),torchdynamo-export-to-torch-backend-pipeline)"
DIALECTS: dict[str, tuple[str, ...]] = {
    "torch": (_TO_TORCH,),
    "linalg": (_TO_TORCH, "builtin.module(torch-backend-to-linalg-on-tensors-backend-pipeline)"),
    "stablehlo": (_TO_TORCH, "builtin.module(torch-backend-to-stablehlo-backend-pipeline)"),
    "tosa": (_TO_TORCH, "builtin.module(torch-backend-to-tosa-backend-pipeline)"),
}
"""For each dialect the pipelines of torch-mlir that lead there from an imported graph."""

PIPELINE = "// pipeline: "  # the first line of a file that reproduces a failure; the module as it was follows


@dataclass(frozen=True)
class LoweredStep:
    """A step in a dialect of MLIR. ``str()`` is its text.

    The module has one function ``main``. It takes the tensors of ``program.operands`` (weights and buffers first, then the
    tensor arguments of the call) and returns the new values of those that are written and the results, equal ones once.

    Attributes:
        dialect: one of ``DIALECTS``.
        module: ``torch_mlir.ir.Module``.
        program: the exported graph, and what its inputs and outputs are.
    """

    dialect: str
    module: Any
    program: Program

    def __str__(self) -> str:
        return str(self.module)


def to_mlir(
    model: Callable[..., Any],
    *args: Any,
    dialect: str = "linalg",
    kwargs: Mapping[str, Any] | None = None,
    decompositions: Decompositions | None = None,
) -> LoweredStep:
    """Lower one call ``model(*args, **kwargs)`` to a dialect of MLIR.

    Shapes, dtypes and Python values are those of this call. Weights, buffers and constants become arguments of the lowered
    function, and what the step writes in place (a KV cache) becomes a result of it, so the text holds no data.

    Args:
        model: an ``nn.Module``, a function, a captured step, a ``torch.fx.GraphModule`` or an ``ExportedProgram``. It is traced,
            not run; what it writes stays as it is.
        args: positional arguments of the call, any pytree; not read for an ``ExportedProgram``.
        dialect: ``torch``, ``linalg``, ``stablehlo`` or ``tosa``.
        kwargs: keyword arguments of the call.
        decompositions: what operators outside ATen are made of, see `register_decompositions`; goes before what is registered.

    Raises:
        OptionError: no such dialect, or ``model`` is not something that can be traced.
        MissingDependency: torch-mlir is absent, or its version cannot be used with this torch.
        LoweringError: the step cannot be traced, or an operator has no lowering: with the operator, the source line and a
            command that reproduces the failure.
    """
    if dialect not in DIALECTS:
        raise OptionError("dialect", dialect, DIALECTS)
    program = export_program(model, args, kwargs or {}, decompositions or {})
    module = _imported(program)
    for pipeline in DIALECTS[dialect]:
        run_pipeline(module, pipeline, f"lowering to {dialect}")
    return LoweredStep(dialect, module, program)


def _imported(program: Program) -> Any:
    mlir = bindings()
    context = mlir.ir.Context()
    mlir.register_torch_dialect(context)
    importer = mlir.importer(context=context)
    try:
        importer.import_stateless_graph(program.graph, func_name="main")
    except Exception as error:  # the importer raises whatever its Python raises
        raise LoweringError(
            "import",
            f"{type(error).__name__}: {str(error).partition(chr(10))[0]}",
            reproduce="torch_mlir.fx.export_and_import(model, *args)",
            remedy="use operators, dtypes and shapes that torch-mlir can import, or decompose the operator with decompositions=",
        ) from error
    return importer.module


def run_pipeline(module: Any, pipeline: str, stage: str) -> None:
    """Run a pass pipeline on ``module`` in place.

    Raises:
        LoweringError: it failed; the module as it was before is kept in a file that the command to reproduce it names.
    """
    mlir = bindings()
    before = module.operation.get_asm(enable_debug_info=True, large_elements_limit=16)
    with module.context as context:
        context.emit_error_diagnostics = False  # collected in the exception, with their locations
        try:
            mlir.pass_manager.parse(pipeline).run(module.operation)
        except mlir.ir.MLIRError as error:
            raise _failure(error, before, pipeline, stage) from error


def _failure(error: Any, before: str, pipeline: str, stage: str) -> LoweringError:
    with tempfile.NamedTemporaryFile("w", prefix="lowering-", suffix=".mlir", delete=False) as file:
        file.write(f"{PIPELINE}{pipeline}\n{before}")
    first = next(iter(error.error_diagnostics), None)
    message = first.message if first is not None else str(error)
    named = re.search(r"'(torch\.[\w.]+)'", message)
    operator = named.group(1).removeprefix("torch.") if named else ""
    if operator == "operator":
        unknown = re.search(r'name = "torch\.([\w.]+)"', message)  # what torch-mlir has no operation of its own for
        operator = unknown.group(1) if unknown else operator
    return LoweringError(
        stage,
        f"torch-mlir cannot do that: {message.partition(': ')[0].strip()}",
        operator=operator,
        site=source_of(str(first.location)) if first is not None else None,
        reproduce=f"python -m passes.mlir.reproduce {file.name}",
        remedy="write the step with operators that this dialect has, decompose the operator with decompositions=, or choose "
        f"another dialect of {', '.join(DIALECTS)}",
    )
