"""Results as plain frozen data, and their JSON form."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from graphs.bench.harness.sampling import Spread
from graphs.errors import GraphsError

SCHEMA = 1
MODES = ("eager", "graph")
T = TypeVar("T")


class WrongResult(GraphsError):
    """A variant about to be timed computed something else than its reference; nothing is reported for it."""


class UnreadableResults(GraphsError, ValueError):
    """A file that was to be compared holds no results, or those of another schema."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"cannot compare {path}: {reason}.")
        self.path = path


@dataclass(frozen=True)
class BenchRow:
    """One workload in one mode.

    Attributes:
        workload: ``decode``, ``wo_a``, ``generate`` or ``deepseek_v4``.
        case: the model, or the path.
        rows: batch size of a decode step, or tokens of a projection.
        mode: ``eager`` or ``graph``; ``generate``, ``deepseek_v4``: the form.
        operations: what a call is divided by: 1 decode step, or the projections in one call; ``deepseek_v4``: layers.
        host_us: host time per operation, microseconds.
        device_us: device time per operation with the host ahead, microseconds; None on a CPU.
        tokens_per_second: decode: of the whole greedy loop; ``wo_a``: rows over the longer of host and device time.
        error: relative error against float64; None where tokens were compared instead.
        launches: what the host submits in one call: kernels, copies and graphs; operators on a CPU. None if not counted.
        capture_seconds, pool_bytes: cost of the recording; 0 in eager mode.
        groups, weight_bytes, first_call_seconds: ``wo_a``: G, the bytes of one weight with its scales, and the first call of this
            path and M, with compilation and tuning as far as no cache on disk had them.
        recordings, equal_tokens: ``generate``: recordings, and the share of tokens that are those of the dynamic cache.
        kernels: ``deepseek_v4``: kernels of one step by kind; on a CPU, operators.
        break_even_calls: calls until the recording has paid for ``capture_seconds``, by the medians of this run; None in
            eager mode, or where it never does.
    """

    workload: str
    case: str
    rows: int
    mode: str
    operations: int
    host_us: Spread
    device_us: Spread | None
    tokens_per_second: Spread
    error: float | None = None
    launches: int | None = None
    capture_seconds: float = 0.0
    pool_bytes: int = 0
    break_even_calls: int | None = None
    groups: int = 0
    weight_bytes: int = 0
    first_call_seconds: float = 0.0
    recordings: int = 0
    equal_tokens: float | None = None
    kernels: dict[str, int] = field(default_factory=dict)

    @property
    def call(self) -> Spread:
        """The longer of host and device time per operation: what it takes when calls follow each other."""
        return max(self.host_us, self.device_us or self.host_us, key=lambda spread: spread.median)

    @property
    def call_us(self) -> float:
        """The median of `call`."""
        return self.call.median


@dataclass(frozen=True)
class Case:
    """One workload: a row for each mode, and one call in each mode whose submissions are not known yet, to count them later."""

    rows: tuple[BenchRow, ...]
    calls: Mapping[str, Callable[[], Any]]


def with_capture_cost(eager: BenchRow, graph: BenchRow, capture_seconds: float, pool_bytes: int) -> tuple[BenchRow, BenchRow]:
    """Both rows, the second with what its recording cost and when that is paid back."""
    saved_us = (eager.call_us - graph.call_us) * graph.operations
    calls = math.ceil(capture_seconds * 1e6 / saved_us) if saved_us > 0 else None
    return eager, dataclasses.replace(graph, capture_seconds=capture_seconds, pool_bytes=pool_bytes, break_even_calls=calls)


@dataclass(frozen=True)
class BarRow:
    """A figure with a limit.

    Attributes:
        name: what is compared.
        bar: the limit as text.
        unit: ``us``, ``ms``, ``x`` (a ratio), or what is counted.
        measured: median and quartiles over runs in which both sides took turns.
        limit: the limit in ``unit``.
        at_least: whether ``measured`` has to reach the limit, or stay under it.
        sides: what was compared, microseconds.
        device: where it was measured.
        where: the case among those that the same limit holds for; empty if there is one only.
        goal: what one would like to reach, in ``unit``.
    """

    name: str
    bar: str
    unit: str
    measured: Spread
    limit: float
    at_least: bool
    sides: dict[str, Spread]
    device: str
    where: str = ""
    goal: float | None = None

    @property
    def met(self) -> bool:
        """Whether the median keeps to the limit."""
        return self.measured.median >= self.limit if self.at_least else self.measured.median <= self.limit


@dataclass(frozen=True)
class Machine:
    """Where and with what the results were measured; ``toolkit`` is the CUDA or HIP that torch was built with."""

    device: str
    driver: str
    torch: str
    triton: str
    transformers: str
    python: str
    platform: str
    threads: int
    date: str
    toolkit: str = ""


@dataclass(frozen=True)
class Results:
    """Everything one run measured; ``conclusion`` says in one sentence how launch overhead amortises, where that was measured."""

    machine: Machine
    runs: int
    quick: bool
    notes: tuple[str, ...] = ()
    rows: tuple[BenchRow, ...] = ()
    bars: tuple[BarRow, ...] = ()
    schema: int = field(default=SCHEMA)
    conclusion: str = ""

    def to_json(self) -> str:
        """A JSON object with the attribute names as keys; each bar also says whether it is ``met``."""
        plain = dataclasses.asdict(self)
        for bar, line in zip(self.bars, plain["bars"], strict=True):
            line["met"] = bar.met
        return json.dumps(plain, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Results:
        """The results that `to_json` wrote, with defaults for what a run before this one did not record.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: ``text`` is something else.
        """
        plain = json.loads(text)
        parts = {
            "machine": _made(Machine, plain["machine"]),
            "rows": tuple(_made(BenchRow, row) for row in plain["rows"]),
            "bars": tuple(_made(BarRow, {**bar, "sides": _spreads(bar["sides"])}) for bar in plain["bars"]),
            "notes": tuple(plain["notes"]),
        }
        return _made(cls, {**plain, **parts})


def read_results(path: Path) -> Results:
    """The results in a file.

    Raises:
        UnreadableResults: it cannot be read, holds something else, or has another schema.
    """
    try:
        text = path.read_text()
        schema = json.loads(text)["schema"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UnreadableResults(path, f"it holds no results of `graphs bench` ({type(error).__name__}: {error})") from error
    if schema != SCHEMA:
        raise UnreadableResults(path, f"its schema is {schema!r}, and this version reads {SCHEMA}; measure again to compare")
    try:
        return Results.from_json(text)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UnreadableResults(path, f"its results are incomplete ({type(error).__name__}: {error})") from error


def _made(kind: type[T], plain: Mapping[str, Any]) -> T:
    """An object from its attributes; those with a median are spreads, and what ``kind`` does not have is left out."""
    names = {one.name for one in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in _spreads(plain).items() if name in names})


def _spreads(plain: Mapping[str, Any]) -> dict[str, Any]:
    return {name: Spread(**one) if isinstance(one, dict) and "median" in one else one for name, one in plain.items()}
