"""The only reader of ``GRAPHS_*`` variables.

Every bad value raises `ConfigError` with the legal ones listed.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Literal, TypeVar, get_args

from graphs.errors import ConfigError

VARIABLES = (
    "GRAPHS_BUCKETS",
    "GRAPHS_CACHE",
    "GRAPHS_COMPILER",
    "GRAPHS_MAX_RECORDINGS",
    "GRAPHS_MEMORY_BUDGET",
    "GRAPHS_MODE",
    "GRAPHS_PASSES",
    "GRAPHS_RAISE_INTERNAL",
    "GRAPHS_RANGES",
    "GRAPHS_STRICT",
    "GRAPHS_VERIFY",
    "GRAPHS_WO_A",
)
WoAPath = Literal["auto", "einsum", "bmm", "gloop", "fused"]
WO_A_PATHS: tuple[WoAPath, ...] = get_args(WoAPath)
SIZES = "positive integers separated by commas, for example 1,2,4,8"
BYTES = "a positive number of bytes, or text such as '512MiB' or '2GB'"
_UNITS = {f"{prefix}{unit}": base**power for unit, base in (("b", 1000), ("ib", 1024)) for power, prefix in enumerate("kmgt", 1)}
Choice = TypeVar("Choice", bound=str)
Flag = TypeVar("Flag", bool, None)
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def choice(name: str, value: object, legal: tuple[Choice, ...]) -> Choice:
    """The one of ``legal`` that ``value`` is, else raise `ConfigError`."""
    for one in legal:
        if value == one:
            return one
    raise ConfigError(name, value, legal)


def require(legal: bool, name: str, value: object, what: str) -> None:
    """Raise `ConfigError` for ``value`` unless it is ``legal``; ``what`` says what is."""
    if not legal:
        raise ConfigError(name, value, what)


def require_known_variables() -> None:
    """Nothing in the environment that looks like a setting and is none: a misspelt one would be passed over in silence.

    Raises:
        ConfigError: a variable beginning with ``GRAPHS_`` is not in `VARIABLES`; the message names the nearest that is.
    """
    for name in sorted(set(os.environ) - set(VARIABLES)):
        if name.startswith("GRAPHS_"):
            nearest = difflib.get_close_matches(name, VARIABLES, n=1, cutoff=0.0)[0]
            raise ConfigError(name, os.environ[name], f"unset: there is no such setting. The nearest is {nearest}")


def env_choice(variable: str, default: Choice, legal: tuple[Choice, ...]) -> Choice:
    """A variable that is one of ``legal``."""
    return choice(variable, os.environ.get(variable, default), legal)


def chosen(name: str, value: object, variable: str, default: Choice, legal: tuple[Choice, ...]) -> Choice:
    """An argument where one was given, else the variable."""
    return choice(name, value, legal) if value is not None else env_choice(variable, default, legal)


def env_flag(variable: str, default: Flag) -> bool | Flag:
    """A variable that is on or off, or ``default`` where it is unset."""
    text = os.environ.get(variable)
    if text is None:
        return default
    if text.lower() not in _TRUE + _FALSE:
        raise ConfigError(variable, text, _TRUE + _FALSE)
    return text.lower() in _TRUE


def env_sizes(variable: str) -> tuple[int, ...] | None:
    """A variable that lists positive integers; None where it is unset or empty."""
    text = os.environ.get(variable)
    if not text:
        return None
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(variable, text, SIZES) from error
    require(min(sizes) > 0, variable, text, SIZES)
    return sizes


def env_count(variable: str, default: int) -> int:
    """A variable that is a positive integer."""
    text = os.environ.get(variable, str(default))
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(variable, text, "a positive integer")
    return int(text)


def as_bytes(name: str, value: object) -> int:
    """A size of memory as a number of bytes, from a number or from text with a unit: B, kB, MB, GB, TB, KiB, MiB, GiB, TiB.

    Raises:
        ConfigError: it is neither, or less than one byte.
    """
    if type(value) is int and value > 0:
        return value
    parts = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value.lower()) if isinstance(value, str) else None
    factor = {"": 1, "b": 1, **_UNITS}.get(parts[2]) if parts is not None else None
    size = int(float(parts[1]) * factor) if parts is not None and factor is not None else 0
    require(size > 0, name, value, BYTES)
    return size


def env_bytes(variable: str) -> int | None:
    """A variable that is a size of memory in bytes; None where it is unset or empty."""
    text = os.environ.get(variable)
    return as_bytes(variable, text) if text else None


def cache_directory() -> Path:
    """Where measurements are kept: ``GRAPHS_CACHE``, else ``stepgraphs`` in the user's cache directory."""
    given = os.environ.get("GRAPHS_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "stepgraphs"


def wo_a_path() -> WoAPath:
    """The default path of `graphs.GroupedProjection`, from ``GRAPHS_WO_A``; read when a module is built."""
    require_known_variables()
    return env_choice("GRAPHS_WO_A", "auto", WO_A_PATHS)
