"""How large a function, a class and a file of the passes may be: what is larger does more than one thing."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PASSES = Path(__file__).resolve().parents[2] / "passes"
LIMITS = {ast.FunctionDef: 40, ast.AsyncFunctionDef: 40, ast.ClassDef: 200}


def too_large(text: str) -> list[str]:
    """The functions, the classes and the file that are longer than they may be."""
    lines = len(text.splitlines())
    found = [f"{lines} lines"] if lines > 400 else []
    for node in ast.walk(ast.parse(text)):
        if type(node) in LIMITS and node.end_lineno - node.lineno + 1 > LIMITS[type(node)]:  # type: ignore[attr-defined, index]
            found.append(node.name)  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("path", sorted(PASSES.rglob("*.py")), ids=lambda path: path.relative_to(PASSES).as_posix())
def test_nothing_is_too_large(path: Path) -> None:
    assert too_large(path.read_text()) == []


def test_what_is_too_large_is_named() -> None:
    function = "def long():\n" + "    x = 1\n" * 40
    assert too_large(function) == ["long"] and too_large(function.replace("    x = 1\n", "", 1)) == []
    assert too_large("class Large:\n" + "    x = 1\n" * 200) == ["Large"] and too_large("x = 1\n" * 401) == ["401 lines"]
