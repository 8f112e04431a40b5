"""What operators say of themselves: which arguments a call writes, and whose memory its result shares.

The one place that reads this from schemas and, in graphs that are not of ATen's operators yet, from names. What the nodes of
a graph do with each other's memory follows from it: see `passes.core.aliasing`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.fx import GraphModule, Node

aten = torch.ops.aten
COPIES = ("clone", "_to_copy", "_unsafe_view", "contiguous", "to", "float", "bfloat16", "half", "type")
NEW = ("clone", "_to_copy")  # the copies that always copy
PHYSICAL = ("as_strided", "_reshape_alias")  # they say where memory is, not which element
_ALIASES = {"T": "numpy_T", "H": "matrix_H"}
_AUGMENTED = "iadd iand iconcat ifloordiv ilshift imatmul imod imul ior ipow irshift isub itruediv ixor setitem delitem"
_IN_PLACE = frozenset(getattr(operator, name) for name in _AUGMENTED.split())
_BATCH_NORMS = frozenset(
    f"aten::{name}"
    for name in (
        *("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "batch_norm_update_stats"),
        *("batch_norm_gather_stats", "batch_norm_gather_stats_with_counts"),
    )
)


@functools.cache
def writes_nothing(target: Any) -> bool:
    """Whether no call of an operator writes an argument, as `written_values` tells it."""
    schema = getattr(target, "_schema", None)
    return schema is None or not (schema.is_mutable or schema.name in _BATCH_NORMS)


def is_mutable(target: Any) -> bool:
    """Whether an operator declares that it writes any argument; False for what has no schema."""
    schema = getattr(target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def written_arguments(target: Any) -> set[str]:
    """The names of the arguments that an operator declares to write."""
    if not is_mutable(target):
        return set()
    return {argument.name for argument in target._schema.arguments if argument.alias_info and argument.alias_info.is_write}


def written_values(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that a call writes, as they are given: tensors, nodes, or lists of these.

    Those that the operator declares, and those of `silently_written`.
    """
    found = silently_written(target, args, kwargs)
    names = written_arguments(target)
    if names:
        declared = [argument.name for argument in target._schema.arguments]
        given = dict(zip(declared, args, strict=False)) | dict(kwargs)
        found += [given[name] for name in declared if name in names and name in given]
    return found


def silently_written(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that an operator writes though its schema does not say so: running statistics, in training."""
    schema = getattr(target, "_schema", None)
    if schema is None or schema.is_mutable or schema.name not in _BATCH_NORMS:
        return []
    named = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | dict(kwargs)
    found = [named.get("running_mean"), named.get("running_var")] if named.get("training", True) else []
    return [value for value in found if value is not None]


def returns_view(target: Any) -> bool:
    """Whether an operator returns a view of its first argument and writes nothing."""
    schema = getattr(target, "_schema", None)
    if schema is None or not schema.arguments or not schema.returns:
        return False
    first, result = schema.arguments[0].alias_info, schema.returns[0].alias_info
    return first is not None and result is not None and not first.is_write


def shares_first_argument(target: Any) -> bool:
    """Whether the result of an operator lies where its first argument does: as a view of it, or as the tensor it wrote."""
    schema = getattr(target, "_schema", None)
    return schema is not None and bool(schema.arguments) and schema.arguments[0].alias_info is not None


def base_name(target: Any) -> tuple[str, bool]:
    """The name of an operator without that it is in place (``add`` for ``add_``), and whether it is."""
    name = target._schema.name.split("::")[1]
    in_place = name.endswith("_") and not name.startswith("__")
    return (name.rstrip("_") if in_place else name), in_place


@functools.cache
def is_view(name: str) -> bool:
    """Whether ATen has an operator of this name that returns a view, or a copy of the same elements."""
    if name == "getitem" or name in COPIES:
        return True
    packet = getattr(aten, _ALIASES.get(name, name), None) if name else None
    if not isinstance(packet, OpOverloadPacket) or name in PHYSICAL:
        return False
    results = [result for overload in packet.overloads() for result in getattr(packet, overload)._schema.returns]
    return any(result.alias_info is not None and not result.alias_info.is_write for result in results)


def may_write(node: Node, module: GraphModule) -> bool:
    """Whether ``node`` may write to one of its arguments, in a graph of any functions. What is not PyTorch's own is taken to."""
    if node.op == "call_module":
        return not _is_pure(module.get_submodule(str(node.target)))
    if node.op not in ("call_function", "call_method"):
        return False
    target = node.target
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        overloads = [target] if isinstance(target, OpOverload) else [getattr(target, name) for name in target.overloads()]
        return any(map(is_mutable, overloads))
    if node.kwargs.get("inplace") or node.kwargs.get("out") is not None or target in _IN_PLACE:
        return True
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        return True
    home = str(getattr(target, "__module__", None) or "torch").partition(".")[0]
    known = isinstance(target, str) or home in ("torch", "builtins", "math", "_operator")
    return not known or isinstance(target, HigherOrderOperator)


def _is_pure(module: torch.nn.Module) -> bool:
    if isinstance(module, GraphModule):
        return not any(may_write(node, module) for node in module.graph.nodes)
    return type(module).__module__.startswith("torch.") and not getattr(module, "inplace", False)
