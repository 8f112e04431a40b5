"""Whose code a file is: the user's, a library's, Python's own, torch's, or this package's.

Libraries are installed in many ways: into the environment, system-wide below one (``dist-packages``), for the user, into a
folder on ``PYTHONPATH``. What they share is the folder of metadata beside them; a checkout of the user's has none.
"""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
import types
from pathlib import Path
from typing import Any

import torch

from graphs.objects.raw_access import module_name, per_class
from passes.core.source_location import add_library

_PYTHON = tuple({os.path.dirname(os.__file__), sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")})
_INSTALLED = ("site-packages", "dist-packages")
_TORCH = tuple(os.path.dirname(path) + os.sep for path in torch.__path__ for path in (os.path.join(path, ""),))
_OWN = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) + os.sep
_OWN_PACKAGES = tuple(_OWN + name + os.sep for name in ("graphs", "passes"))
MODELS = ("bench", "ops")
"""Folders of this package with lines that a step may consist of."""
add_library("graphs", MODELS)
_OWN_MODELS = tuple(os.path.join(_OWN, "graphs", name) + os.sep for name in MODELS)


@functools.cache
def origin_of(file: str) -> str:
    """``"python"``, ``"torch"``, ``"own"``, ``"library"`` or ``"user"``, by the file of a code object or module."""
    if file.startswith("<frozen"):
        return "python"
    if file.startswith(_TORCH):
        return "torch"
    if file.startswith(_OWN_PACKAGES):
        return "library" if file.startswith(_OWN_MODELS) else "own"
    path = Path(file)
    if any(part in _INSTALLED for part in path.parts) or _has_metadata(path):
        return "library"
    return "python" if file.startswith(_PYTHON) else "user"


def from_package_on(file: str) -> str:
    """The path of an installed file from its package on; of another, as it is."""
    for folder in _INSTALLED:
        file = file.rpartition(f"{os.sep}{folder}{os.sep}")[2]
    return file


def _has_metadata(path: Path) -> bool:
    """Whether the outermost package of a file has a ``*.dist-info`` folder beside it."""
    top = path
    while (top.parent / "__init__.py").is_file():
        top = top.parent
    name = top.stem.lower().replace("-", "_")
    return name != "" and _described(str(top.parent), name)


@functools.cache
def _described(folder: str, name: str) -> bool:
    try:
        entries = [entry.lower().replace("-", "_") for entry in os.listdir(folder)] if folder else []
    except OSError:
        return False
    return any(entry.startswith(name) and entry.endswith(".dist_info") for entry in entries)


def origin_of_code(code: types.CodeType, space: dict[str, Any]) -> str:
    """The same for a function; one whose text was generated (by a dataclass, say) belongs to the module of its globals."""
    file = code.co_filename
    if file.startswith("<") and not file.startswith("<frozen"):
        file = str(space.get("__file__") or file)
    return origin_of(file)


def origin_of_frame(frame: types.FrameType) -> str:
    """The same for the function that a frame runs."""
    return origin_of_code(frame.f_code, frame.f_globals)


def origin_of_module(module: types.ModuleType) -> str:
    """The same for a module; one without a file is Python's own, or made by the package in whose name it lies (``torch._C._nn``),
    or by hand.
    """
    content = vars(module)
    file = content.get("__file__")
    if isinstance(file, str):
        return origin_of(file)
    spec = content.get("__spec__")
    built_in = content.get("__name__") in sys.builtin_module_names or getattr(spec, "origin", None) in ("built-in", "frozen")
    if built_in or spec is not None:
        return "python" if built_in else "library"
    package = sys.modules.get(str(content.get("__name__", "")).rpartition(".")[0])
    return origin_of_module(package) if type(package) is types.ModuleType else "user"


@per_class
def origin_of_type(kind: type[Any]) -> str:
    """The same for a class. Asks nothing of the class that its metaclass could answer."""
    name = module_name(kind)
    module = sys.modules.get(name)
    if name == "__main__" or not isinstance(module, types.ModuleType):
        return "user"
    return origin_of_module(module)
