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
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, InputSpec, OutputKind, TensorArgument
from torch.fx import Graph, Node
from torch.fx.traceback import preserve_node_meta
from torch.utils import _pytree as pytree

from passes.errors import LoweringError, OptionError
from passes.mlir.bindings import bindings
from passes.mlir.decompositions import Decompositions, registered
from passes.mlir.sites import SourceLines, blame, source_of

_WRITES = (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION)
aten = torch.ops.aten
_KNOWN = ("aten", "prims", "prim")
_EXPORT = "torch.export.export(model, args, kwargs, strict=False).run_decompositions()"


@dataclass(frozen=True)
class Operand:
    """One tensor argument of the lowered function.

    Attributes:
        name: the qualified name of a weight or buffer, the name of an argument otherwise.
        tensor: what it was lowered for: the weight or buffer itself; for an argument, an empty tensor that only tells shape,
            dtype.
        argument: the position among the flattened arguments of a call; ``None`` for weights and buffers.
    """

    name: str
    tensor: Tensor
    argument: int | None


@dataclass(frozen=True)
class Program:
    """A model as a functional graph.

    Attributes:
        graph: ATen operators; its placeholders are ``operands`` in order, each of its outputs is given once.
        operands: weights and buffers that are read, then tensor arguments.
        outputs: fake tensors: shape and dtype of each output.
        written: ``(operand, output)``: positions of tensors that are written, and of their new values.
        results: for each leaf of the model's result, the position among the outputs, or ``None`` for a constant.
        constants: the constant leaves of the result; ``None`` where the leaf is a tensor.
        signature: structure of ``(args, kwargs)``.
        structure: structure of the result.
    """

    graph: Graph
    operands: tuple[Operand, ...]
    outputs: tuple[Tensor, ...]
    written: tuple[tuple[int, int], ...]
    results: tuple[int | None, ...]
    constants: tuple[Any, ...]
    signature: pytree.TreeSpec
    structure: pytree.TreeSpec

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The leaves of a call, keywords in the order of the call that was lowered.

        Raises:
            OptionError: the call has another structure than that one.
        """
        _, keywords = self.signature.children()
        ordered = {name: kwargs[name] for name in keywords.context if name in kwargs}
        ordered.update(kwargs)
        leaves, structure = pytree.tree_flatten((args, ordered))
        if structure != self.signature:
            raise OptionError("structure of the arguments", structure, f"the one that was lowered, {self.signature}")
        return leaves


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
    exported = _export(model, args, kwargs)
    program = _staged("decomposition", lambda: exported.run_decompositions(table))
    _drop_assertions(program.graph)
    _wrap_negative_indices(program.graph)
    for node in program.graph.nodes:
        _check(node)
    return _described(program)


def _export(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ExportedProgram:
    if isinstance(model, ExportedProgram):
        return model
    if not callable(model):
        raise OptionError("model", model, "an nn.Module, a function, a torch.fx.GraphModule or a torch.export.ExportedProgram")
    stands_for = getattr(type(model), "__graphs_walk__", None)  # a captured step says which model it records
    step = stands_for(model) if stands_for else model
    module = step if isinstance(step, nn.Module) else _Function(step)
    with torch.no_grad(), preserve_node_meta(), SourceLines():
        return _staged("export", lambda: torch.export.export(module, args, dict(kwargs), strict=False))


class _Function(nn.Module):
    """A plain function as a module, which is what ``torch.export`` takes; its parameters keep their names."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def _staged(stage: str, work: Callable[[], ExportedProgram]) -> ExportedProgram:
    try:
        return work()
    except LoweringError:
        raise
    except Exception as error:
        operator, site = blame(error)
        detail = str(error).strip().partition("\n")[0] or type(error).__name__
        raise LoweringError(
            stage,
            f"{type(error).__name__}: {detail}",
            operator=operator,
            site=site,
            reproduce=_EXPORT,
            remedy="see that the call runs eagerly; keep values that depend on data in tensors (torch.where, indexing with "
            "tensors) and state that is written in buffers or arguments, so that torch.export can trace the step",
        ) from error


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
        reproduce=_EXPORT,
        remedy=f"passes.register_decompositions({{torch.ops.{name}: function}}), or decompositions= of this call, with a "
        "function of ATen operators",
    )


def _described(program: ExportedProgram) -> Program:
    """Sort the inputs and outputs of an exported program; arguments that are constants leave the graph."""
    graph, signature = program.graph, program.graph_signature
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    operands: list[Operand] = []
    position: dict[str, int] = {}
    argument = 0
    for node, spec in zip(placeholders, signature.input_specs, strict=True):
        if not isinstance(spec.arg, TensorArgument):
            argument += spec.kind is InputKind.USER_INPUT
            _erase(node, spec)
            continue
        user = spec.kind is InputKind.USER_INPUT
        position[spec.target or spec.arg.name] = position[spec.arg.name] = len(operands)
        tensor = node.meta["val"] if user else _held(program, spec)
        operands.append(Operand(spec.target or spec.arg.name, tensor, argument if user else None))
        argument += user
    values: dict[Node, int] = {}
    written: list[tuple[int, int]] = []
    results: list[int | None] = []
    constants: list[Any] = []
    returned = cast("tuple[Node, ...]", graph.output_node().args[0])
    for value, out in zip(returned, signature.output_specs, strict=True):
        at = None if isinstance(out.arg, ConstantArgument) else values.setdefault(value, len(values))
        if out.kind in _WRITES and at is not None:
            written.append((position[out.target or ""], at))
        else:
            results.append(at)
            constants.append(out.arg.value if isinstance(out.arg, ConstantArgument) else None)
    graph.output_node().args = (tuple(values),)
    spec_in, spec_out = program.call_spec.in_spec, program.call_spec.out_spec
    assert spec_in is not None and spec_out is not None
    outputs = tuple(value.meta["val"] for value in values)
    return Program(graph, tuple(operands), outputs, tuple(written), tuple(results), tuple(constants), spec_in, spec_out)


def _erase(node: Node, spec: InputSpec) -> None:
    if node.users:
        raise LoweringError(
            "export",
            f"argument {node.name!r} is neither a tensor nor a constant: {spec.arg}",
            reproduce=_EXPORT,
            remedy="pass tensors, numbers, strings or containers of them",
        )
    node.graph.erase_node(node)


def _held(program: ExportedProgram, spec: InputSpec) -> Tensor:
    """The weight, buffer or constant behind an input: the model's own tensor, not a copy."""
    target = spec.target or ""
    value = program.state_dict.get(target)
    return program.constants[target] if value is None else value
