"""A progress bar on a terminal, one line per case elsewhere."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from graphs.bench.harness.optional import optional_module
from graphs.bench.harness.sampling import Tick

WIDTH = 80


def make_console(*, quiet: bool = False) -> Any:
    """A rich console; 80 columns wide where the output is no terminal."""
    rich_console = optional_module("rich.console")
    console = rich_console.Console(quiet=quiet, highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    return console


class Progress:
    """Shows which case runs and how far it is."""

    def __init__(self, console: Any) -> None:
        self._console = console

    @contextlib.contextmanager
    def case(self, name: str, ticks: int) -> Iterator[Tick]:
        """Announce a case of ``ticks`` runs; yields what to call after each."""
        if not self._console.is_terminal:
            self._console.print(f"  {name}")
            yield lambda: None
            return
        progress = optional_module("rich.progress")
        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
        )
        with progress.Progress(*columns, console=self._console) as bar:
            yield functools.partial(bar.advance, bar.add_task(name, total=ticks))
