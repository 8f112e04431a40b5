"""What the nodes of a graph call: by which name, and with what result."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node


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


def attribute(module: torch.nn.Module, name: str) -> Any:
    """``module``'s attribute of a dotted name, or None."""
    return functools.reduce(lambda owner, part: getattr(owner, part, None), name.split("."), module)  # type: ignore[arg-type, return-value]
