"""What a hazard is: an input of a kind on which a replay once was wrong, crashed, or did not come about without need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Tensor = torch.Tensor
NO_GRAD, INFERENCE, AUTOCAST = "no_grad", "inference_mode", "autocast+no_grad"
CONTEXTS = (NO_GRAD, INFERENCE)
HAZARDS: dict[str, Hazard] = {}
"""Every hazard by name; the modules that make them are imported by `tests.hazards.collection`."""


@dataclass
class Run:
    """One twin of a hazard.

    Attributes:
        step: what is captured.
        arguments: of call ``i``; called for each twin, so that both have tensors of their own.
        change: called before call ``i``.
        after: called at the end with the twin's step; what it returns has to be the same for both.
        restore: puts back what both twins share.
        wrap: called with the captured step (or the step), and gives what is called.
    """

    step: Callable[..., Any]
    arguments: Callable[[int], tuple[Any, ...]]
    change: Callable[[int], object] | None = None
    after: Callable[[], Any] | None = None
    restore: Callable[[], object] | None = None
    wrap: Callable[[Any], Callable[..., Any]] | None = None


@dataclass(frozen=True)
class Hazard:
    """A kind, and how to make its twins.

    Attributes:
        name: ``section/function``.
        make: a twin on a device, the same at each call.
        contexts: it is tried under.
        calls: how many.
        replays: at least so many have to be served by a recording.
        isolated: run in a process of its own, since it has killed one.
        cuda_only: there is nothing to see on a CPU.
        settings: of `graphs.capture`.
    """

    name: str
    make: Callable[[torch.device], Run]
    contexts: tuple[str, ...]
    calls: int
    replays: int
    isolated: bool
    cuda_only: bool
    settings: dict[str, Any]


def hazard(
    section: str,
    *,
    contexts: tuple[str, ...] = CONTEXTS,
    calls: int = 6,
    replays: int = 0,
    isolated: bool = False,
    cuda_only: bool = False,
    **settings: Any,
) -> Callable[[Callable[[torch.device], Run]], Callable[[torch.device], Run]]:
    """Make the decorated function a hazard of a section."""

    def register(make: Callable[[torch.device], Run]) -> Callable[[torch.device], Run]:
        name = f"{section}/{make.__name__}"
        assert name not in HAZARDS, name
        HAZARDS[name] = Hazard(name, make, contexts, calls, replays, isolated, cuda_only, settings)
        return make

    return register


def steps(section: str, *functions: Callable[..., Any], arguments: Callable[[int], tuple[Any, ...]], **settings: Any) -> None:
    """A hazard for each step function without state, all with the same arguments."""
    for function in functions:

        def make(device: torch.device, function: Callable[..., Any] = function) -> Run:
            return Run(function, lambda i: tuple(moved(one, device) for one in arguments(i)))

        make.__name__ = function.__name__
        hazard(section, **settings)(make)


def moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def noise(seed: int, *size: int, device: torch.device | str = "cpu") -> Tensor:
    """Normal numbers, float32 ``[*size]``."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(device)


def whole(seed: int, high: int, *size: int, device: torch.device | str = "cpu") -> Tensor:
    """Int64 ``[*size]`` in ``[0, high)``."""
    return torch.randint(high, size, generator=torch.Generator().manual_seed(seed)).to(device)
