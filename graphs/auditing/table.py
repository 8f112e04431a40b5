"""An audit as a table for a terminal."""

from __future__ import annotations

import io
import os
import shutil

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from graphs.auditing.finding import Finding, Findings
from graphs.auditing.remedies import REMEDIES
from graphs.objects.libraries import from_package_on

_NARROWEST = 80
_NAMED = 6  # lines named in the summary
_SPELLED = {"__getitem__": "x[i]", "__setitem__": "x[i] =", "__contains__": "in"}


def as_text(audit: Findings) -> str:
    """The table as plain text, as wide as the terminal, and not so narrow that nothing can be read."""
    out = io.StringIO()
    width = max(_NARROWEST, shutil.get_terminal_size((_NARROWEST, 24)).columns)
    Console(file=out, width=width).print(as_table(audit))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def as_table(audit: Findings) -> Group:
    """A table of the findings that stand for themselves, and below it what the passes do and what else was found."""
    head = Text(f"Audit of a step on {audit.device}: {audit.operators} operators, {audit.steps} steps compared", "bold")
    shown = [one for one in audit.findings if not one.follows and not one.once]
    below = Text("\n".join(["", *_passes(shown), *_summary(audit, shown)]))
    return Group(head, _table(shown), below) if shown else Group(head, below)


def _table(shown: list[Finding]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("line", justify="right", no_wrap=True)
    table.add_column("found", ratio=1, overflow="fold")
    for name in ("class", "passes"):
        table.add_column(name, no_wrap=True)
    for name in ("calls", "us"):
        table.add_column(name, justify="right", no_wrap=True)
    file = None
    for one in shown:
        if one.file != file:
            file = one.file
            table.add_row("", Text(_short_path(file) if file else "no line known", "bold"))
        cost = "" if one.cost_us is None else f"{one.cost_us:,.1f}"
        passes = Text("\n".join(one.passes), "green") if one.passes else Text("none", "red")
        table.add_row(str(one.line or ""), _what(one), "\n".join(one.classes), passes, str(one.calls), cost)
    return table


def _what(one: Finding) -> Text:
    by = _SPELLED.get(one.function, f"{one.function.strip('_')}()") if one.function else one.operator.removesuffix(".default")
    text = Text(f"{one.source}\n" if one.source else "")
    text.append(f"{one.kind}, {by}: {one.detail}", "dim")
    if not one.passes:
        text.append(f"\nremedy: {one.cure}", "red")
    return text


def _short_path(file: str) -> str:
    """A path relative to the current directory; of an installed package, from the package on."""
    here = os.getcwd() + os.sep
    return file.removeprefix(here) if file.startswith(here) else from_package_on(file)


def _passes(shown: list[Finding]) -> list[str]:
    """What each pass that is named does."""
    named = {name for one in shown for name in one.passes}
    return [f"{remedy.by}: {remedy.does}" for remedy in REMEDIES.values() if remedy.by in named]


def _summary(audit: Findings, shown: list[Finding]) -> list[str]:
    if not audit.findings:
        return ["Nothing found: the step can be recorded as it is."]
    lines = [_totals(audit, shown) if shown else "Nothing found in a step that has settled: it can be recorded as it is."]
    follows = [one for one in audit.findings if one.follows]
    once = [one for one in audit.findings if one.once]
    if follows:
        lines.append(f"{len(follows)} more sizes and numbers follow from these: {_places(follows)}.")
    if once:
        lines.append(f"{len(once)} more differ in the first step only: {_places(once)}.")
    return lines


def _totals(audit: Findings, shown: list[Finding]) -> str:
    taken = sum(bool(one.passes) for one in shown)
    waits = sum(one.cost_us or 0 for one in shown)
    left = f"; {len(shown) - taken} need the remedy named" if taken < len(shown) else ""
    count = "1 finding" if len(shown) == 1 else f"{len(shown)} findings"
    return f"{count}: passes apply to {taken}{left}. us: {audit.cost} per step, {waits:,.0f} in all."


def _places(found: list[Finding]) -> str:
    """Where findings are, briefly; `Audit.to_json` has all of them."""
    names = list(dict.fromkeys(f"{os.path.basename(one.file)}:{one.line}" if one.file else one.operator for one in found))
    more = f" and {len(names) - _NAMED} more lines" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
