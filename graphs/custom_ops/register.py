"""`register_op`: making an own kernel known to PyTorch and to this layer."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef
from torch._ops import OpOverload, OpOverloadPacket

from graphs.custom_ops.capture_check import capture_check
from graphs.errors import ConfigError
from graphs.state.op_registry import RegisteredOperator, overload_of, register

GRAPH_SAFE = (True, False, "check")


def register_op(
    fn: Callable[..., Any] | OpOverload | OpOverloadPacket | None = None,
    *,
    name: str | None = None,
    mutates_args: str | Iterable[str] = (),
    fake: Callable[..., Any] | None = None,
    graph_safe: bool | str = "check",
    device_types: str | Sequence[str] | None = None,
    tags: Sequence[torch.Tag] = (),
) -> Any:
    """Make a kernel an operator: `graphs.capture` sees it by name, knows what it writes, and knows whether to record it.

    For a Python function, which may launch Triton kernels or call an extension, this is `torch.library.custom_op`. For an
    operator that C++ has registered (``torch.ops.mine.kernel``) it adds what is missing. Also a decorator:
    ``@graphs.register_op(mutates_args=("cache",))``.

    Args:
        fn: a function with annotated arguments, or an operator.
        name: ``"namespace::name"``; default: the top-level module of ``fn`` and its name.
        mutates_args: names of the tensors that it writes in place. An operator's schema says so itself.
        fake: the same for tensors without data: shapes and dtypes of the results. Without it the operator runs and is
            recorded, and cannot be compiled.
        graph_safe: whether a recording may hold it:

            - ``"check"`` (default): before its first call in a step that is about to be recorded, once for each device type,
              `graphs.capture_check` runs it on copies of that call's arguments. What it finds is from then on the reason why
              steps with this operator run eagerly.
            - ``True``: its author vouches for it, and it is recorded like any operator, without that check. For operators
              that cannot run outside their step. The recording as a whole is still compared with eager.
            - ``False``: steps with it run eagerly, with ``unsafe-operator`` as the reason and its name.
        device_types: where the function runs (``"cuda"``); default: everywhere.
        tags: of the operator, such as ``torch.Tag.nondeterministic_seeded`` for one that draws random numbers.

    Returns:
        What is called: the ``CustomOpDef`` of a function, or the operator given.

    Raises:
        ConfigError: ``graph_safe`` is none of these, ``name`` is no qualified name, or ``mutates_args`` contradicts a schema.
    """
    if not any(graph_safe is legal for legal in GRAPH_SAFE) and graph_safe != "check":
        raise ConfigError("graph_safe", graph_safe, GRAPH_SAFE)
    if fn is None:
        settings = {"name": name, "mutates_args": mutates_args, "fake": fake, "graph_safe": graph_safe}
        return functools.partial(register_op, **settings, device_types=device_types, tags=tags)  # type: ignore[arg-type]
    safe = graph_safe if isinstance(graph_safe, bool) else None
    if isinstance(fn, (OpOverload, OpOverloadPacket)):
        overload = overload_of(fn)
        _agree(overload, mutates_args)
        if fake is not None:
            torch.library.register_fake(overload._schema.name, fake)
        register(overload, RegisteredOperator(None, safe, capture_check))
        return fn
    more = {"tags": tuple(tags)} if tags else {}
    custom = torch.library.custom_op(_qualified(fn, name), fn, mutates_args=mutates_args, device_types=device_types, **more)  # type: ignore[call-overload]
    assert isinstance(custom, CustomOpDef)
    if fake is not None:
        custom.register_fake(fake)
    register(custom._opoverload, RegisteredOperator(fn, safe, capture_check))
    return custom


def _qualified(fn: Callable[..., Any], name: str | None) -> str:
    if name is None:
        home = str(getattr(fn, "__module__", "")).partition(".")[0].strip("_") or "user"
        name = f"{home}::{getattr(fn, '__name__', type(fn).__name__)}"
    if not re.fullmatch(r"[A-Za-z_]\w*::[A-Za-z_]\w*", name):
        raise ConfigError("name", name, "'namespace::name', two identifiers")
    return name


def _agree(overload: OpOverload, mutates_args: str | Iterable[str]) -> None:
    named = {mutates_args} if isinstance(mutates_args, str) else set(mutates_args)
    written = {a.name for a in overload._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    if named and named != written:
        legal = f"what its schema says it writes: {sorted(written) or 'nothing'} (schema: {overload._schema})"
        raise ConfigError("mutates_args", sorted(named), legal)
