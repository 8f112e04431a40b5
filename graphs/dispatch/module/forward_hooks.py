"""Forward hooks of a captured module itself: they run around each call, replayed or not, and are in no recording.

Hooks of the model and of the modules inside are a part of the step. ``nn.Module`` registers both kinds; here those of the
captured module are run, as ``nn.Module._call_impl`` does. Global hooks are left out: the model has them run.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import nn

KINDS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
"""The attributes in which ``nn.Module`` keeps them."""
Serve = Callable[[tuple[Any, ...], dict[str, Any]], Any]


def no_hooks() -> dict[str, OrderedDict[int, Any]]:
    """The attributes of a module without hooks, by name."""
    return {kind: OrderedDict() for kind in KINDS}


def call_with_hooks(module: nn.Module, serve: Serve, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``serve(args, kwargs)`` with the forward hooks of ``module`` before and after it."""
    output: Any = None
    ran: set[int] = set()
    try:
        args, kwargs = _before(module, args, kwargs)
        output = serve(args, kwargs)
        for identity, hook in list(module._forward_hooks.items()):
            ran.add(identity)
            output = _after(module, identity, hook, args, kwargs, output)
        return output
    except Exception:
        for identity, hook in list(module._forward_hooks.items()):
            if identity in module._forward_hooks_always_called and identity not in ran:
                try:
                    output = _after(module, identity, hook, args, kwargs, output)
                except Exception as error:  # the first one is raised, whatever a filter makes of the warning
                    with contextlib.suppress(UserWarning):
                        warnings.warn(f"a forward hook with always_call=True raised as well: {error}", stacklevel=2)
        raise


def _before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments after the forward pre-hooks."""
    for identity, hook in list(module._forward_pre_hooks.items()):
        if identity in module._forward_pre_hooks_with_kwargs:
            both: Any = hook(module, args, kwargs)  # type: ignore[call-arg]
            if both is not None:
                if not isinstance(both, tuple) or len(both) != 2:
                    raise RuntimeError(f"a forward pre-hook with kwargs must return None or (args, kwargs), not {both!r}")
                args, kwargs = both
        else:
            changed: Any = hook(module, args)
            if changed is not None:
                args = changed if isinstance(changed, tuple) else (changed,)
    return args, kwargs


def _after(
    module: nn.Module, identity: int, hook: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """The output after one forward hook."""
    with_kwargs = identity in module._forward_hooks_with_kwargs
    changed = hook(module, args, kwargs, output) if with_kwargs else hook(module, args, output)
    return output if changed is None else changed
