"""A model as one functional graph: weights, state and arguments in, new state and results out.

Before::

    model(x)                              # reads self.weight, writes self.cache in place

After::

    main(weight, cache, x) -> (new cache, y)    # ATen operators only, nothing written
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, OutputKind
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from passes.errors import LoweringError
from passes.mlir.bindings import bindings
from passes.mlir.decompositions import Decompositions, registered
from passes.mlir.sites import source_of
from passes.mlir.tracing import EXPORT, Call, Step, staged, trace

_WRITES = (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION)
aten = torch.ops.aten
_KNOWN = ("aten", "prims", "prim")


@dataclass(frozen=True)
class Operand:
    """One tensor argument of the lowered function.

    Attributes:
        name: the qualified name of a weight or buffer; ``args[0]`` or ``kwargs['x']``, with the way inside, for an argument.
        tensor: the weight, buffer or other tensor of the model itself; for an argument a fake one, which tells shape and dtype.
        leaf: the position among the leaves of the call; ``None`` for tensors that the model has without being given them.
    """

    name: str
    tensor: Tensor
    leaf: int | None


@dataclass(frozen=True)
class Program:
    """A model as a functional graph.

    Attributes:
        graph: ATen operators; its placeholders are ``operands`` in order, each of its outputs is given once.
        operands: tensors the model has, then tensor arguments.
        outputs: fake tensors: shape and dtype of each output.
        written: ``(operand, output)``: positions of tensors that are written, and of their new values.
        results: for each leaf of the model's result, the position among the outputs, or ``None`` where it is no tensor.
        constants: the leaves of the result that are no tensors, ``None`` in place of tensors.
        structure: of the result.
        call: the arguments it was lowered for.
    """

    graph: Graph
    operands: tuple[Operand, ...]
    outputs: tuple[Tensor, ...]
    written: tuple[tuple[int, int], ...]
    results: tuple[int | None, ...]
    constants: tuple[Any, ...]
    structure: pytree.TreeSpec
    call: Call


def export_program(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], decompositions: Decompositions
) -> Program:
    """Export ``model(*args, **kwargs)`` and decompose its operators until only those of ATen are left.

    Tables, the first that has an operator decides: ``decompositions``, those registered, those torch-mlir asks for.

    Raises:
        MissingDependency: torch-mlir, which says what to decompose, cannot be imported.
        LoweringError: the model cannot be traced, or an operator has no decomposition.
    """
    table = {**bindings().decompositions(), **registered(), **decompositions}
    exported, step = trace(model, args, kwargs)
    program = staged("decomposition", lambda: exported.run_decompositions(table))
    _drop_assertions(program.graph)
    _wrap_negative_indices(program.graph)
    for node in program.graph.nodes:
        _check(node)
    return _described(program, step)


def _drop_assertions(graph: Graph) -> None:
    """Remove checks without a result, which export adds for values that it could not know."""
    for node in list(graph.nodes):
        if node.op == "call_function" and not node.users and "assert" in str(node.target):
            graph.erase_node(node)


def _wrap_negative_indices(graph: Graph) -> None:
    """Make the indices of ``index_put`` count from the front: torch-mlir's scatter takes them as they are.

    Before: ``index_put(x, [i], y)``. After: ``index_put(x, [where(i < 0, i + size, i)], y)``.
    """
    for node in graph.find_nodes(op="call_function", target=aten.index_put.default):
        base, indices = node.args[0].meta["val"], node.args[1]
        with graph.inserting_before(node), base.fake_mode:
            wrapped = [
                _wrapped(graph, node, index, size) if index is not None and index.meta["val"].dtype != torch.bool else index
                for index, size in zip(indices, base.shape, strict=False)
            ]
        node.update_arg(1, wrapped)


def _wrapped(graph: Graph, user: Node, index: Node, size: int) -> Node:
    def call(target: OpOverload, *args: Any) -> Node:
        node = graph.call_function(target, args)
        values = [arg.meta["val"] if isinstance(arg, Node) else arg for arg in args]
        node.meta.update(val=target(*values), stack_trace=user.meta.get("stack_trace"))
        return node

    negative = call(aten.lt.Scalar, index, 0)
    return call(aten.where.self, negative, call(aten.add.Tensor, index, size), index)


def _check(node: Node) -> None:
    """Raise LoweringError for an operator that is none of ATen's: torch-mlir knows no others."""
    if node.op != "call_function" or getattr(node.target, "__name__", "") == "getitem":
        return
    if isinstance(node.target, OpOverload) and node.target.namespace in _KNOWN:
        return
    name = str(node.target) if isinstance(node.target, OpOverload) else f"{node.target!r}"
    raise LoweringError(
        "decomposition",
        f"nobody said what {name} is made of",
        operator=name,
        site=source_of(node.meta.get("stack_trace")),
        reproduce=EXPORT,
        remedy=f"passes.register_decompositions({{torch.ops.{name}: function}}), or decompositions= of this call, with a "
        "function of ATen operators",
    )


def _described(program: ExportedProgram, step: Step) -> Program:
    """Say what the inputs and outputs of an exported step are; outputs that are one value are given once."""
    graph, signature = program.graph, program.graph_signature
    operands: list[Operand] = []
    arguments = iter(step.tensors)
    for node, spec in zip(graph.find_nodes(op="placeholder"), signature.input_specs, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            leaf = next(arguments)
            operands.append(Operand(step.call.names[leaf], node.meta["val"], leaf))
        else:
            operands.append(Operand((spec.target or "").removeprefix("model."), _held(program, spec), None))
    position = {spec.target or spec.arg.name: at for at, spec in enumerate(signature.input_specs)}
    values: dict[Node, int] = {}
    written: list[tuple[int, int]] = []
    returned: list[int] = []
    for value, out in zip(cast("tuple[Node, ...]", graph.output_node().args[0]), signature.output_specs, strict=True):
        at = values.setdefault(value, len(values))
        if out.kind in _WRITES:
            written.append((position[out.target or ""], at))
        else:
            returned.append(at)
    graph.output_node().args = (tuple(values),)
    outputs = tuple(value.meta["val"] for value in values)
    order = iter(returned)
    results = tuple(next(order) if tensor else None for tensor in step.result.tensors)
    assert step.result.structure is not None, "the step was traced"
    constants = step.result.leaves
    return Program(graph, tuple(operands), outputs, tuple(written), results, constants, step.result.structure, step.call)


def _held(program: ExportedProgram, spec: InputSpec) -> Tensor:
    """The weight, buffer or constant behind an input: the model's own tensor, not a copy."""
    target = spec.target or ""
    value = program.state_dict.get(target)
    return program.constants[target] if value is None else value
