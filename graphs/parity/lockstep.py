"""`parity`: a captured step and an eager twin, call by call, under every context and with everything changed that it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from graphs.contract.arguments import flatten_call
from graphs.contract.eligibility import device_of
from graphs.errors import ConfigError, FactoryError, Site
from graphs.parity.compare import call_difference
from graphs.parity.data import Arguments, arguments, layouts_of
from graphs.parity.lines import output_line, value_line
from graphs.parity.report import ParityReport
from graphs.parity.rows import ParityDifference, ParityRow
from graphs.parity.toggles import KINDS, Toggle, Undo, toggles
from graphs.parity.twins import Factory, Twin, context_parts, made_alike, random_states, set_random_states

DEFAULT_CONTEXTS = ("no_grad", "inference_mode", "autocast+no_grad", "autocast+inference_mode", "grad")
_NEW_DATA = "new data"
_WARM = 4  # calls before a value is changed: one that initialises, one that records, replays


@dataclass
class _Row:
    """A row in the making."""

    context: str
    variation: str
    captured: Twin
    eager: Twin
    device: torch.device
    calls: int = 0
    differences: int = 0
    first: ParityDifference | None = None
    line: Callable[[str, Arguments], Site] = field(default=lambda what, given: Site())

    def call(self, layout: str, toggled: str = "") -> None:
        """Call both twins with equal arguments, and compare."""
        given, alike = (arguments(twin.example, self.calls, layout) for twin in (self.captured, self.eager))
        eager = self.eager.call(self.context, self.device, alike)
        captured = self.captured.call(self.context, self.device, given)
        found = call_difference(eager, captured)
        if found is not None:
            self.differences += 1
            if self.first is None:
                site = value_line(toggled, self.eager.reached(), self.eager.model) if toggled else self.line(found[0], alike)
                row = (self.context, self.variation, self.calls)
                self.first = ParityDifference(*row, *found, toggled, site.file, site.line, site.source)
        self.calls += 1

    def done(self, tried: int = 0, found: int = 0) -> ParityRow:
        """The row as it is reported."""
        report = self.captured.step.report()
        reasons = [f"{one.reason} {one.file.rpartition('/')[2]}:{one.line}".removesuffix(" :0") for one in report.refusals]
        counts = (self.calls, report.replays, report.eager_calls, tuple(dict.fromkeys(reasons)), self.differences)
        return ParityRow(self.context, self.variation, tried, found, *counts)


def parity(
    factory: Factory,
    calls: int = 64,
    contexts: Sequence[str] = DEFAULT_CONTEXTS,
    *,
    changes: int = 24,
    seed: int = 0,
    name: str = "",
    **settings: Any,
) -> ParityReport:
    """Compare a captured step with the step itself, call by call, under everything that a call may meet.

    Under each context: ``calls`` calls with new data; an eighth as many with the arguments in each other layout; and with
    each kind of value that a step may read (attributes, entries of lists and dicts, hooks, methods, parameters and buffers,
    training flags, defaults, globals and closures), up to ``changes`` values are changed one after the other, each while a
    recording is in use, compared at the very next call, put back, and compared again. After each call the outputs, the
    arguments, every tensor and plain value that hangs on the model, and the states of random generators have to be the same,
    by bits or within the tolerance of their dtype. Where eager raises, the captured step has to raise the same type.

    Args:
        factory: returns ``(model, args)`` or ``(model, args, kwargs)``, other objects at each call, the same from one seed.
            Integers among the arguments stay within the values of the example, so give some that differ.
        calls: at least 8.
        contexts: ``"grad"``, ``"no_grad"``, ``"inference_mode"``, ``"autocast"`` (bfloat16), or several joined by ``"+"``.
        changes: most values of one kind that are changed in a context, spread evenly over those found; 0: none are looked for.
        seed: of the factory and the data.
        name: of the step in the report; default the name of the factory.
        settings: arguments of `capture`.

    Raises:
        ConfigError: an argument is not legal.
        FactoryError: the factory returns something else, or the same object twice, or the step raises on its own example.
    """
    _check_arguments(calls, contexts, changes)
    name = name or getattr(factory, "__qualname__", type(factory).__name__)
    return _compared(_Twins(factory, name, seed, settings), contexts, calls, changes)


def _check_arguments(calls: int, contexts: Sequence[str], changes: int) -> None:
    if calls < 8:
        raise ConfigError("calls", calls, "at least 8")
    if changes < 0:
        raise ConfigError("changes", changes, "0 or more")
    for context in contexts:
        context_parts(context)


@dataclass
class _Twins:
    """What makes twins for each row."""

    factory: Factory
    name: str
    seed: int
    settings: dict[str, Any]

    def first(self) -> torch.device:
        """The device of the step, which has to run on its own example."""
        _, eager = made_alike(self.factory, self.name, self.seed, self.settings)
        args, kwargs = eager.example
        try:
            with torch.no_grad():
                eager.model(*args, **kwargs)
        except Exception as error:
            remedy = "return arguments that the model can be called with"
            raise FactoryError(self.name, f"the step itself raises {type(error).__name__}: {error}", remedy) from error
        return device_of(flatten_call(args, kwargs, ()), eager.model)

    def row(self, context: str, variation: str, device: torch.device) -> _Row:
        """A row with new twins."""
        captured, eager = made_alike(self.factory, self.name, self.seed, self.settings)

        def line(what: str, given: Arguments) -> Site:
            return output_line(eager.model, what, context, device, given)

        return _Row(context, variation, captured, eager, device, line=line)


def _compared(twins: _Twins, contexts: Sequence[str], calls: int, changes: int) -> ParityReport:
    """All rows of all contexts; random states are afterwards what they were."""
    states = random_states()
    try:
        device = twins.first()
        rows = [row for context in contexts for row in _rows(twins, context, device, calls, changes)]
    finally:
        set_random_states(states)
    first = next((one for _, one in rows if one is not None), None)
    return ParityReport(twins.name, str(device), tuple(row for row, _ in rows), first)


def _rows(
    twins: _Twins, context: str, device: torch.device, calls: int, changes: int
) -> Iterator[tuple[ParityRow, ParityDifference | None]]:
    row = twins.row(context, _NEW_DATA, device)
    for _ in range(calls):
        row.call("contiguous")
    yield row.done(), row.first
    for layout in layouts_of(row.eager.example):
        row = twins.row(context, layout, device)
        for _ in range(max(_WARM, calls // 8)):
            row.call(layout)
        yield row.done(), row.first
    for kind in KINDS if changes else ():
        row = twins.row(context, kind, device)
        counts = _changed(row, kind, changes)
        if counts[1]:
            yield row.done(*counts), row.first


def _changed(row: _Row, kind: str, most: int) -> tuple[int, int]:
    """Change values of a kind in turn; how many were tried, of how many."""
    row.call("contiguous")  # what the step makes at its first call can be changed as well
    pairs = list(zip(_toggles(row.captured, kind), _toggles(row.eager, kind), strict=True))
    chosen = [pairs[index * len(pairs) // most] for index in range(most)] if len(pairs) > most else pairs
    for one, alike in chosen:
        _warm(row)
        undo = _applied(one, alike)
        try:
            row.call("contiguous", one.name)
        finally:
            undo()
        row.call("contiguous", f"putting back {one.name}")
    return len(chosen), len(pairs)


def _toggles(twin: Twin, kind: str) -> list[Toggle]:
    return toggles(twin.reached(), kind)


def _warm(row: _Row) -> None:
    """Call until a recording is in use, so that the next change has one to outdate."""
    step = row.captured.step
    for _ in range(_WARM):
        before = step.report().replays
        row.call("contiguous")
        if step.report().replays > before:
            return
    step.invalidate()  # what was refused for changing too often is tried anew
    for _ in range(2):
        row.call("contiguous")


def _applied(one: Toggle, alike: Toggle) -> Undo:
    """Make a change on both twins, once where they share what is changed."""
    undo = one.apply()
    if one.target == alike.target:
        return undo
    try:
        other = alike.apply()
    except BaseException:
        undo()
        raise

    def both() -> None:
        try:
            other()
        finally:
            undo()

    return both
