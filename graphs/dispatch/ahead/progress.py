"""What is told while sizes are recorded: a bar on a terminal, lines in the log elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any, Protocol

from graphs.report import SizeReport, SizesReport

_log = logging.getLogger("graphs")


class Told(Protocol):
    """Who is told how far it is."""

    def begun(self, size: int) -> None:
        """A size is being recorded."""
        ...

    def estimated(self, text: str) -> None:
        """The first size is recorded, and says what the others will take."""
        ...

    def ended(self, size: SizeReport) -> None:
        """A size is recorded, or is not."""
        ...

    def done(self, report: SizesReport) -> None:
        """All of them are."""
        ...


class InTheLog:
    """Lines of the logger ``graphs``: the estimate and the end at level INFO, each size at DEBUG."""

    def begun(self, size: int) -> None:
        """Nothing."""

    def estimated(self, text: str) -> None:
        """One line."""
        _log.info("%s", text)

    def ended(self, size: SizeReport) -> None:
        """One line."""
        _log.debug("size %d: %s", size.size, size.note or f"recorded in {size.seconds:.2f} s, {size.bytes} bytes")

    def done(self, report: SizesReport) -> None:
        """The table."""
        _log.info("%s", report)


class OnTerminal(InTheLog):
    """A bar, the estimate above it, and the table below; the log is told as well."""

    def __init__(self, bar: Any, total: int) -> None:
        self._bar, self._task = bar, bar.add_task("recording", total=total)

    def begun(self, size: int) -> None:
        """The bar names the size."""
        self._bar.update(self._task, description=f"recording size {size}")

    def estimated(self, text: str) -> None:
        """A line above the bar."""
        super().estimated(text)
        self._bar.console.print(text, markup=False)

    def ended(self, size: SizeReport) -> None:
        """The bar moves on."""
        super().ended(size)
        self._bar.advance(self._task)

    def done(self, report: SizesReport) -> None:
        """The table."""
        super().done(report)
        self._bar.console.print(str(report), markup=False, soft_wrap=True)


@contextlib.contextmanager
def progress_of(sizes: int, *, shown: bool) -> Iterator[Told]:
    """Who is told of so many sizes: the terminal, where ``shown`` and the error stream is one."""
    if not (shown and sys.stderr is not None and sys.stderr.isatty()):
        yield InTheLog()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True, highlight=False)) as bar:
        yield OnTerminal(bar, sizes)
