"""The names of the package: imported when they are used, and the same whichever way they are reached."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import graphs

ROOT = Path(__file__).resolve().parents[1]


def run(script: str) -> str:
    """What a program of its own prints."""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_type_checkers_are_told_what_is_imported_later() -> None:
    tree = ast.parse(Path(graphs.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    told = {node.module: tuple(alias.name for alias in node.names) for node in block.body if isinstance(node, ast.ImportFrom)}
    assert told == graphs._MODULES
    assert sorted(name for names in told.values() for name in names) == sorted(set(graphs.__all__) - {"__version__"})


def test_every_public_name_is_there_and_listed() -> None:
    assert set(graphs.__all__) <= set(dir(graphs))
    for name in set(graphs.__all__) - {"__version__"}:
        assert callable(getattr(graphs, name)), name


def test_a_command_imports_nothing_heavy_and_a_program_all() -> None:
    told = "print('torch' in sys.modules, 'passes' in sys.modules)"
    assert run(f"import sys; sys.argv = ['graphs', '--help']; import graphs; {told}") == "False False"
    assert run(f"import sys, graphs; {told}") == "True True"
    assert run("import graphs, torch; print(torch.ops.graphs.wo_a_einsum.default)") == "graphs.wo_a_einsum.default"


def test_a_function_is_not_displaced_by_the_package_of_its_name() -> None:
    script = "from graphs.parity import parity as first; import graphs.parity; print(graphs.parity is first, callable(first))"
    assert run(script) == "True True"


def test_submodules_are_reached_as_attributes() -> None:
    assert run("import graphs; print(graphs.errors.HostSync.reason)") == "host-sync"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'graphs' has no attribute 'captured'"):
        _ = graphs.captured  # type: ignore[attr-defined]


def test_operators_can_be_lowered_without_a_name_of_the_package_being_used() -> None:
    script = (
        "import torch; from graphs.ops import GroupedProjection; from passes.mlir import decompositions;"
        "print(torch.ops.graphs.wo_a_einsum.default in decompositions._registered)"
    )
    assert run(script) == "True"
