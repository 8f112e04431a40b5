"""Who may import whom, read from the source, and what importing the package brings along."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = {"triton", "aiter", "torch_mlir", "transformers", "matplotlib"}


def modules(*packages: str) -> dict[str, Path]:
    """Dotted names and files of the modules in ``packages``."""
    found = {}
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it; names taken from a package count as its modules too."""
    return {name for node in ast.walk(ast.parse(path.read_text())) for name in _imported(node)}


def _imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"a relative import in line {node.lineno}"
        yield str(node.module)
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


MAIN_PATH = ["graphs.recordings", "graphs.capture"]
TRIAL = ["graphs.trial", "graphs.probe", "graphs.watch", "graphs.verify", "graphs.judge"]
AUDIT = ["graphs.audit", "graphs.findings"]
ABOVE = [*MAIN_PATH, *AUDIT, "graphs.parity", "graphs.bench", "graphs.cli"]
RULES = ["passes.addressing", "passes.arithmetic", "passes.bounded", "passes.branches"]
REWRITING = ["passes.rewriter", "passes.aliases", "passes.scalars", "passes.bounds", "passes.host_values", *RULES]
PASSES = [name for name in modules("passes") if name not in ("passes", "passes.composites")]  # which every dispatch mode shares
FORBIDDEN = {
    "graphs.errors": ["graphs", "passes", "torch"],
    "graphs.report": ["graphs", "passes", "torch"],
    "graphs.modes": ["graphs", "passes"],
    "graphs.contract": ["graphs.record", "graphs.ops", "graphs.config", "passes", *TRIAL, *ABOVE],
    "graphs.record": ["graphs.ledger", "graphs.ops", "graphs.config", *PASSES, *TRIAL, *ABOVE],
    "graphs.ops": ["graphs.record", "graphs.contract", *PASSES, *TRIAL, *ABOVE],
    "graphs.watch": ["graphs.trial", "graphs.record", *ABOVE],
    "graphs.verify": ["graphs.trial", "graphs.record", *ABOVE],
    "graphs.judge": ["graphs.trial", "graphs.probe", "graphs.entry", "graphs.record", "passes", *ABOVE],
    "graphs.high_precision": ["graphs.judge", "graphs.verify", "graphs.trial", "graphs.record", "passes", *ABOVE],
    "graphs.precise_operators": ["graphs"],
    "graphs.ties": ["graphs"],
    "graphs.trial": ["graphs.config", "graphs.ledger", "graphs.record.cuda", "graphs.record.tape", *ABOVE],
    "graphs.parity": ["graphs.bench", "graphs.cli", "graphs.record", "graphs.trial"],
    "graphs.parity.report": ["graphs.contract", "graphs.errors", "torch"],
    "graphs.recordings": [
        "graphs.capture",
        "graphs.parity",
        "graphs.bench",
        "graphs.cli",
        "graphs.record.cuda",
        "graphs.record.tape",
    ],
    "graphs.audit": [*MAIN_PATH, "graphs.config", "graphs.bench", "graphs.cli"],
    "graphs.findings": [*MAIN_PATH, "graphs.audit", "graphs.config", "graphs.bench", "graphs.cli"],
    "graphs.findings.report": ["graphs.watch", "graphs.contract", "torch"],
    "graphs.findings.cures": ["graphs", "passes", "torch"],
    "graphs.capture": ["graphs.bench", "graphs.cli"],
    "graphs.compiled_graph": ["graphs.trial", "graphs.record", *ABOVE],
    "graphs.compiler": ["graphs.trial", "graphs.record", "graphs.config", *ABOVE],
    "graphs.piece": ["graphs.trial", "graphs.config", "graphs.record.cuda", "graphs.record.tape", *ABOVE],
    "graphs.backend": ["graphs.trial", "graphs.record.cuda", "graphs.record.tape", *ABOVE],
    "graphs.explain": ["graphs.cli"],
    "graphs.operator_check": ["graphs.trial", "graphs.config", "graphs.record.cuda", "graphs.record.tape", *ABOVE],
    "graphs.register": ["graphs.trial", "graphs.config", "graphs.record", *ABOVE],
    "graphs.route": ["graphs.record", "graphs.contract", *TRIAL, *ABOVE],
    "graphs.rewriting": ["graphs.trial", "graphs.config", "graphs.record.cuda", "graphs.record.tape", *ABOVE],
    "graphs.entry": ["graphs.trial", "graphs.config", "graphs.record.cuda", "graphs.record.tape", *ABOVE],
    "passes": ["graphs"],
    "passes.composites": ["passes"],
    "passes.errors": ["passes", "torch"],
    "passes.sites": ["passes", "torch"],
    "passes.symbols": ["passes"],
    "passes.builtins": ["passes.tracing", *REWRITING],
    "passes.python_entry": ["passes.tracing", *REWRITING],
    "passes.facts": ["passes.tracing", "passes.following", *REWRITING],
    "passes.following": ["passes.tracing", *REWRITING],
    "passes.tracing": REWRITING,
    "passes.rewriter": ["passes.host_values", *RULES],
    "passes.scalars": ["passes.tracing", "passes.host_values", *RULES],
    "passes.aliases": ["passes.tracing", "passes.host_values", *RULES],
    "passes.bounds": ["passes.rewriter", "passes.host_values", *RULES],
    "passes.addressing": ["passes.host_values", "passes.arithmetic", "passes.bounded", "passes.branches"],
    "passes.arithmetic": ["passes.host_values", "passes.addressing", "passes.bounded", "passes.branches"],
    "passes.bounded": ["passes.host_values", "passes.branches"],
    "passes.branches": ["passes.host_values", "passes.addressing", "passes.arithmetic", "passes.bounded"],
}


def test_the_rules_name_what_exists() -> None:
    names = set(modules("graphs", "passes"))
    assert set(FORBIDDEN) <= names
    assert {rule for rules in FORBIDDEN.values() for rule in rules} - {"torch"} <= names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_package_imports_nothing_above_it(package: str) -> None:
    found = [
        f"{name} imports {imported}"
        for name, path in modules("graphs", "passes").items()
        if within(name, package)
        for imported in imports(path)
        for forbidden in FORBIDDEN[package]
        if within(imported, forbidden)
    ]
    assert found == []


def test_only_the_configuration_reads_settings_from_the_environment() -> None:
    readers = {
        name
        for name, path in modules("graphs", "passes").items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Attribute, ast.Name))
        and (getattr(node, "attr", "") or getattr(node, "id", "")) in ("environ", "getenv")
    }
    guards = {"graphs.contract.code_reads", "graphs.contract.guard_walk"}  # of what a user's step reads
    assert readers == {"graphs.config", *guards}


@pytest.mark.parametrize("package", sorted(OPTIONAL))
def test_optional_packages_are_imported_where_they_are_needed_only(package: str) -> None:
    allowed = {
        "triton": {
            "graphs.bench.wo_a.read_floor",
            "graphs.ops.hopper",
            "graphs.ops.warpgroup",
            "graphs.ops.kernels",
            "graphs.ops.offline",
            "graphs.ops.skinny_kernel",
            "graphs.ops.split_k",
            "graphs.record.copies",
            "graphs.record.run_word",
        },
        "aiter": {"graphs.ops.aiter_backend"},
        "torch_mlir": {"passes.mlir.bindings"},
        "transformers": {"graphs.bench.decode.llama"},
        "matplotlib": {"graphs.bench.decode.plot", "graphs.bench.wo_a.plot"},
    }
    found = {
        name for name, path in modules("graphs", "passes").items() if any(within(imported, package) for imported in imports(path))
    }
    assert found <= allowed[package]


def test_importing_the_package_is_light_and_touches_no_device() -> None:
    script = (
        "import sys, torch; before = set(sys.modules); import graphs, passes;"
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before}));"
        "print(torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    new, initialised = done.stdout.splitlines()
    assert "graphs" in ast.literal_eval(new)
    assert not OPTIONAL & set(ast.literal_eval(new))
    assert initialised == "False"
