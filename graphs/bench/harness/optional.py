"""Packages that only the benchmarks need, imported when they are first used."""

from __future__ import annotations

import importlib
from types import ModuleType

from graphs.errors import MissingDependency

_NEEDED_FOR = {
    "matplotlib": "drawing the benchmark's figure",
    "rich": "printing the benchmark's table and progress",
    "transformers": "the decode benchmark",
}


def optional_module(name: str) -> ModuleType:
    """Import ``name`` (``rich.table``).

    Raises:
        MissingDependency: its package is not installed; the message holds the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        if error.name is not None and error.name.split(".")[0] != package:
            raise  # the package is there and lacks something of its own: its message says more
        raise MissingDependency(package, _NEEDED_FOR[package], "pip install 'stepgraphs[bench]'") from error
