"""Every program and every session in the documents runs as it stands, and prints what is shown.

- A ``python`` block is a program of its own. What it prints stands in comments behind ``print(...)``, or in the ``text`` block
  that follows. One whose first line is ``# name.py`` is also a file that the sessions of its document may use.
- A ``console`` block is a session: ``$ python -m graphs ...`` and what that prints.
- A ``python from=FILE`` block is an excerpt of that file.

Times, and what follows from them, are not compared.
"""

from __future__ import annotations

import re
import runpy
import shlex
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest

from graphs.__main__ import main
from tests.documents import DOCUMENTS, ROOT, Block, blocks_of

PAGES = {document: blocks_of(document) for document in DOCUMENTS}
BLOCKS = [block for blocks in PAGES.values() for block in blocks]
PROGRAMS = [block for block in BLOCKS if block.language == "python" and not block.source]
SESSIONS = [block for block in BLOCKS if block.language == "console"]
EXCERPTS = [block for block in BLOCKS if block.source]
LANGUAGES = {"python", "console", "text", "sh"}  # `py` and the like would not be run
NEEDS = {"transformers": "transformers", "deepseek_v4": "transformers.models.deepseek_v4", "to_mlir": "torch_mlir"}
TIMES = re.compile(r"[\d.,]+ (?:s|us|MiB)\b|[\d,]*\d\.\d+|never pays|pays after [\d,]+ calls|[\d,]+ in all")


def lines(printed: str) -> list[list[str]]:
    """The words of each line, with times masked, since they differ from run to run and move what stands behind them."""
    return [TIMES.sub("_", line).split() for line in printed.strip().splitlines()]


def words_of(table: str) -> Counter[str]:
    """The words of a table in any order: how wide its times are decides where the cells beside them wrap."""
    return Counter(word for line in lines(table) for word in line)


def shown(block: Block) -> str:
    """What a document says that a program prints."""
    promised = re.findall(r"print\(.*\)  # (.*)", block.text)
    blocks = PAGES[block.document]
    following = blocks[blocks.index(block) + 1 :][:1]
    if promised or not following or following[0].language != "text" or "print(" not in block.text:
        return "\n".join(promised)
    return following[0].text


def test_programs_and_sessions_are_found() -> None:
    assert len(PROGRAMS) >= 12 and len(SESSIONS) >= 2 and EXCERPTS
    strange = [block.id for block in BLOCKS if block.language not in LANGUAGES]
    assert not [block_id for block_id in strange if not block_id.startswith("ARCHITECTURE.md")]


@pytest.mark.parametrize("block", PROGRAMS, ids=lambda block: block.id)
@pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")
def test_a_program_runs_and_prints_what_is_shown(block: Block, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for word, module in NEEDS.items():
        if word in block.text:
            pytest.importorskip(module, reason=f"{module} is not installed")
    path = tmp_path / "program.py"
    path.write_text(block.text)
    runpy.run_path(str(path), run_name="readme")
    assert lines(capsys.readouterr().out) == lines(shown(block))


@pytest.mark.parametrize("block", SESSIONS, ids=lambda block: block.id)
def test_a_session_prints_what_is_shown(
    block: Block, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for program in PAGES[block.document]:
        if program.file_name:
            (tmp_path / program.file_name).write_text(program.text)
            monkeypatch.delitem(sys.modules, Path(program.file_name).stem, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    command, _, expected = block.text.partition("\n")
    words = shlex.split(command)
    assert words[:4] == ["$", "python", "-m", "graphs"]
    with pytest.raises(SystemExit) as done:
        main(words[4:])
    assert not done.value.code
    assert words_of(capsys.readouterr().out) == words_of(expected)


@pytest.mark.parametrize("block", EXCERPTS, ids=lambda block: block.id)
def test_an_excerpt_stands_in_its_file(block: Block) -> None:
    text = (ROOT / block.source).read_text()
    assert block.text in text or textwrap.indent(block.text, " " * 4) in text
