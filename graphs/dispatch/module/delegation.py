"""Members of ``nn.Module`` that are the model's: what a parent module, a loader or a walk asks the captured module for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

SELF_RETURNING = frozenset(
    "eval train to cuda cpu half float double bfloat16 type requires_grad_ apply _apply share_memory to_empty".split()  # noqa: SIM905
)
"""Methods that return the module itself, for which the step stands."""
_OF_THE_STEP = frozenset(("register_forward_hook", "register_forward_pre_hook"))


def delegate(cls: type[nn.Module]) -> None:
    """Have ``cls`` take from its model what it would inherit from ``nn.Module``, but for special methods and forward hooks.

    A lookup finds what a class inherits before ``__getattr__`` is asked, so each member needs a property.
    """
    inherited = vars(nn.Module).keys() - _OF_THE_STEP
    own = {name for base in cls.__mro__ if not issubclass(nn.Module, base) for name in vars(base)}
    for name in inherited - own:
        if not (name.startswith("__") and name.endswith("__")):
            setattr(cls, name, property(functools.partial(_member, name=name)))


def _member(step: Any, name: str) -> Any:
    return returning_step(getattr(step._graphs_model, name), name, step)


def returning_step(member: Any, name: str, step: Any) -> Any:
    """A member of the model; a method that returns the model returns ``step`` in its place."""
    if name not in SELF_RETURNING or not callable(member):
        return member
    method: Callable[..., Any] = member

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        return step if result is step._graphs_model else result

    return call
