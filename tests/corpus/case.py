"""What a corpus case is, and the data the cases are fed: every outcome changes over `STEPS` steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Tensor = torch.Tensor
STEPS = 20
RECORDED = "recorded"
REORDERED = "a sum over a padded length adds its terms in another order"
DUPLICATES = "a GPU adds rows with the same index in any order"
PADDED_GEMM = "a product with more rows may take another GEMM kernel"


@dataclass(frozen=True, eq=False)
class Case:
    """One step function with one way of making the host wait, or of depending on a host value.

    Attributes:
        step: the function, or the module class whose instances are the step with its state.
        inputs: positional arguments of step ``i``, on the CPU.
        expect: `RECORDED`, or the reason of the refusal that must name a line of ``step``.
        remedy: what the remedy of the refusal must say.
        bounds: what the caller says about lengths that nothing else bounds, by the name of the variable that holds them.
        eager_calls: calls that may run the model itself besides the first of each way through the step's Python.
        tolerance: why outputs may differ in their last bits; empty: they may not.
        merged: both sides of every branch are part of one recording.
        steady: the host is made to wait, or to upload, but learns the same at each step.
    """

    step: Callable[..., Any]
    inputs: Callable[[int], tuple[Any, ...]]
    expect: str = RECORDED
    remedy: str = ""
    bounds: Mapping[str, int] | None = None
    eager_calls: int = 0
    tolerance: str = ""
    steady: bool = False
    merged: bool = False

    @property
    def name(self) -> str:
        return self.step.__name__

    def build(self, device: torch.device | str = "cpu") -> Callable[..., Any]:
        """A step with fresh state, always the same, on ``device``."""
        torch.manual_seed(0)
        if not inspect.isclass(self.step):
            return self.step
        model: torch.nn.Module = self.step()
        return model.eval().to(device)

    def lines(self) -> tuple[str, range]:
        """File and line numbers of the step's source."""
        source, first = inspect.getsourcelines(self.step)
        return str(inspect.getsourcefile(self.step)), range(first, first + len(source))


def case(inputs: Callable[[int], tuple[Any, ...]], expect: str = RECORDED, **settings: Any) -> Callable[[Any], Case]:
    """Make the decorated function or module class a `Case`."""
    return lambda step: Case(step, inputs, expect, **settings)


def noise(step: int, *size: int, salt: int = 0) -> Tensor:
    """Normal numbers, others at each step: float32 ``[*size]``."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(1000 * salt + step))


def whole(step: int, low: int, high: int) -> Tensor:
    """A 0-d int64 in ``[low, high)`` that takes every value in as many steps, in no simple order."""
    turn, place = divmod(step, high - low)
    return low + torch.randperm(high - low, generator=torch.Generator().manual_seed(turn))[place]


def phase(step: int, outcomes: int, run: int = 4) -> Tensor:
    """A 0-d int64 in ``[0, outcomes)`` that stays for ``run`` steps."""
    return torch.tensor(step // run % outcomes)


def number(step: int, scale: float = 1.0) -> Tensor:
    """A 0-d float32 of either sign, no short binary fraction."""
    return torch.tensor(scale * ((step * 7) % 11 - 4) / 3)


def choice(step: int, size: int, high: int, salt: int = 0) -> Tensor:
    """Int64 ``[size]`` in ``[0, high)``."""
    return torch.randint(high, (size,), generator=torch.Generator().manual_seed(1000 * salt + step))


def distinct(step: int, size: int, high: int) -> Tensor:
    """Int64 ``[size]``, no two the same, in ``[0, high)``."""
    return torch.randperm(high, generator=torch.Generator().manual_seed(step))[:size]


def mask(step: int, *size: int, empty: bool = True) -> Tensor:
    """Bool ``[*size]``: now and then all False (unless ``empty`` is off), now and then all True."""
    if step % 7 == 3 and empty:
        return torch.zeros(size, dtype=torch.bool)
    drawn = noise(step, *size, salt=9) > 0
    drawn.view(-1)[step % drawn.numel()] = True
    return torch.ones_like(drawn) if step % 7 == 5 else drawn
