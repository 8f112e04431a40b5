"""The name ``"graphs"`` for `torch.compile`: from the entry point of an installed package, else from here.

`torch` looks for entry points when Dynamo is first needed, and Dynamo takes seconds to import: so a package that is used from its
sources, without metadata, is shown to `importlib.metadata` as one that has the entry point.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from graphs._version import __version__

NAME, GROUP, HOME = "stepgraphs", "torch_dynamo_backends", "graphs.dynamo.backend:graphs_backend"


class FromSources(importlib.metadata.Distribution):
    """The metadata of this package where nothing installed it."""

    def read_text(self, filename: str) -> str | None:
        """The name and the entry point."""
        texts = {"METADATA": f"Name: {NAME}\nVersion: {__version__}\n", "entry_points.txt": f"[{GROUP}]\ngraphs = {HOME}\n"}
        return texts.get(filename)

    def locate_file(self, path: str | os.PathLike[str]) -> Any:
        """No file was installed."""
        raise FileNotFoundError(path)


class Finder(importlib.metadata.DistributionFinder):
    """Shows `FromSources` to `importlib.metadata`."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> None:
        """No module is found here."""

    def find_distributions(self, context: Any = None) -> Iterable[importlib.metadata.Distribution]:
        """The package, for who asks for all or for it."""
        return [FromSources()] if getattr(context, "name", None) in (None, NAME) else []


def register() -> None:
    """Have ``torch.compile(backend="graphs")`` find the backend."""
    if any(entry.value == HOME for entry in _entries()):
        return
    sys.meta_path.append(Finder())
    registry = sys.modules.get("torch._dynamo.backends.registry")
    if registry is not None:  # it has looked already
        register_backend: Callable[..., Any] = registry.register_backend
        register_backend(compiler_fn=_backend, name="graphs")


def _entries() -> Iterator[importlib.metadata.EntryPoint]:
    yield from importlib.metadata.entry_points(group=GROUP)


def _backend(*args: Any, **kwargs: Any) -> Any:
    from graphs.dynamo.backend import graphs_backend

    return graphs_backend(*args, **kwargs)
