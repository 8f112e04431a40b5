"""Which line of a step sets a Python value, found in the code that the step ran."""

from __future__ import annotations

import dis
import re
import sys
from collections.abc import Callable, Iterable
from types import CodeType, FrameType
from typing import Any

from graphs.errors import Site
from passes.core.composites import as_written
from passes.core.source_location import is_user

_NAMED = ("STORE_ATTR", "STORE_GLOBAL", "STORE_DEREF", "STORE_NAME")
_CHANGING = frozenset("append appendleft add clear discard extend insert pop popleft popitem remove setdefault update".split())  # noqa: SIM905


def executed_code(fn: Callable[[], Any]) -> set[CodeType]:
    """Run ``fn`` and return the code of the user's functions, and of libraries above torch, that it ran."""
    codes: set[CodeType] = set()

    def called(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and is_user(frame):
            codes.add(frame.f_code)

    before = sys.getprofile()
    sys.setprofile(called)
    try:
        with as_written():
            fn()
    finally:
        sys.setprofile(before)
    return codes


def line_that_sets(path: str, codes: Iterable[CodeType]) -> Site:
    """The first line that assigns what ``path`` ends in (``self.cache.length``, ``self.sizes['n']``, ``calls``).

    An empty site where no line can be found.
    """
    ending = re.search(r"([A-Za-z_]\w*)((?:\[[^\]]*\])*)$", path)
    if ending is None:
        return Site()
    name, subscript = ending.groups()
    found = {line for code in codes for line in _lines(code, name, bool(subscript))}
    return Site.at(min(found)) if found else Site()


def _lines(code: CodeType, name: str, subscript: bool) -> Iterable[tuple[str, int]]:
    by_line: dict[int, list[dis.Instruction]] = {}
    starts = [(start, end, line) for start, end, line in code.co_lines() if line is not None]
    for instruction in dis.get_instructions(code):
        line = next((line for start, end, line in starts if start <= instruction.offset < end), None)
        if line is not None:
            by_line.setdefault(line, []).append(instruction)
    for line, instructions in by_line.items():
        stored = {str(i.argval) for i in instructions if i.opname in _NAMED}
        mentioned = {str(i.argval) for i in instructions}
        changed = any(i.opname in ("STORE_SUBSCR", "DELETE_SUBSCR") for i in instructions) or mentioned & _CHANGING
        if name in stored or (subscript and name in mentioned and changed):
            yield code.co_filename, line
