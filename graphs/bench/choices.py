"""What the benchmarks can be asked for. Imports no torch, so that the command line can check options at once."""

from __future__ import annotations

from enum import Enum

from graphs.errors import ConfigError

MIN_RUNS = 20  # below this, quartiles say little


class Experiment(str, Enum):
    """What to measure."""

    ALL = "all"
    DECODE = "decode"
    WO_A = "wo_a"
    OVERHEAD = "overhead"
    COMPILE = "compile"
    SYNCS = "syncs"
    GENERATE = "generate"
    DEEPSEEK_V4 = "deepseek_v4"


class Device(str, Enum):
    """Where to run; ``auto`` is a GPU if torch sees one."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Operator(str, Enum):
    """What can be tuned."""

    WO_A = "wo_a"


EXPERIMENTS = tuple(one.value for one in Experiment)
DEVICES = tuple(one.value for one in Device)
OPERATORS = tuple(one.value for one in Operator)
OURS = ("einsum", "bmm", "gloop", "fused", "auto")
PEERS = ("aiter bmm", "aiter gloop", "deepgemm")
PATHS = (*OURS, *PEERS)
MODELS = ("gpt2", "llama")
COMPILED_FORMS = ("auto-compile", "inductor", "inductor+around")
FORMS = ("dynamic", "static", "auto-compile", "graphs", "inductor", "inductor+around")
"""Of ``generate()``: eager with either cache, compiled by transformers, on recordings without and with Inductor, and with more of
its rewrites."""
COMPILED_STEP_FORMS = ("inductor", "+experts", "+products", "+mhc", "+around")
STEP_FORMS = ("eager", "recorded", "recorded+mhc", *COMPILED_STEP_FORMS)
"""Of a step of DeepSeek-V4: eager, recorded, with hyper-connections as operators, compiled, and with more and more rewrites."""


def as_sizes(name: str, text: str) -> tuple[int, ...]:
    """Positive integers separated by commas, ascending; none for an empty text.

    Raises:
        ConfigError: ``text`` is something else; ``name`` is the option that it was given to.
    """
    parts = _parts(text)
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(name, text, "positive integers separated by commas, for example 1,4,16")
    return tuple(sorted({int(part) for part in parts}))


def as_paths(name: str, text: str) -> tuple[str, ...]:
    """Paths of the grouped projection separated by commas; none for an empty text.

    Raises:
        ConfigError: one of them is not in `PATHS`; ``name`` is the option that it was given to.
    """
    return _some_of(PATHS, name, text)


def as_models(name: str, text: str) -> tuple[str, ...]:
    """Models of ``generate()``, like `as_paths`: some of `MODELS`."""
    return _some_of(MODELS, name, text)


def as_forms(name: str, text: str, experiment: str = "") -> tuple[str, ...]:
    """Forms of an experiment, like `as_paths`: some of `FORMS` or of `STEP_FORMS`; of both, if none is given."""
    either = (*FORMS, *(form for form in STEP_FORMS if form not in FORMS))
    return _some_of({"generate": FORMS, "deepseek_v4": STEP_FORMS}.get(experiment, either), name, text)


def _some_of(legal: tuple[str, ...], name: str, text: str) -> tuple[str, ...]:
    parts = tuple(_parts(text))
    for part in parts:
        if part not in legal:
            raise ConfigError(name, part, legal)
    return parts


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
