"""`register_op`: making an own kernel known to PyTorch and to this layer.

Whether a recording may hold an operator is what ``graph_safe`` says:

- ``"check"`` (default): before its first call in a step that is about to be recorded, once for each device type,
  `graphs.capture_check` runs it on copies of that call's arguments. What it finds is from then on the reason why steps with
  this operator run eagerly.
- ``True``: its author vouches for it, and it is recorded like any operator, without that check. For operators that cannot run
  outside their step. The recording as a whole is still compared with eager.
- ``False``: steps with it run eagerly, with ``unsafe-operator`` as the reason and its name.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef
from torch._ops import OpOverload, OpOverloadPacket

from graphs.custom_ops.capture_check import capture_check
from graphs.errors import ConfigError
from graphs.state.op_registry import RegisteredOperator, overload_of, register
from passes.core.schema import written_arguments

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
    writes: Mapping[str, Callable[..., Any]] | None = None,
) -> Any:
    """Make a kernel an operator: `graphs.capture` sees it by name, knows what it writes, and knows whether to record it.

    For a Python function, which may launch Triton kernels or call an extension, this is `torch.library.custom_op`. For an
    operator that C++ has registered (``torch.ops.mine.kernel``) it adds what is missing. Also a decorator:
    ``@graphs.register_op(mutates_args=("cache",))``.

    Args:
        fn: a function with annotated arguments, or an operator.
        name: ``"namespace::name"``; default: the top-level module of ``fn`` and its name.
        mutates_args: names of the tensors that it writes in place. An operator's schema says so itself.
        fake: the same for tensors without data: shapes and dtypes. Without it the operator is recorded, and cannot be compiled.
        graph_safe: ``"check"`` (default): `graphs.capture_check` decides, on copies of the arguments of its first call on a
            device type; ``True``: it is recorded unchecked; ``False``: steps with it run eagerly. The module says more.
        device_types: where the function runs (``"cuda"``); default: everywhere.
        writes: by name of an argument that it writes, a function of the operator's arguments that returns which of its rows:
            whole numbers ``[n]`` (a tensor on the device of the argument, or a list) for the first dimension, or a tuple of such
            for the first dimensions (pages and offsets); None for all of it. A first call saves, compares and puts back these
            alone, instead of a whole cache for a row; one that is given anything else raises a `ConfigError`. Operators of ATen
            with indices say it themselves. `graphs.capture_check` finds writes elsewhere.
        tags: of the operator, such as ``torch.Tag.nondeterministic_seeded`` for one that draws random numbers.

    Returns:
        What is called: the ``CustomOpDef`` of a function, or the operator given.

    Raises:
        ConfigError: ``graph_safe`` is none of these, ``name`` is no qualified name, ``mutates_args`` contradicts a schema, or
            ``writes`` names what is not written.
    """
    safe = _is_safe(graph_safe)
    if fn is None:
        settings = {"name": name, "mutates_args": mutates_args, "fake": fake, "graph_safe": graph_safe, "writes": writes}
        return functools.partial(register_op, **settings, device_types=device_types, tags=tags)  # type: ignore[arg-type]
    if isinstance(fn, (OpOverload, OpOverloadPacket)):
        return _complete(fn, mutates_args, fake, RegisteredOperator(None, safe, capture_check, dict(writes or {})))
    of_new = {"mutates_args": mutates_args, "device_types": device_types, **({"tags": tuple(tags)} if tags else {})}
    return _new_operator(fn, _qualified(fn, name), of_new, fake, RegisteredOperator(fn, safe, capture_check, dict(writes or {})))


def _is_safe(graph_safe: bool | str) -> bool | None:
    """What the author of an operator says of it; None where it is to be checked."""
    if not any(graph_safe is legal for legal in GRAPH_SAFE) and graph_safe != "check":
        raise ConfigError("graph_safe", graph_safe, GRAPH_SAFE)
    return graph_safe if isinstance(graph_safe, bool) else None


def _complete(
    op: OpOverload | OpOverloadPacket,
    mutates_args: str | Iterable[str],
    fake: Callable[..., Any] | None,
    operator: RegisteredOperator,
) -> OpOverload | OpOverloadPacket:
    """Add to an operator that exists what its registration lacks."""
    overload = overload_of(op)
    _check_schema(overload, mutates_args)
    if fake is not None:
        torch.library.register_fake(overload._schema.name, fake)
    _register(overload, operator)
    return op


def _new_operator(
    fn: Callable[..., Any],
    name: str,
    settings: dict[str, Any],
    fake: Callable[..., Any] | None,
    operator: RegisteredOperator,
) -> CustomOpDef:
    """Make a function an operator, with ``settings`` of `torch.library.custom_op`."""
    custom = torch.library.custom_op(name, fn, **settings)
    assert isinstance(custom, CustomOpDef)
    if fake is not None:
        custom.register_fake(fake)
    _register(custom._opoverload, operator)
    return custom


def _register(overload: OpOverload, operator: RegisteredOperator) -> None:
    unknown = [name for name in operator.writes if name not in written_arguments(overload)]
    if unknown:
        raise ConfigError("writes", unknown, f"arguments that it writes: {sorted(written_arguments(overload))}")
    register(overload, operator)


def _qualified(fn: Callable[..., Any], name: str | None) -> str:
    if name is None:
        home = str(getattr(fn, "__module__", "")).partition(".")[0].strip("_") or "user"
        name = f"{home}::{getattr(fn, '__name__', type(fn).__name__)}"
    if not re.fullmatch(r"[A-Za-z_]\w*::[A-Za-z_]\w*", name):
        raise ConfigError("name", name, "'namespace::name', two identifiers")
    return name


def _check_schema(overload: OpOverload, mutates_args: str | Iterable[str]) -> None:
    """Raise where ``mutates_args`` are others than an operator declares."""
    named = {mutates_args} if isinstance(mutates_args, str) else set(mutates_args)
    written = written_arguments(overload)
    if named and named != written:
        legal = f"what its schema says it writes: {sorted(written) or 'nothing'} (schema: {overload._schema})"
        raise ConfigError("mutates_args", sorted(named), legal)
