"""The linalg form of a step compiled by torch-mlir's pass manager and run by its execution engine, on the CPU.

A reference, not a fast back end: buffers, loops, LLVM; no tiling, no threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from passes.errors import IndexOutOfRange, OptionError
from passes.mlir.bindings import bindings
from passes.mlir.decompositions import Decompositions
from passes.mlir.fp8 import expand_fp8
from passes.mlir.guards import guard
from passes.mlir.lower import LoweredStep, run_pipeline, to_mlir
from passes.mlir.sites import source_of

_BUFFERIZE = "copy-before-write bufferize-function-boundaries function-boundary-type-conversion=identity-layout-map"
_SMALL_FLOATS = "source-types=bf16,f16,f8E4M3FN,f8E4M3FNUZ target-type=f32"
_OPTIMISATION = 0  # wo_a_bmm, K = 2048: 0.3 s until the first result and 13 ms a call; 4 s and 5 ms at level 2
TO_LOOPS = ",".join(
    [
        "func.func(refback-generalize-tensor-pad,refback-generalize-tensor-concat)",
        "func.func(linalg-fuse-elementwise-ops)",  # while products are named operations: fused into one, work would be repeated
        "func.func(linalg-fold-unit-extent-dims,tm-tensor-bufferize)",
        f"one-shot-bufferize{{{_BUFFERIZE}}}",
        "buffer-results-to-out-params{modify-public-functions=1 hoist-static-allocs=1}",
        "buffer-deallocation-pipeline",
        "func.func(tm-tensor-to-loops,refback-munge-memref-copy,convert-linalg-to-loops,lower-affine)",
        "func.func(math-extend-to-supported-types{target-type=f32})",
        f"func.func(arith-emulate-unsupported-floats{{{_SMALL_FLOATS}}})",
    ]
)
TO_LLVM = ",".join(
    [
        "inline",
        "convert-scf-to-cf",
        "func.func(refback-expand-ops-for-llvm,arith-expand{include-bf16=true},convert-math-to-llvm)",
        "convert-math-to-libm,expand-strided-metadata,finalize-memref-to-llvm,lower-affine",
        "convert-bufferization-to-memref,finalize-memref-to-llvm",
        "func.func(convert-arith-to-llvm)",
        "convert-vector-to-llvm,convert-index-to-llvm,convert-complex-to-llvm,convert-ub-to-llvm",
        "convert-func-to-llvm,convert-cf-to-llvm,reconcile-unrealized-casts",
    ]
)


class CompiledStep:
    """A compiled step: called like the model, with the shapes, dtypes and Python values it was lowered for.

    Weights, buffers and state are read where the model has them at each call, and what the step writes is written there.
    Results are new tensors without gradients.
    """

    def __init__(self, lowered: LoweredStep) -> None:
        if lowered.dialect != "linalg":
            raise OptionError("dialect of the lowered step", lowered.dialect, "'linalg': to_mlir(..., dialect='linalg')")
        self.program = lowered.program
        self._engine, self._places = _compile(lowered.module)

    @torch.no_grad()
    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Run the step.

        Raises:
            OptionError: an argument differs from the call that was lowered in structure, shape, dtype or (where it is no tensor)
                value, or a tensor is not on the CPU.
            IndexOutOfRange: an index in a tensor is out of range. Nothing was written then.
        """
        program = self.program
        leaves = program.call.match(args, kwargs)
        operands = [operand.tensor if operand.leaf is None else leaves[operand.leaf] for operand in program.operands]
        for operand, tensor in zip(program.operands, operands, strict=True):
            _check(operand.name, tensor, operand.tensor)
        outputs = [torch.empty(value.shape, dtype=value.dtype) for value in program.outputs]
        self._invoke("main", [tensor.detach().contiguous() for tensor in operands] + outputs)
        self._raise_faults()
        for position, at in program.written:
            operands[position].copy_(outputs[at])
        pairs = zip(program.results, program.constants, strict=True)
        return pytree.tree_unflatten([constant if at is None else outputs[at] for at, constant in pairs], program.structure)

    def _raise_faults(self) -> None:
        place = torch.zeros((), dtype=torch.int64)
        self._invoke("take_fault", [place])
        if place:
            raise IndexOutOfRange(source_of(self._places[int(place) - 1]))

    def _invoke(self, function: str, tensors: list[Tensor]) -> None:
        descriptors = [_descriptor(tensor) for tensor in tensors]
        self._engine.invoke(function, *(ctypes.pointer(ctypes.pointer(each)) for each in descriptors))


def compile_mlir(lowered: LoweredStep) -> CompiledStep:
    """Compile a step that was lowered with ``dialect="linalg"``, to be called many times.

    Raises:
        OptionError: it was lowered to another dialect.
        LoweringError: the reference pipeline cannot compile it.
    """
    return CompiledStep(lowered)


def run_mlir(
    model: Callable[..., Any],
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    decompositions: Decompositions | None = None,
) -> Any:
    """Lower ``model(*args, **kwargs)`` to linalg, compile that and run it once on the CPU.

    Returns what the model returns, and writes what the model writes. Arguments and errors are those of `to_mlir`; all tensors
    must be on the CPU. To run a step more than once, keep ``compile_mlir(to_mlir(model, *args))``.
    """
    lowered = to_mlir(model, *args, kwargs=kwargs, decompositions=decompositions)
    return compile_mlir(lowered)(*args, **(kwargs or {}))


def _compile(module: Any) -> tuple[Any, list[str]]:
    """Compile a copy of a linalg module. Returns the execution engine that holds it and the places that are guarded."""
    mlir = bindings()
    with module.context:
        copy = mlir.ir.Module.parse(module.operation.get_asm(enable_debug_info=True))
        (main,) = (each for each in copy.body.operations if each.operation.name == "func.func")
        main.attributes["llvm.emit_c_interface"] = mlir.ir.UnitAttr.get()
        run_pipeline(copy, f"builtin.module({TO_LOOPS})", "compiling linalg to loops")
        places = guard(copy)
        expand_fp8(copy)
        run_pipeline(copy, f"builtin.module({TO_LLVM})", "compiling loops to LLVM")
        return mlir.execution_engine(copy, opt_level=_OPTIMISATION), places


def _check(name: str, tensor: Any, like: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.shape != like.shape or tensor.dtype != like.dtype:
        got = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else tensor
        raise OptionError(name, got, f"{like.dtype} {tuple(like.shape)}, for which the step was lowered")
    if tensor.device.type != "cpu":
        raise OptionError(f"device of {name}", str(tensor.device), "'cpu': move the model and its arguments there")


def _descriptor(tensor: Tensor) -> Any:
    """The memref descriptor of a contiguous tensor: base, aligned base, offset, sizes, strides; all of 64 bits."""
    words = [tensor.data_ptr(), tensor.data_ptr(), 0, *tensor.shape, *tensor.stride()]
    return (ctypes.c_int64 * len(words))(*words)
