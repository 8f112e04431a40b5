"""What the parts of a rewriting ask of the `Rewriter` that they belong to."""

from __future__ import annotations

from typing import Any, Protocol

import sympy
from torch.fx import Node

from passes.core.aliasing import Builder
from passes.core.facts import Facts
from passes.core.source_location import Site
from passes.host_values.upper_bounds import Bounds


class Emitter(Builder, Protocol):
    """Makes nodes of the new graph, and conditions on which it holds.

    Attributes:
        facts: what is known of the symbols.
        bounds: their largest values.
        site: the user's line that is being rewritten.
    """

    facts: Facts
    bounds: Bounds
    site: Site

    def plain(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A new node that is under no condition."""
        ...

    def running(self) -> Any:
        """Whether the present iteration or branch arm takes place: a 0-d flag, or True."""
        ...

    def assume(self, condition: sympy.Basic) -> None:
        """Have the graph hold only where the condition does."""
        ...

    def require(self, holds: Node, expression: sympy.Basic | None = None, *, here: bool = False) -> None:
        """The same of a 0-d flag."""
        ...
