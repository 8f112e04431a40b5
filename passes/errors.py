"""The errors of this package. Each message ends in the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple


class PassesError(Exception):
    """Base class of every error raised on purpose by this package."""


class OptionError(PassesError, ValueError):
    """An option or argument has a value that is not legal."""

    def __init__(self, name: str, value: object, legal: Iterable[object] | str) -> None:
        choices = legal if isinstance(legal, str) else "one of " + ", ".join(repr(v) for v in legal)
        super().__init__(f"{name} = {value!r} is not legal; it must be {choices}.")
        self.name, self.value = name, value


class MissingDependency(PassesError, ImportError):
    """An optional package is absent, or its version cannot be used here; the message says what to install."""

    def __init__(self, package: str, needed_for: str, found: str, install: str) -> None:
        super().__init__(f"{needed_for} needs the package {package!r}: {found}. Install it with: {install}")
        self.package = package


class SourceLine(NamedTuple):
    """A line of the user's program. ``file`` is empty where none is known."""

    file: str = ""
    line: int = 0
    source: str = ""


class LoweringError(PassesError):
    """A step that cannot be brought into the dialect asked for, or not compiled.

    Attributes:
        stage: what was being done, for example ``"torch to linalg"``.
        operator: the operator at fault, for example ``aten.nonzero.default``; empty where none is known.
        site: the user's source line.
        detail: what was seen.
        reproduce: a shell command or an expression that shows the failure again.
        remedy: what to change.
    """

    def __init__(
        self, stage: str, detail: str, *, operator: str = "", site: SourceLine | None = None, reproduce: str, remedy: str
    ) -> None:
        self.stage, self.detail, self.operator = stage, detail, operator
        self.site = site or SourceLine()
        self.reproduce, self.remedy = reproduce, remedy
        where = f" at {self.site.file}:{self.site.line}" if self.site.file else ""
        named = f" [{operator}]" if operator else ""
        quoted = f"\n    {self.site.source}" if self.site.source else ""
        super().__init__(f"{stage}{where}{named}: {detail}{quoted}\n  Reproduce: {reproduce}\n  Remedy: {remedy}")


class Unremovable(PassesError):
    """A host value that no pass can take out of the step.

    Attributes:
        detail: what is in the way.
        operator: the operator or Python construct.
        site: file and line of the user's program.
        remedy: what to pass or change.
        symbols: the symbols of a traced step that it is about, as far as that is known.
        host_values: what became of the values that the host read, up to here; see `passes.host_values.uses.HostValue`.
    """

    def __init__(
        self, detail: str, operator: str, site: tuple[str, int] = ("", 0), remedy: str = "", *, symbols: Iterable[Any] = ()
    ) -> None:
        self.detail, self.operator, self.site, self.remedy = detail, operator, site, remedy
        self.symbols = frozenset(symbols)
        self.host_values: tuple[Any, ...] = ()
        where = f" at {site[0]}:{site[1]}" if site[0] else ""
        super().__init__(f"{operator}{where}: {detail}" + (f". {remedy}" if remedy else ""))


class IndexOutOfRange(PassesError, IndexError):
    """A compiled step met an index outside the tensor it indexes."""

    def __init__(self, site: SourceLine) -> None:
        where = f" at {site.file}:{site.line}" if site.file else ""
        quoted = f"\n    {site.source}" if site.source else ""
        super().__init__(
            f"an index is out of range{where}; nothing was written{quoted}\n  Remedy: pass indices inside the tensor"
        )
        self.site = site
