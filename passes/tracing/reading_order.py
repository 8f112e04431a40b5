"""In which order a function of torch reads tensors that are given where it wants numbers.

``torch.arange(start, end)`` takes its bounds by calls whose order C++ leaves to the compiler: one build reads the end first. What
an eager run read is followed in that order, so it is asked of the function itself, with small numbers and in a thread of its own,
where no mode of the caller's is active.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from passes.tracing.torch_symbols import TorchDispatchMode

Tensor = torch.Tensor
Place = int | str
"""The position or the name of an argument."""


def reading_order(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Place]:
    """The tensors without dimension among the arguments, in the order in which they are read."""
    given: dict[Place, Any] = dict(enumerate(args))
    given.update(kwargs)
    numbers = tuple(place for place, value in given.items() if isinstance(value, Tensor) and value.dim() == 0)
    if len(numbers) < 2 or any(isinstance(value, (tuple, list)) for value in given.values()):
        return list(numbers)
    return list(_asked(func, numbers, len(args), tuple(name for name in kwargs if name in numbers)))


@functools.cache
def _asked(func: Callable[..., Any], numbers: tuple[Place, ...], positions: int, names: tuple[str, ...]) -> tuple[Place, ...]:
    """The order of one form of a call; as they stand where the function takes no such numbers."""
    seen: list[int] = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._local_scalar_dense.default:
                seen.append(int(result))
            return result

    def ask() -> None:
        tensors = {place: torch.tensor(value) for value, place in enumerate(numbers, start=1)}
        with Watching():
            try:
                func(*(tensors.get(place, len(numbers)) for place in range(positions)), **{name: tensors[name] for name in names})
            except (RuntimeError, TypeError, ValueError):
                seen.clear()

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    order = tuple(numbers[value - 1] for value in dict.fromkeys(seen) if value <= len(numbers))
    return order if sorted(map(str, order)) == sorted(map(str, numbers)) else numbers
