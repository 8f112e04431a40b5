"""Exchanging the code of functions while a step is traced: the one place that does it, and undoes it.

A function object stays what it is (closure, defaults, identity, whoever holds it) and gets other code: its source with what
`source_transform` makes of some branches. The new code asks `ENTRY` at those branches, which answers for the thread that
traces, and for any other thread that calls the same function meanwhile as Python itself would. One thread traces at a time
(`passes.tracing.number_builtins`).
"""

from __future__ import annotations

import contextlib
import functools
import gc
import linecache
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CodeType, FunctionType
from typing import Any

from passes.control_flow.source_transform import PLACEHOLDER, with_branches
from passes.control_flow.syntax import Start, branch_at
from passes.core.source_location import Place
from passes.forked_process import put_back_by

Starts = frozenset[Start]
"""Where ``if`` statements and conditional expressions begin."""
Written = tuple[str, CodeType]
"""A function as it is written: its file and its code. Codes of two files may be equal."""
Plan = Mapping[Written, Starts]
"""Which branches of which functions have both sides run."""


class _Entry:
    """What rewritten lines call: the branches of the trace that runs in their thread, else plain branches."""

    def __init__(self) -> None:
        self._local = threading.local()

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(self._local, "branches", None) or _PLAIN, name)

    @contextlib.contextmanager
    def answered_by(self, branches: Any) -> Iterator[None]:
        """Have ``branches`` answer for this thread."""
        outer = getattr(self._local, "branches", None)
        self._local.branches = branches
        try:
            yield
        finally:
            self._local.branches = outer


class _Plain:
    """Branches as Python takes them."""

    def if_stmt(self, test: Any, *_: Any) -> PlainBranch:
        return PlainBranch(bool(test))

    def truth(self, value: Any, *_: Any) -> bool:
        return bool(value)

    def and_(self, first: Any, second: Callable[[], Any], at: Start) -> Any:
        return first and second()

    def or_(self, first: Any, second: Callable[[], Any], at: Start) -> Any:
        return first or second()

    def opposite(self, value: Any) -> bool:
        return not value

    def if_exp(self, test: Any, first: Callable[[], Any], second: Callable[[], Any], *_: Any) -> Any:
        return first() if test else second()


class PlainBranch:
    """A branch that goes one way."""

    def __init__(self, taken: bool) -> None:
        self._taken = taken

    def enter(self, side: bool) -> bool:
        """Whether to run a side."""
        return self._taken is side

    def leave(self, local: Mapping[str, Any]) -> None:
        """The end of a side."""

    def restarts(self, name: str) -> bool:
        """Whether a name has to be put back for the second side."""
        return False

    joins = restarts


_PLAIN = _Plain()
ENTRY = _Entry()


@contextlib.contextmanager
def patched(plan: Plan, branches: Any, functions: Mapping[Written, Sequence[FunctionType]]) -> Iterator[None]:
    """Let the functions of ``plan`` ask ``branches`` at their branches; afterwards each has the code that it had.

    Args:
        functions: what `functions_of` found.
    """
    changed: list[tuple[FunctionType, CodeType]] = []

    def put_back() -> None:
        for function, code in changed:
            function.__code__ = code

    with put_back_by(put_back):
        for place, starts in plan.items():
            new = rewritten(place[1], starts)
            for function in functions[place] if new is not None else ():
                if written(function.__code__) == place and new is not None:
                    changed.append((function, function.__code__))
                    function.__code__ = new
        with ENTRY.answered_by(branches):
            yield


def written(code: CodeType) -> Written:
    """The function that a code stands for, be it one that `rewritten` made."""
    return _ORIGINALS.get((code.co_filename, code), (code.co_filename, code))


_ORIGINALS: dict[Written, Written] = {}


def functions_of(places: Sequence[Written]) -> dict[Written, list[FunctionType]]:
    """The function objects that run each code: one for each time its ``def`` was executed and its result is still there."""
    found: dict[Written, list[FunctionType]] = {place: [] for place in places}
    for function in _referrers([code for _, code in places]) if places else ():
        if isinstance(function, FunctionType) and (place := written(function.__code__)) in found:
            found[place].append(function)
    return found


def _referrers(codes: Sequence[CodeType]) -> list[Any]:
    """What refers to codes, be it frozen (`gc.freeze`): the collector shows of that nothing as long as it is."""
    frozen = gc.get_freeze_count() > 0
    if frozen:
        gc.unfreeze()
    try:
        return gc.get_referrers(*codes)
    finally:
        if frozen:
            gc.freeze()


def rewritten(code: CodeType, starts: Starts) -> CodeType | None:
    """The code of a function that has both sides of the branches run that begin at ``starts``; None where there are none such."""
    return _rewritten(code.co_filename, code, starts)


@functools.lru_cache(maxsize=256)
def _rewritten(file: str, code: CodeType, starts: Starts) -> CodeType | None:
    text = _source_of(code)
    made = with_branches(text, code, starts) if text is not None else None
    if made is None:
        return None
    new = _with_entry(made)
    for made in (new, *(inner for inner in _inner(new) if inner.co_name == "<lambda>")):  # a condition may stand in one
        _ORIGINALS[file, made] = (file, code)
    return new


def branch_in(code: CodeType, place: Place) -> Start | None:
    """Where the branch begins whose condition is asked for at ``place``, if both of its sides can be run."""
    text = _source_of(code)
    first = branch_at(text, code, place) if text is not None else None
    return first if first is not None and rewritten(code, frozenset((first,))) is not None else None


def _source_of(code: CodeType) -> str | None:
    """The text that a function was compiled from; None where the file does not hold it any more."""
    text = "".join(linecache.getlines(code.co_filename))
    return text if code in _codes_in(text, code.co_filename) else None


@functools.lru_cache(maxsize=64)
def _codes_in(text: str, file: str) -> frozenset[CodeType]:
    try:
        return frozenset(_inner(compile(text, file, "exec", dont_inherit=True)))
    except (SyntaxError, ValueError):
        return frozenset()


def _inner(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _inner(constant)


def _with_entry(code: CodeType) -> CodeType:
    """Code with `ENTRY` in the place of the text that stands for it, in functions inside of it too."""

    def constant(value: Any) -> Any:
        if isinstance(value, CodeType):
            return _with_entry(value)
        return ENTRY if value == PLACEHOLDER else value

    return code.replace(co_consts=tuple(map(constant, code.co_consts)))
