"""What documents and messages name exists: links, files, commands, options, targets, names, variables, reasons, numbers."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import json
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import graphs
from graphs.errors import Refusal
from tests.documents import DOCUMENTS, ROOT, code_of

README = ROOT / "README.md"
SOURCES = [path for folder in ("graphs", "passes", "benchmarks", "examples") for path in sorted((ROOT / folder).rglob("*.py"))]
FOLDERS = ("graphs", "passes", "tests", "benchmarks", "docs", "examples")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def strings_of(path: Path) -> str:
    """Every string in a source, docstrings and messages among them; what stands in braces of an f-string is left out."""
    tree = ast.parse(path.read_text())
    return "\n".join(node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))


SHOWN = {name_of(path): code_of(path) for path in DOCUMENTS}
SAID = {name_of(path): strings_of(path) for path in SOURCES}
EVERYTHING = SHOWN | SAID


def faults(check: Callable[[str], list[str]]) -> dict[str, list[str]]:
    """What ``check`` finds wrong in documents and in sources, by file."""
    return {name: found for name, text in EVERYTHING.items() if (found := check(text))}


# what a reader meets first


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 130


def test_the_readme_has_what_a_new_user_needs() -> None:
    text = README.read_text()
    assert "pip install" in text and "graphs.capture(model)" in text and "docs/amortisation.png" in text
    (test,) = re.findall(r"^exec (make \w+)$", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE)
    assert re.search(rf"^{test}\b", text, flags=re.MULTILINE), "the command that CI runs"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages <= set(re.findall(r"\]\(([\w-]+\.md)\)", index))


# links


def anchors_of(path: Path) -> set[str]:
    """The anchors that a Markdown page has, as GitHub makes them of headings."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_relative_link_resolves(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{link} leads nowhere"
        assert target.is_relative_to(ROOT)
        assert not anchor or anchor in anchors_of(target), f"{link}: no such heading"


# files, commands and names


def missing_files(text: str) -> list[str]:
    named = re.findall(rf"(?<![\w/.])((?:{'|'.join(FOLDERS)})/[\w./-]*\w)(?![\w*{{<])", text)
    return [path for path in named if not (ROOT / path).exists()]


def test_every_file_that_is_named_exists() -> None:
    assert faults(missing_files) == {}


def commands() -> dict[str, Any]:
    """The commands of ``python -m graphs``, as click has them."""
    typer = pytest.importorskip("typer", reason="typer is not installed")
    from graphs.cli import app

    found: dict[str, Any] = typer.main.get_command(app).commands
    return found


def options_of(command: Any) -> set[str]:
    return {"--help", *(option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts))}


@functools.cache
def help_of(command: str) -> str:
    """What ``python -m graphs COMMAND --help`` prints, wide enough that nothing is cut."""
    testing = pytest.importorskip("typer.testing", reason="typer is not installed")
    from graphs.cli import app

    return str(testing.CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "300"}).output)


def missing_commands(text: str) -> list[str]:
    known, found = commands(), []
    for line, module, rest in re.findall(r"(python3? -m (graphs[\w.]*|tests[\w.]*)([^`\n]*))", text):
        name = re.match(r" ([a-z_]+)", rest)
        if module not in ("graphs", "graphs."):
            exists = importlib.util.find_spec(module.rstrip(".")) is not None
        elif name is None:
            exists = set(re.findall(r"--[a-z][\w-]*", rest)) <= {"--help", "--version"}
        else:
            argument = re.match(r" (?:bench|tune) ([a-z_]+)", rest)
            exists = name[1] in known and set(re.findall(r"--[a-z][\w-]*", rest)) <= options_of(known[name[1]])
            exists = exists and (argument is None or argument[1] in help_of(name[1]))
        found += [] if exists else [line]
    return found


def test_every_command_that_is_named_exists() -> None:
    assert faults(missing_commands) == {}


def test_the_readme_names_every_command() -> None:
    named = set(re.findall(r"python -m graphs (\w+)", README.read_text()))
    assert named == set(commands())


@pytest.mark.parametrize("name", SHOWN)
def test_every_target_of_make_exists(name: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"^make ([a-z][\w-]*)", SHOWN[name], flags=re.MULTILINE)) <= targets


def resolve(dotted: str) -> object:
    """What a dotted name means to a user. An attribute comes first: importing a module of its name could take its place."""
    package, *rest = dotted.split(".")
    found: object = importlib.import_module(package)
    for count, part in enumerate(rest, 2):
        if not hasattr(found, part):
            importlib.import_module(".".join([package, *rest][:count]))
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", SHOWN)
def test_every_public_name_exists(name: str) -> None:
    spans = [line for line in SHOWN[name].splitlines() if "import " not in line]
    for dotted in re.findall(r"(?<![\w./\"])((?:graphs|passes)(?:\.[A-Za-z_]\w*)+)(?!\w*[/*:])", "\n".join(spans)):
        if not (ROOT / dotted).is_file():
            resolve(dotted)


def missing_extras(text: str) -> list[str]:
    table = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    extras = re.findall(r"^(\w+) = \[", table, flags=re.MULTILINE)
    return [extra for extra in re.findall(r"(?:stepgraphs|\"\.)\[(\w+)\]", text) if extra not in extras]


def test_every_extra_that_is_named_exists() -> None:
    assert faults(missing_extras) == {}


# tables of docs/capture.md


def capture_page() -> str:
    return (ROOT / "docs" / "capture.md").read_text()


def test_every_reason_has_a_line() -> None:
    def reasons(kind: type[Refusal]) -> set[str]:
        return {kind.reason}.union(*map(reasons, kind.__subclasses__())) - {"refused"}

    assert set(re.findall(r"^\| `([a-z]+(?:-[a-z]+)*)` \|", capture_page(), flags=re.MULTILINE)) == reasons(Refusal)


def test_every_argument_of_capture_has_a_line() -> None:
    table = capture_page().partition("## Arguments of `capture`")[2].partition("## Environment")[0]
    named = set(re.findall(r"`(\w+)=", "\n".join(re.findall(r"^\| (.*?) \|", table, flags=re.MULTILINE))))
    assert named == set(inspect.signature(graphs.capture).parameters) - {"model"}


def test_every_variable_has_a_line() -> None:
    read = {
        name for path in (ROOT / "graphs").rglob("*.py") for name in re.findall(r"\"(GRAPHS_[A-Z_]*[A-Z])\"", path.read_text())
    }
    assert set(re.findall(r"`(GRAPHS_[A-Z_]+)`", capture_page())) == read


# numbers


def results(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / name).read_text())
    return found


def decode_rows(rows: int) -> tuple[dict[str, Any], dict[str, Any]]:
    found = [row for row in results("h200_bench.json")["rows"] if row["workload"] == "decode" and row["rows"] == rows]
    eager, graph = sorted(found, key=lambda row: str(row["mode"]))
    return eager, graph


def sides(name: str, bar: str) -> dict[str, float]:
    (found,) = [one for one in results(name)["bars"] if one["name"].startswith(bar)]
    return {side: spread["median"] for side, spread in found["sides"].items()} | {"measured": found["measured"]["median"]}


def test_the_numbers_of_the_readme_are_those_of_the_results() -> None:
    text = " ".join(README.read_text().split())
    eager, graph = decode_rows(1)
    rates = [row["tokens_per_second"]["median"] for row in (eager, graph)]
    gain = f"{rates[1] / rates[0]:.1f}x"
    assert f"| {rates[0]:,.0f} | {rates[1]:,.0f} ({gain}) | H200, `python -m graphs bench decode` |" in text
    large = [row["tokens_per_second"]["median"] for row in decode_rows(64)]
    assert f"gains {gain} at batch 1 and {large[1] / large[0]:.1f}x at batch 64" in text
    assert f"pays for {eager['launches']} launches" in text
    assert f"needs {eager['host_us']['median'] / 1e3:.1f} ms to submit" in text
    assert f"takes the device {eager['device_us']['median'] / 1e3:.1f} ms" in text
    assert f"one launch and takes {graph['device_us']['median'] / 1e3:.1f} ms" in text and graph["launches"] == 1
    assert f"took {graph['capture_seconds']:.1f} s" in text and f"after {graph['break_even_calls']} calls" in text
    experts = sides("h100_syncs.json", "eager original over captured, wall: loop over experts")
    measured = f"| {experts['eager']:,.0f} us | {experts['captured']:,.0f} us ({experts['measured']:.1f}x) | H100, "
    assert measured + "`python -m graphs bench syncs --quick` |" in text
    call = sides("h200_overhead.json", "captured call over bare replay, host")
    assert f"| {call['bare']:.1f} us | {call['captured']:.1f} us (+{call['measured']:.1f} us) | H200, " in text


def test_the_picture_is_drawn_from_stored_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    program = runpy.run_path(str(ROOT / "benchmarks" / "draw_amortisation.py"), run_name="draw_amortisation")
    program["main"](picture=tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")
    assert "136 calls" in capsys.readouterr().out
    assert (ROOT / "docs" / "amortisation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("rows", [1, 4, 16, 64])
def test_the_table_of_decode_steps_is_that_of_the_results(rows: int) -> None:
    eager, graph = decode_rows(rows)
    host = f"{eager['host_us']['median']:,.0f} / {graph['host_us']['median']:.1f}"
    device = f"{eager['device_us']['median']:,.0f} / {graph['device_us']['median']:,.0f}"
    rate = f"{eager['tokens_per_second']['median']:,.0f} / {graph['tokens_per_second']['median']:,.0f}"
    line = f"| batch {rows} | {host} | {device} | {rate} | {graph['break_even_calls']} calls |"
    assert line in (ROOT / "docs" / "measurements.md").read_text()


# what is shipped


def test_the_licence_is_apache_2() -> None:
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in licence
    assert "END OF TERMS AND CONDITIONS" in licence and 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.slow
def test_the_source_distribution_runs_its_own_tests(tmp_path: Path) -> None:
    setuptools = pytest.importorskip("setuptools", reason="setuptools is not installed")
    if int(setuptools.__version__.partition(".")[0]) < 77:
        pytest.skip("setuptools is older than what builds this project")
    copy = tmp_path / "copy"  # a build leaves files behind
    copy.mkdir()
    for path in ROOT.iterdir():
        if path.name in (*FOLDERS, ".ci"):
            shutil.copytree(path, copy / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.suffix in (".md", ".in", ".toml") or path.name in ("LICENSE", "Makefile"):
            shutil.copy(path, copy)
    build = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    archive = tmp_path / done.stdout.split()[-1]
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path / "unpacked", filter="data")
    (root,) = (tmp_path / "unpacked").iterdir()
    kept = [path for folder in FOLDERS for path in (copy / folder).rglob("*") if path.is_file()]
    assert [path for path in kept if not (root / path.relative_to(copy)).is_file()] == []
    pytest_there = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    for command in (["--collect-only", "tests/contract", "tests/test_documents.py"], ["tests/contract/test_padding.py"]):
        done = subprocess.run([*pytest_there, *command], cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
