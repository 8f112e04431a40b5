"""Where in the user's program something happens: a line, to be told, and a place, to be recognised.

The one place that goes through stacks and tracebacks for that.
"""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from types import CodeType, FrameType
from typing import NamedTuple

Site = tuple[str, int]
"""File and line; the file is empty where no Python frame is known."""
Branch = tuple[str, int, int]
"""File, line and column at which an ``if`` or a conditional expression begins."""
_LIBRARIES = {name: frozenset[str]() for name in ("torch", "triton", "sympy", "passes", "contextlib", "functools")}
"""Packages below the model, each with those of its parts that have lines a step may consist of."""


class Place(NamedTuple):
    """A place in the code: the text that an instruction was compiled from.

    Two expressions of one line are two places, and one expression is one place in every code that is compiled from it:
    in that of a function, and in what `passes.control_flow.source_transform` makes of it. Before Python 3.11 a place is a line.
    """

    file: str
    line: int
    column: int = -1
    last_line: int = -1
    last_column: int = -1

    @property
    def site(self) -> Site:
        """File and line."""
        return self.file, self.line


def add_library(package: str, models: Iterable[str] = ()) -> None:
    """Have no line of a package be taken for the user's, but for those in its parts ``models``."""
    _LIBRARIES[package] = frozenset(models)
    _is_of_library.cache_clear()


def first_frame(frame: FrameType | None, wanted: Callable[[FrameType], bool]) -> FrameType | None:
    """The first frame, from ``frame`` outwards, that is ``wanted``."""
    while frame is not None and not wanted(frame):
        frame = frame.f_back
    return frame


def line_of(frame: FrameType | None) -> Site:
    """File and line that a frame is at."""
    return (frame.f_code.co_filename, frame.f_lineno) if frame is not None else ("", 0)


def user_line(frame: FrameType | None) -> Site:
    """File and line of the first frame, from ``frame`` outwards, that belongs to no library below the model."""
    while frame is not None and not is_user(frame):  # for each operator of a watched run: `first_frame` takes half as long again
        frame = frame.f_back
    return line_of(frame)


def user_site() -> Site:
    """File and line of the innermost frame that belongs to no library below the model."""
    return user_line(sys._getframe(1))


def user_place() -> Place:
    """The place that the innermost frame which belongs to no library below the model is at."""
    frame = user_frame()
    return place_of(frame) if frame is not None else Place("", 0)


def user_frame() -> FrameType | None:
    """The innermost frame that belongs to no library below the model."""
    return first_frame(sys._getframe(1), is_user)


def user_level() -> int:
    """The ``stacklevel`` with which `warnings.warn`, in the function that calls this, shows the first line of no library's.

    The outermost line, where all of them are. Lines without a file, as of an interactive session, count.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _is_librarys(frame):
        level, frame = level + 1, frame.f_back
    return level


def frames_of(error: BaseException) -> list[FrameType]:
    """The frames that an exception passed, the outermost first."""
    return [frame for frame, _ in traceback.walk_tb(error.__traceback__)]


def raised_at(error: BaseException) -> Site:
    """The user's line that an exception was raised in or below."""
    lines = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__) if is_user(frame)]
    return lines[-1] if lines else ("", 0)


def called_by_user() -> str:
    """The name of the function, of those that run now, that a line of the user's called; empty where there is none."""
    called = first_frame(sys._getframe(1), lambda frame: frame.f_back is not None and is_user(frame.f_back))
    return called.f_code.co_name if called is not None else ""


def place_of(frame: FrameType) -> Place:
    """The place that a frame is at."""
    code, line = frame.f_code, frame.f_lineno
    if sys.version_info >= (3, 11):
        first, last, column, last_column = _positions(code)[frame.f_lasti // 2]
        if first is not None and last is not None and column is not None and last_column is not None:
            return Place(code.co_filename, first, column, last, last_column)
    return Place(code.co_filename, line)


_Positions = tuple[tuple[int | None, int | None, int | None, int | None], ...]
_POSITIONS: dict[int, tuple[CodeType, _Positions]] = {}
_LIMIT = 4096


def _positions(code: CodeType) -> _Positions:
    """The positions of the instructions of a code. Codes are told apart by identity: comparing them takes longer."""
    found = _POSITIONS.get(id(code))
    if found is None:
        if len(_POSITIONS) >= _LIMIT:
            _POSITIONS.clear()
        found = _POSITIONS[id(code)] = (code, tuple(code.co_positions()))  # type: ignore[attr-defined, unused-ignore]
    return found[1]


def is_user(frame: FrameType) -> bool:
    """Whether a frame belongs to no library below the model."""
    return not _is_of_library(str(frame.f_globals.get("__name__", ""))) and not frame.f_code.co_filename.startswith("<")


def _is_librarys(frame: FrameType) -> bool:
    return _is_of_library(str(frame.f_globals.get("__name__", "")))


@functools.lru_cache(maxsize=4096)
def _is_of_library(module: str) -> bool:
    package, _, rest = module.partition(".")
    models = _LIBRARIES.get(package)
    return models is not None and rest.partition(".")[0] not in models


def is_user_file(file: str) -> bool:
    """The same of a file, where that is all that is left of a frame: in the text of a stack."""
    homes = [getattr(sys.modules.get(package), "__file__", None) for package in _LIBRARIES]
    folders = tuple(os.path.dirname(home) + os.sep for home in homes if home and os.path.basename(home) == "__init__.py")
    return not file.startswith(folders) and os.path.isfile(file)
