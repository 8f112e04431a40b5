"""The aiter back end without a GPU: what it says about absent, foreign and changed packages, and the real one interpreted."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from graphs.errors import MissingDependency, WeightError
from graphs.ops import GroupedProjection
from graphs.ops.wo_a import aiter_backend, reference

SCRIPT = Path(__file__).with_name("interpret_aiter.py")
NAMES = {path: wanted.name for path, wanted in aiter_backend.FUNCTIONS.items()}
EXPLODES = "raise RuntimeError('hipconfig not found')\n"


def installed() -> str | None:
    try:
        return importlib.metadata.version("amd-aiter")
    except importlib.metadata.PackageNotFoundError:
        return None


REAL = installed()

Builder = Callable[[dict[str, str]], Path]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Builder]:
    """Writes files into a place that Python looks for packages in; any package installed as ``aiter`` is hidden."""
    elsewhere = [entry for entry in sys.path if not (Path(entry) / "aiter").exists()]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *elsewhere])
    for name in [name for name in sys.modules if name.partition(".")[0] == "aiter"]:
        monkeypatch.delitem(sys.modules, name)
    aiter_backend.function.cache_clear()

    def build(files: dict[str, str]) -> Path:
        for file, text in files.items():
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text(text)
        return tmp_path

    yield build
    aiter_backend.function.cache_clear()


def amd_package(modules: dict[str, str]) -> dict[str, str]:
    """Files of an amd-aiter 0.1.2 whose packages cannot be imported, with ``modules`` below ``aiter/ops/triton``."""
    files = {f"aiter/{package}__init__.py": EXPLODES for package in ("", "ops/", "ops/triton/")}
    files["amd_aiter-0.1.2.dist-info/METADATA"] = "Metadata-Version: 2.1\nName: amd-aiter\nVersion: 0.1.2\n"
    return files | {f"aiter/ops/triton/{module}": text for module, text in modules.items()}


def stub(path: str, drop: str = "") -> str:
    """A module with a function of the right name and parameters (but ``drop``) that says which one it is."""
    wanted = aiter_backend.FUNCTIONS[path]
    parameters = ", ".join(name for name in wanted.parameters.split() if name != drop)
    return f"from aiter.ops.triton import sibling\n\n\ndef {wanted.name}({parameters}):\n    return sibling.VALUE\n"


def test_an_absent_package_is_named_with_the_command_that_installs_it(site: Builder) -> None:
    with pytest.raises(MissingDependency, match=r"needs the package 'amd-aiter'.*pip install (--no-deps )?amd-aiter"):
        aiter_backend.function("bmm")
    assert "amd-aiter" in (aiter_backend.available() or "")
    assert aiter_backend.version() is None


@pytest.mark.parametrize("path", NAMES)
def test_a_projection_looks_for_its_function_when_it_is_built(site: Builder, path: str) -> None:
    data, scale = reference.quantise_blocks(torch.randn(2, 128, 128))
    with pytest.raises(MissingDependency, match="needs the package 'amd-aiter'"):
        GroupedProjection(data, scale, path=path, backend="aiter")
    site(amd_package({f"gemm/moved/{NAMES[path]}.py": ""}))
    if torch.version.hip is None:
        with pytest.raises(aiter_backend.UnusableAiter, match=r"0\.1\.7 has it in .*gemm/moved|gemm/moved.*0\.1\.7 has it in"):
            GroupedProjection(data, scale, path=path, backend="aiter")
    site(amd_package({f"{NAMES[path]}.py": stub(path), "sibling.py": "VALUE = 42\n"}))
    if torch.version.hip is None:
        module = GroupedProjection(data, scale, path=path, backend="aiter")
        assert module.paths == (path,) and f"path={path!r}, backend='aiter', holding {path} 0.0328 MB" in repr(module)


@pytest.mark.parametrize("files", [{"aiter/__init__.py": EXPLODES, "aiter/join_aiters.py": ""}, {"aiter.py": EXPLODES}])
def test_the_unrelated_package_of_that_name_is_refused_and_never_run(site: Builder, files: dict[str, str]) -> None:
    site(files)
    with pytest.raises(aiter_backend.UnusableAiter, match=r"not AMD's.*unrelated.*pip uninstall aiter; pip install"):
        aiter_backend.function("gloop")
    assert "unrelated" in (aiter_backend.available() or "")


def test_both_packages_in_one_folder_are_refused(site: Builder) -> None:
    site(amd_package({f"{NAMES['bmm']}.py": stub("bmm")}) | {"aiter/join_aiters.py": ""})
    with pytest.raises(aiter_backend.UnusableAiter, match="overwrite each other"):
        aiter_backend.function("bmm")


@pytest.mark.parametrize("folders", [{"bmm": "", "gloop": ""}, {"bmm": "gemm/batched/", "gloop": "gemm/basic/"}])
@pytest.mark.skipif(torch.version.hip is not None, reason="on ROCm the package is imported as usual")
def test_either_place_is_found_and_leaves_no_module_behind(site: Builder, folders: dict[str, str]) -> None:
    modules = {f"{folders[path]}{NAMES[path]}.py": stub(path) for path in NAMES}
    site(amd_package(modules | {"sibling.py": "VALUE = 42\n"}))
    before = dict(sys.modules)
    assert aiter_backend.available() is None
    assert aiter_backend.version() == "0.1.2"
    for path, name in NAMES.items():
        function = aiter_backend.function(path)
        assert function.__name__ == name
        assert function(*"XXXXXXXXX"[: function.__code__.co_argcount]) == 42
    assert {name for name in sys.modules if name.partition(".")[0] == "aiter"} == set()
    assert before.items() <= sys.modules.items()
    with pytest.raises(RuntimeError, match="hipconfig"):
        import aiter  # noqa: F401


def test_the_bare_package_gives_back_what_was_there(site: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    root = site(amd_package({"sibling.py": "VALUE = 42\n"})) / "aiter"
    there = {"aiter": ModuleType("aiter"), "aiter.thing": ModuleType("aiter.thing")}
    for name, module in there.items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(ValueError, match="inside"), aiter_backend.bare_package(root):
        import aiter.ops.triton.sibling

        assert aiter.ops.triton.sibling.VALUE == 42
        assert "aiter.thing" not in sys.modules
        raise ValueError("inside")
    assert {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "aiter"} == there


GLOOP = NAMES["gloop"]
BROKEN = {
    "missing": ({"other.py": ""}, "is not where a known release has it"),
    "moved": ({f"gemm/special/{GLOOP}.py": ""}, rf"there is a ops/triton/gemm/special/{GLOOP}\.py"),
    "renamed": ({f"{GLOOP}.py": "def other(): ...\n"}, rf"is not in aiter\.ops\.triton\.{GLOOP}"),
    "changed": ({f"gemm/basic/{GLOOP}.py": stub("gloop", "w_scale"), "sibling.py": ""}, "does not take w_scale"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.skipif(torch.version.hip is not None, reason="on ROCm the package's own __init__ runs first")
def test_a_function_that_is_not_there_names_the_version_and_those_that_have_it(site: Builder, case: str) -> None:
    modules, says = BROKEN[case]
    site(amd_package(modules))
    with pytest.raises(aiter_backend.UnusableAiter, match=says) as raised:
        aiter_backend.function("gloop")
    message = str(raised.value)
    assert "in amd-aiter 0.1.2" in message and "Release 0.1.7 has it in" in message and "--upgrade" in message
    assert f"aiter/ops/triton/{GLOOP}.py" in message and f"aiter/ops/triton/gemm/basic/{GLOOP}.py" in message


def test_an_import_that_fails_is_quoted(site: Builder) -> None:
    site(amd_package({f"{GLOOP}.py": "import no_such_module\n"}))
    with pytest.raises(aiter_backend.UnusableAiter, match=r"amd-aiter 0\.1\.2 cannot be imported: (Module|Runtime)"):
        aiter_backend.function("gloop")


def test_options_of_amd_never_reach_a_launch() -> None:
    options = aiter_backend.LaunchOptions({"BLOCK_SIZE_M": 16, "waves_per_eu": 2, "matrix_instr_nonkdim": 16, "kpack": 2})
    options["kpack"] = 1
    options["SPLITK_BLOCK_SIZE"] = 128
    assert dict(**options) == {"BLOCK_SIZE_M": 16, "SPLITK_BLOCK_SIZE": 128}


def test_few_tilings_per_operator_because_each_is_compiled_once() -> None:
    shapes = [
        (m, g, n, k)
        for m in (1, 16, 17, 64, 65, 512, 513, 4096)
        for g, n in ((1, 128), (2, 1024), (16, 1024))
        for k in (128, 4096)
    ]
    for path in NAMES:
        configs = [aiter_backend.default_config(path, *shape) for shape in shapes]
        assert len({(config["BLOCK_SIZE_M"], config["BLOCK_SIZE_N"], config["num_warps"]) for config in configs}) <= 5
        assert all(
            config["BLOCK_SIZE_K"] == 128 and config["num_stages"] <= k // 128
            for config, (*_, k) in zip(configs, shapes, strict=True)
        )


def operands(path: str, m: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    quantise = reference.quantise_single if path == "bmm" else reference.quantise_blocks
    return torch.ones(m, 2, 256).bfloat16(), *quantise(torch.ones(2, 128, 256))


@pytest.mark.parametrize("path", NAMES)
def test_operands_are_checked_before_the_package_is_looked_for(path: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed, so nothing says that it is not interpreting")
    o, weight, scale = operands(path)
    with pytest.raises(WeightError, match="o has shape"):
        getattr(aiter_backend, path)(o[:, :1], weight, scale)
    with pytest.raises(WeightError, match=rf"wo_a_aiter_{path}: o is on cpu; it must be on a GPU"):
        getattr(aiter_backend, path)(o, weight, scale)


@pytest.mark.parametrize("path", NAMES)
def test_one_operator_with_a_fake(path: str) -> None:
    o, weight, scale = operands(path)
    with FakeTensorMode() as mode:
        y = getattr(torch.ops.graphs, f"wo_a_aiter_{path}")(*(mode.from_tensor(t) for t in (o, weight, scale)))
    assert y.shape == (3, 2, 128) and y.dtype == torch.bfloat16 and y.is_contiguous()


@pytest.fixture(scope="module")
def interpreted() -> dict:
    if REAL is None:
        pytest.skip(f"amd-aiter is not installed ({aiter_backend.INSTALL}), so its operators cannot be interpreted")
    python_path = os.pathsep.join(filter(None, (str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, SCRIPT], check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_real_package_has_both_functions_and_leaves_no_module_behind(interpreted: dict) -> None:
    assert interpreted["available"] is None
    assert interpreted["left"] == []


@pytest.mark.parametrize("path", NAMES)
@pytest.mark.parametrize("case", ["1", "5", "17", "config"])
def test_the_real_operators_agree_with_the_reference(interpreted: dict, path: str, case: str) -> None:
    assert interpreted[f"{path}-{case}"]["shaped"]
    assert interpreted[f"{path}-{case}"]["error"] < 0.006


@pytest.mark.parametrize("path", NAMES)
def test_a_projection_runs_the_real_operator(interpreted: dict, path: str) -> None:
    assert interpreted[f"{path}-module"] == {"same": True, "turned": True}


def test_split_k_and_no_rows(interpreted: dict) -> None:
    assert interpreted["gloop-ksplit"]["error"] < 0.006
    assert interpreted["bmm-empty"] == interpreted["gloop-empty"] == [0, 2, 128]
