"""Running a graph, or an operator of a step, with another outcome of a host value than the data has.

On a device an operator that refuses a value (an index out of range) ends the process. So each is asked before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Interpreter
from torch.utils._pytree import tree_leaves

from passes.core.values.legal_operands import strays
from passes.host_values.forced.forcing import read_here


class OutOfRange(BaseException):
    """A forced outcome gives an operator what it refuses. No exception of a step's own is derived from it."""


def refuse_on_device(func: Any, args: Any, kwargs: Any) -> None:
    """Ask before an operator runs on a device, where refusing a value ends the process.

    Raises:
        OutOfRange: it refuses values of what it is given.
    """
    on_device = any(isinstance(leaf, Tensor) and leaf.device.type != "cpu" for leaf in tree_leaves((args, kwargs)))
    if on_device and strays(func, args, kwargs):
        raise OutOfRange(f"{func} refuses what it is given")


class Forced(Interpreter):
    """Runs a marked graph with another tensor in the place of one that host values are read from."""

    def __init__(self, module: GraphModule, number: int, outcome: Callable[[Tensor], Tensor]) -> None:
        super().__init__(module)
        self._number, self._outcome = number, outcome

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The result of a node."""
        if target is read_here and args[1] == self._number:
            return self._outcome(args[0])
        refuse_on_device(target, args, kwargs)
        return super().call_function(target, args, kwargs)
