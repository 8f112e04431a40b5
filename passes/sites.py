"""Where in the user's program something happens."""

from __future__ import annotations

import sys
from types import FrameType

Site = tuple[str, int]
"""File and line; the file is empty where no Python frame is known."""
_LIBRARIES = frozenset(("torch", "triton", "sympy", "passes", "contextlib", "functools"))
_MODELS = frozenset(("bench", "models", "ops"))  # where the package above has lines that a step may consist of


def user_site() -> Site:
    """File and line of the innermost frame that belongs to no library below the model."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if is_program(frame):
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
    return "", 0


def is_program(frame: FrameType) -> bool:
    """Whether a frame runs the user's program, or a library above torch."""
    package, _, rest = str(frame.f_globals.get("__name__", "")).partition(".")
    library = package in _LIBRARIES or (package == "graphs" and rest.partition(".")[0] not in _MODELS)
    return not library and not frame.f_code.co_filename.startswith("<")
