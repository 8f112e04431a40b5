"""The documents of the project, and the fenced blocks in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
_FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        document: its file.
        line: the line after the opening fence, from 1.
        language: the first word after the fence; empty if there is none.
        source: ``from=FILE`` after the language: the file that the block is an excerpt of.
        text: what stands between the fences.
    """

    document: Path
    line: int
    language: str
    source: str
    text: str

    @property
    def id(self) -> str:
        """``docs/capture.md:5``."""
        return f"{self.document.relative_to(ROOT).as_posix()}:{self.line}"

    @property
    def file_name(self) -> str:
        """The file that a program says it is in its first line (``# decode.py``), else empty."""
        named = re.match(r"# (\w+\.py)\n", self.text)
        return named[1] if named else ""


def blocks_of(document: Path) -> list[Block]:
    """The blocks of a document, in order."""
    return list(_blocks(document, document.read_text()))


def _blocks(document: Path, text: str) -> Iterator[Block]:
    for found in _FENCE.finditer(text):
        language, _, more = found[1].strip().partition(" ")
        source = re.search(r"from=(\S+)", more)
        line = text.count("\n", 0, found.start()) + 2
        yield Block(document, line, language, source[1] if source else "", found[2])


def code_of(document: Path) -> str:
    """All that a document shows as code, in blocks and in backticks, a piece a line; spans over two lines are joined."""
    text = document.read_text()
    spans = re.findall(r"`([^`]+)`", _FENCE.sub("", text))
    return "\n".join([*(block.text for block in blocks_of(document)), *(" ".join(span.split()) for span in spans)])
