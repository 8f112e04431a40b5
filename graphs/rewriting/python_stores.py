"""What a traced step stores in Python: a recording runs no line of it, so whatever is left there is refused by name.

Two eager runs that read the same value store the same number, and nothing shows. In the trace that number is a symbol.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

import passes
from graphs.contract.argument_state import argument_state
from graphs.rehearsal.step import Checkpoint
from graphs.state.counters import Counter

Tensor = torch.Tensor
_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


class Stored(passes.Unremovable):
    """The step keeps a value in Python that only the device knows."""


class Stores:
    """The Python state of a step, its arguments included, before the step is traced on other tensors.

    Args:
        before: the state of the model and of opaque arguments.
        arguments: positional and named arguments as the trace gives them to the model.
        leaves: the tensors among them.
        counters: numbers that the step advances, which a recording takes care of.
    """

    def __init__(self, before: Checkpoint, arguments: Any, leaves: Sequence[Tensor], counters: Sequence[Counter]) -> None:
        args, kwargs = arguments
        self._states = (before.python, argument_state(args, kwargs, before.python))
        self._hung = [(leaf, dict(leaf.__dict__)) for leaf in leaves]
        self._counters = counters

    def check(self) -> None:
        """That the step has left everything as it was, but for the counters.

        Raises:
            Stored: it has not; it names the place.
        """
        for path, value in self._left():
            what = "a value that only the device knows" if isinstance(value, _SYMBOLS) else "what it computes"
            detail = f"the step keeps {what} in {path}, which a replay would not write"
            symbols = value.node.expr.free_symbols if isinstance(value, _SYMBOLS) else ()
            raise Stored(detail, path, remedy="Keep it in a tensor that the step updates in place, or return it", symbols=symbols)

    def _left(self) -> Iterator[tuple[str, Any]]:
        for state in self._states:
            for path, container, key, _, after in state.changed_entries():
                if not any(counter.container is container and counter.key == key for counter in self._counters):
                    yield path, after
        for leaf, before in self._hung:
            for name, value in leaf.__dict__.items():
                if isinstance(value, _SYMBOLS) and not name.startswith("_") and before.get(name) is not value:
                    yield f"argument.{name}", value
