"""What the nodes of a graph call: by which name, whether it is a view, whether it writes."""

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


def name_of(node: Node) -> str:
    """The name under which ATen knows what ``node`` calls; an empty string for a function that is not PyTorch's."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    target = node.target
    if isinstance(target, OpOverload):
        return target._opname if target.namespace == "aten" else ""
    name = getattr(target, "__name__", "")
    homes = (torch, torch.Tensor, torch.nn.functional, operator)
    if target is getattr and isinstance(node.args[1], str):
        return node.args[1]
    return str(name) if any(getattr(home, name, None) is target for home in homes) else ""


def call(node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run what ``node`` calls."""
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


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


def writes(node: Node, module: GraphModule) -> bool:
    """Whether ``node`` may write to one of its arguments. What is not PyTorch's own is taken to."""
    if node.op == "call_module":
        return not _is_pure(module.get_submodule(str(node.target)))
    if node.op not in ("call_function", "call_method"):
        return False
    target = node.target
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        overloads = [target] if isinstance(target, OpOverload) else [getattr(target, name) for name in target.overloads()]
        return any(overload._schema.is_mutable for overload in overloads)
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
        return not any(writes(node, module) for node in module.graph.nodes)
    return type(module).__module__.startswith("torch.") and not getattr(module, "inplace", False)


def attribute(module: torch.nn.Module, name: str) -> Any:
    """``module``'s attribute of a dotted name, or None."""
    return functools.reduce(lambda owner, part: getattr(owner, part, None), name.split("."), module)  # type: ignore[arg-type, return-value]
