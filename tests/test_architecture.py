"""Who may import whom, read from the source, and what importing the package brings along."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
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


FLOORS = {
    "graphs": [
        ("_version", "errors", "report", "eager_mode"),
        ("environment", "factory", "objects"),
        ("events",),
        ("python_reads",),
        ("state",),
        ("contract",),
        ("guards", "numerics", "ops"),
        ("compiler_options",),
        ("config",),
        ("observation",),
        ("recording",),
        ("rehearsal",),
        ("rewriting",),
        ("compile",),
        ("first_call",),
        ("pointing",),
        ("auditing", "custom_ops"),
        ("dispatch",),
        ("dynamo", "generation", "parity"),
        ("__init__",),
        ("explain",),
        ("bench",),
        ("cli",),
        ("__main__",),
    ],
    "passes": [
        ("errors", "forked_process"),
        ("core",),
        ("control_flow",),
        ("host_values",),
        ("mlir", "optimize", "projections", "speculation"),
        ("rewritten_graph",),
        ("pipeline", "remove_host_values"),
        ("rewrite",),
        ("tracing",),
        ("trace_step",),
        ("__init__",),
    ],
}
"""From the ground up. A file imports from its own folder, or from a lower floor."""
INDEPENDENT = {
    "graphs.report": ("torch",),
    "graphs.errors": ("torch",),
    "passes.errors": ("torch",),
    "passes.core.source_location": ("torch",),
}
"""What these may not import besides."""


def place(name: str) -> tuple[str, int, str]:
    """Package, floor and folder of a module."""
    package, _, rest = name.partition(".")
    folder = rest.partition(".")[0] or "__init__"
    return package, next(number for number, floor in enumerate(FLOORS[package]) if folder in floor), folder


def arrows() -> dict[str, set[str]]:
    """What each module imports of both packages, anywhere in its file."""
    files = modules("graphs", "passes")
    return {name: {found for found in imports(path) if found in files} - {name} for name, path in files.items()}


def test_every_folder_has_a_floor_and_every_floor_exists() -> None:
    folders = {place(name)[::2] for name in modules("graphs", "passes")}
    assert folders == {(package, folder) for package, floors in FLOORS.items() for floor in floors for folder in floor}


def test_no_file_imports_upward() -> None:
    found = []
    for name, targets in arrows().items():
        package, floor, folder = place(name)
        for target in targets:
            other, above, beside = place(target)
            if other == package and beside != folder and above >= floor:
                found.append(f"{name} imports {target}")
    assert found == []


def test_passes_never_names_graphs() -> None:
    found = [
        f"{name}: {target}"
        for name, targets in arrows().items()
        for target in targets
        if within(name, "passes") and within(target, "graphs")
    ]
    assert found == []


def test_no_imports_go_round_in_a_circle() -> None:
    left = arrows()
    while True:
        done = {name for name, targets in left.items() if not targets & left.keys()}
        if not done:
            break
        left = {name: targets for name, targets in left.items() if name not in done}
    assert sorted(left) == []


def test_no_folder_holds_more_than_twelve_files() -> None:
    counts = Counter(path.parent.relative_to(ROOT).as_posix() for path in modules("graphs", "passes").values())
    assert {folder: count for folder, count in counts.items() if count > 12} == {}


@pytest.mark.parametrize("name", INDEPENDENT)
def test_a_module_can_be_imported_alone(name: str) -> None:
    assert not any(within(found, other) for found in imports(modules("graphs", "passes")[name]) for other in INDEPENDENT[name])


def test_only_one_module_reads_settings_from_the_environment() -> None:
    readers = {
        name
        for name, path in modules("graphs", "passes").items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Attribute, ast.Name))
        and (getattr(node, "attr", "") or getattr(node, "id", "")) in ("environ", "getenv")
    }
    guards = {"graphs.python_reads.code_reads", "graphs.guards.namespace_guards"}  # of what a user's step reads
    assert readers == {"graphs.environment", *guards}


@functools.cache
def trees() -> dict[str, ast.Module]:
    """The source of every module, parsed."""
    return {name: ast.parse(path.read_text()) for name, path in modules("graphs", "passes").items()}


def holding(found: Callable[[ast.AST], bool]) -> set[str]:
    """The modules that hold a node of this kind."""
    return {name for name, tree in trees().items() if any(map(found, ast.walk(tree)))}


def using(*names: str) -> set[str]:
    """The modules that read an attribute, a variable or an import of one of these names."""
    kinds = {ast.Attribute: "attr", ast.Name: "id", ast.alias: "name"}
    return holding(lambda node: getattr(node, kinds.get(type(node), ""), None) in names)


def test_state_is_put_back_in_one_place() -> None:
    """Runs of a step are undone by `Runs`, out of the parts that ``state`` saved."""
    others = {
        "graphs.observation.eager_trace",  # below: what one run wrote beyond what the caller saved
        "graphs.dispatch.replay",  # a replay in which an operator raised
        "graphs.rewriting.checked_replay",  # a replay whose assumptions do not hold
        "passes.tracing.trace",  # what it is given by who has it traced
    }
    found = using("restore", "restore_python") - {"graphs", "graphs.generation.accelerate"}  # a model's own methods
    assert {name for name in found if not within(name, "graphs.state") and not within(name, "graphs.rehearsal")} == others


def test_what_an_operator_writes_is_told_in_one_place() -> None:
    def by_name(node: ast.AST) -> bool:
        return isinstance(node, ast.Call) and ast.unparse(node).endswith(".endswith('_')")

    def by_schema(node: ast.AST) -> bool:
        return isinstance(node, ast.Attribute) and node.attr in ("alias_info", "is_write", "is_mutable")

    assert holding(lambda node: by_name(node) or by_schema(node)) == {"passes.core.schema"}


def test_the_users_line_is_found_in_one_place() -> None:
    walks = ("f_back", "tb_next", "tb_frame", "walk_tb", "walk_stack", "extract_tb", "extract_stack", "currentframe")
    others = {
        "graphs.observation.conversions",  # the frame below which torch hands a call over
        "graphs.observation.grad_questions",  # who makes the context manager that sets the grad mode
        "graphs.python_reads.code_reads",  # who logs, where a handler acts for it
        "graphs.rewriting.forbidding",  # who calls a function that sets something for good
        "passes.core.modes.patched_functions",  # which function of torch's hands itself over
        "passes.control_flow.python_changes",  # the frames of the step, whose variables are compared
        "passes.control_flow.stopping",  # the frames of the step, which are unwound
    }
    assert using(*walks) == {"passes.core.source_location", *others}
    assert using("f_lineno", "tb_lineno") == {"passes.core.source_location"}


def test_whose_code_a_file_is_is_told_in_one_place() -> None:
    folders = re.compile(r"(site|dist)-packages|.*(site|dist)-packages/.*|(plat)?stdlib|\.dist[-_]info")

    def names_one(node: ast.AST) -> bool:
        return isinstance(node, ast.Constant) and isinstance(node.value, str) and folders.fullmatch(node.value) is not None

    modules_of_python = using("sysconfig", "builtin_module_names", "stdlib_module_names")
    assert holding(names_one) | modules_of_python == {"graphs.objects.libraries"}


@pytest.mark.parametrize("package", sorted(OPTIONAL))
def test_optional_packages_are_imported_where_they_are_needed_only(package: str) -> None:
    allowed = {
        "triton": {
            "graphs.bench.wo_a.read_floor",
            "graphs.ops.wo_a.kernels.hopper",
            "graphs.ops.wo_a.kernels.warpgroup",
            "graphs.ops.wo_a.kernels.portable",
            "graphs.ops.offline",
            "graphs.ops.attention.kernel",
            "graphs.ops.experts.kernel",
            "graphs.ops.mhc.kernel",
            "graphs.ops.skinny.around_kernel",
            "graphs.ops.skinny.kernel",
            "graphs.ops.wo_a.kernels.split_k",
            "graphs.recording.copy_kernels",
            "graphs.recording.run_word",
        },
        "aiter": {"graphs.ops.wo_a.aiter_backend"},
        "torch_mlir": {"passes.mlir.bindings"},
        "transformers": {
            "graphs.bench.decode.llama",
            "graphs.generation.caches.compressed_cache",
            "graphs.generation.caches.end_cache",
            "graphs.generation.caches.linear_cache",
            "graphs.generation.caches.own_caches",
        },
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
