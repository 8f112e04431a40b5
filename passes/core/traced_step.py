"""A step as a graph: what tracing hands to the passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.core.facts import Facts
from passes.errors import Unremovable

STORAGE = "storage"
"""A key of a placeholder's ``meta``: what inputs have in common that share memory, be it with a tensor that the graph holds."""
Advance = Callable[..., tuple[int, ...]]
"""Computes the numbers of Python after a step from those before it."""


@dataclass(frozen=True)
class TracedStep:
    """The graph of a step with its host values as symbols; made by `passes.trace_step`.

    Attributes:
        module: the ATen graph. A node's ``meta`` says ``"val"``, its result without data, and ``"site"``, the user's line.
        facts: what is known of the symbols, and what the graph assumes of them.
        structure: what the caller's ``structure`` gave when the step had run.
        advance: the new numbers of Python from the old ones; None for a step that has none.
        merged: whether both sides of any branch are in the graph.
        stopped: why the graph ends before the step does, without results; None for the whole step.
    """

    module: GraphModule
    facts: Facts
    structure: Any = None
    advance: Advance | None = None
    merged: bool = False
    stopped: Unremovable | None = None

    @property
    def storages(self) -> dict[str, Any]:
        """The memory of the graph's inputs, by name; inputs without strides are left out."""
        return {str(node.target): node.meta[STORAGE] for node in placeholders(self.module) if STORAGE in node.meta}


def note_storages(module: GraphModule, tensors: list[Tensor]) -> None:
    """Write down at the inputs of a graph which memory they are, as it is in ``tensors``."""
    for node, tensor in zip(placeholders(module), tensors, strict=False):
        if tensor.layout is torch.strided:
            node.meta[STORAGE] = tensor.untyped_storage()._cdata


def note_apart(module: GraphModule) -> None:
    """Write down at the inputs of a graph that each is memory of its own, where nothing is written down yet."""
    for node in placeholders(module):
        node.meta.setdefault(STORAGE, node.name)


def placeholders(module: GraphModule) -> list[Node]:
    """The inputs of a graph, in order."""
    return [node for node in module.graph.nodes if node.op == "placeholder"]
