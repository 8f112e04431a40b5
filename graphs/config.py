"""Frozen settings of a capture.

An argument beats the environment, the environment beats the default. Every bad value raises `ConfigError` with the
legal ones listed, before any device work.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypedDict, get_args

from graphs.compiler_options import CompilerOptions
from graphs.contract.padding import Padding, Policy, as_padding
from graphs.environment import (
    as_bytes,
    choice,
    chosen,
    env_bytes,
    env_choice,
    env_count,
    env_flag,
    env_sizes,
    require,
    require_known_variables,
)
from graphs.errors import ConfigError

Mode = Literal["graph", "eager"]
Verify = Literal["capture", "always", "off"]
Outputs = Literal["owned", "borrowed"]
Compiler = Literal["none", "inductor", "auto"]
Pass = Literal["constants", "addressing", "arithmetic", "bounded", "branches", "fusion"]
AllPasses = Literal["auto", "off"]

MODES: tuple[Mode, ...] = get_args(Mode)
VERIFY: tuple[Verify, ...] = get_args(Verify)
OUTPUTS: tuple[Outputs, ...] = get_args(Outputs)
COMPILERS: tuple[Compiler, ...] = get_args(Compiler)
PASSES: tuple[Pass, ...] = get_args(Pass)
ALL_PASSES: tuple[AllPasses, ...] = get_args(AllPasses)
BACKEND_COMPILERS = ("inductor", "aten")
BACKEND_VERIFY = ("capture", "off")


def as_buckets(buckets: Iterable[int] | None) -> tuple[int, ...] | None:
    """Validated bucket sizes in ascending order, or None for exact sizes."""
    if buckets is None:
        return None
    try:
        sizes = tuple(buckets)
    except TypeError:
        sizes = ()
    if not sizes or any(type(size) is not int or size < 1 for size in sizes):
        raise ConfigError("buckets", buckets, "a non-empty sequence of positive integers")
    return tuple(sorted(set(sizes)))


def as_budget(memory_budget: int | str | None) -> int | None:
    """Bytes that recordings may take: as given, else ``GRAPHS_MEMORY_BUDGET``, else None."""
    return as_bytes("memory_budget", memory_budget) if memory_budget is not None else env_bytes("GRAPHS_MEMORY_BUDGET")


def as_passes(passes: AllPasses | Iterable[Pass]) -> tuple[Pass, ...]:
    """The passes that run before a step is recorded: ``"auto"`` for all, ``"off"`` for none, or names."""
    if isinstance(passes, str):
        if passes not in ALL_PASSES:
            raise ConfigError("passes", passes, (*ALL_PASSES, *PASSES))
        return PASSES if passes == "auto" else ()
    require(isinstance(passes, Iterable), "passes", passes, "'auto', 'off' or a sequence of names of passes")
    return tuple(choice("passes", name, PASSES) for name in passes)


@dataclass(frozen=True)
class BackendOptions:
    """What ``torch.compile(backend="graphs", options={...})`` can be told; see `graphs.dynamo.backend.graphs_backend`."""

    compiler: str = "inductor"
    outputs: str = "owned"
    verify: str = "capture"
    strict: bool = False
    max_recordings: int = 64
    routes: Any = None
    compiler_options: Any = None

    @classmethod
    def resolve(cls, options: Mapping[str, Any] | None) -> BackendOptions:
        """Validate the options of a call of ``torch.compile``.

        Raises:
            ConfigError: an unknown option, or a value that is not legal.
        """
        given = dict(options or {})
        for name in given:
            choice("option of backend='graphs'", name, tuple(one.name for one in fields(cls)))
        made = cls(**given)
        choice("compiler", made.compiler, BACKEND_COMPILERS)
        choice("outputs", made.outputs, OUTPUTS)
        choice("verify", made.verify, BACKEND_VERIFY)
        require(isinstance(made.strict, bool), "strict", made.strict, "True or False")
        positive = type(made.max_recordings) is int and made.max_recordings > 0
        require(positive, "max_recordings", made.max_recordings, "a positive integer")
        require(made.routes is None or callable(made.routes), "routes", made.routes, "a table for passes.routing")
        return replace(made, compiler_options=CompilerOptions.resolve(made.compiler_options))


@dataclass(frozen=True)
class CaptureConfig:
    """Everything `graphs.capture` can be told; see there for the meaning of each field."""

    name: str | None = None
    mode: Mode = "graph"
    buckets: tuple[int, ...] | None = None
    batch_dims: Mapping[str, int] | None = None
    static: tuple[str, ...] = ()
    padding: Mapping[str, Padding] = field(default_factory=dict)
    outputs: Outputs = "owned"
    verify: Verify = "capture"
    strict: bool = False
    max_recordings: int = 64
    memory_budget: int | None = None
    compiler: Compiler = "none"
    compiler_options: CompilerOptions = field(default_factory=CompilerOptions)
    passes: tuple[Pass, ...] = PASSES
    bounds: Mapping[str, int] = field(default_factory=dict)
    ranges: bool | None = None
    raise_internal: bool = False
    """Raise what `graphs.errors.InternalError` would count: for tests. ``GRAPHS_RAISE_INTERNAL``."""

    @classmethod
    def resolve(
        cls,
        *,
        mode: Mode | None,
        buckets: Iterable[int] | None,
        batch_dims: Mapping[str, int] | None,
        static: Iterable[str],
        padding: Mapping[str, Padding | Policy] | None,
        outputs: Outputs,
        verify: Verify | None,
        strict: bool | None,
        max_recordings: int | None,
        compiler: Compiler | None,
        compiler_options: Mapping[str, Any] | None = None,
        passes: AllPasses | Iterable[Pass] | None = None,
        bounds: Mapping[str, int] | None = None,
        memory_budget: int | str | None = None,
        name: str | None = None,
        ranges: bool | None = None,
    ) -> CaptureConfig:
        """Combine arguments with the environment and validate the result."""
        require_known_variables()
        _require_legal(static, padding, batch_dims, strict, max_recordings, bounds, name, ranges)
        return cls(
            name=name,
            ranges=ranges if ranges is not None else env_flag("GRAPHS_RANGES", None),
            passes=as_passes(passes if passes is not None else env_choice("GRAPHS_PASSES", "auto", ALL_PASSES)),
            raise_internal=env_flag("GRAPHS_RAISE_INTERNAL", False),
            mode=chosen("mode", mode, "GRAPHS_MODE", "graph", MODES),
            buckets=as_buckets(buckets if buckets is not None else env_sizes("GRAPHS_BUCKETS")),
            **_by_argument(static, padding, batch_dims, bounds),
            outputs=choice("outputs", outputs, OUTPUTS),
            verify=chosen("verify", verify, "GRAPHS_VERIFY", "capture", VERIFY),
            strict=strict if strict is not None else env_flag("GRAPHS_STRICT", False),
            max_recordings=max_recordings if max_recordings is not None else env_count("GRAPHS_MAX_RECORDINGS", 64),
            memory_budget=as_budget(memory_budget),
            compiler_options=CompilerOptions.resolve(compiler_options),
            compiler=chosen("compiler", compiler, "GRAPHS_COMPILER", "none", COMPILERS),
        )


class _ByArgument(TypedDict):
    """The settings that name arguments or lengths of the step."""

    static: tuple[str, ...]
    padding: dict[str, Padding]
    batch_dims: dict[str, int] | None
    bounds: dict[str, int]


def _by_argument(
    static: Iterable[str],
    padding: Mapping[str, Padding | Policy] | None,
    batch_dims: Mapping[str, int] | None,
    bounds: Mapping[str, int] | None,
) -> _ByArgument:
    """Copies that nobody else can change."""
    return _ByArgument(
        static=tuple(static),
        padding={name: as_padding(name, policy) for name, policy in (padding or {}).items()},
        batch_dims=dict(batch_dims) if batch_dims is not None else None,
        bounds=dict(bounds or {}),
    )


def _require_legal(
    static: Any, padding: Any, batch_dims: Any, strict: Any, max_recordings: Any, bounds: Any, name: Any, ranges: Any
) -> None:
    """Raise `ConfigError` for the first argument of `graphs.capture` that has a value no variable can give."""
    require(isinstance(static, Iterable) and not isinstance(static, str), "static", static, "a sequence of argument names")
    require(padding is None or isinstance(padding, Mapping), "padding", padding, "a mapping from argument names to policies")
    dims = batch_dims.values() if isinstance(batch_dims, Mapping) else ("",) if batch_dims is not None else ()
    legal_dims = all(type(dim) is int and dim >= 0 for dim in dims)
    require(legal_dims, "batch_dims", batch_dims, "a mapping from argument names to dimensions, 0 or more")
    require(strict is None or isinstance(strict, bool), "strict", strict, "True or False")
    positive = max_recordings is None or (type(max_recordings) is int and max_recordings > 0)
    require(positive, "max_recordings", max_recordings, "a positive integer")
    limits = bounds if isinstance(bounds, Mapping) else {"": 0} if bounds is not None else {}
    legal_bounds = all(isinstance(key, str) and type(limit) is int and limit > 0 for key, limit in limits.items())
    require(legal_bounds, "bounds", bounds, "a mapping from names of lengths to positive integers")
    require(name is None or (isinstance(name, str) and name != ""), "name", name, "a text that is not empty")
    require(ranges is None or isinstance(ranges, bool), "ranges", ranges, "True or False")
