"""Adding operators to a graph, each with what it gives for the fake tensors of its arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node


class Emitter:
    """Adds operators where the graph inserts.

    Args:
        like: a fake tensor of the graph, whose mode and device are those of what is added.
    """

    def __init__(self, module: GraphModule, like: torch.Tensor) -> None:
        self._graph, self._mode, self.device = module.graph, like.fake_mode, like.device  # type: ignore[attr-defined]

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """One operator on nodes and constants."""
        node = self._graph.call_function(target, args, kwargs)
        values = torch.fx.map_arg(args, lambda argument: argument.meta["val"])
        with self._mode:
            node.meta["val"] = target(*values, **kwargs)
        return node
