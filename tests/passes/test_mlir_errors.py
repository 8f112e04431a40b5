"""What cannot be lowered, and what is missing: named with the operator, the line, a way to see it again and the remedy."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import passes
from passes.errors import LoweringError, MissingDependency, OptionError
from passes.mlir import DIALECTS, reproduce
from passes.mlir.bindings import bindings

ROOT = Path(__file__).resolve().parents[2]
needs_torch_mlir = pytest.mark.usefixtures("torch_mlir")


@torch.library.custom_op("mlir_tests::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    return x * 2


@double.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.fixture(autouse=True)
def _files_that_reproduce(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def torch_mlir() -> None:
    pytest.importorskip("torch_mlir", reason="torch-mlir is not installed")


@pytest.fixture
def fresh_bindings() -> Iterator[None]:
    bindings.cache_clear()
    yield
    bindings.cache_clear()


def test_an_unknown_dialect_lists_the_legal_ones() -> None:
    with pytest.raises(OptionError) as raised:
        passes.to_mlir(torch.neg, torch.ones(2), dialect="llvm")
    assert "'llvm'" in str(raised.value) and all(repr(name) in str(raised.value) for name in DIALECTS)


def test_torch_mlir_absent(monkeypatch: pytest.MonkeyPatch, fresh_bindings: None) -> None:
    monkeypatch.setitem(sys.modules, "torch_mlir", None)
    with pytest.raises(MissingDependency, match=r"pip install --upgrade torch-mlir$"):
        passes.to_mlir(torch.neg, torch.ones(2))


@needs_torch_mlir
def test_torch_mlir_of_a_version_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, fresh_bindings: None) -> None:
    monkeypatch.delattr("torch_mlir.extras.fx_importer.FxImporter")
    with pytest.raises(MissingDependency, match="pip install") as raised:
        passes.run_mlir(torch.neg, torch.ones(2))
    assert "version " in str(raised.value) and "FxImporter" in str(raised.value) and torch.__version__ in str(raised.value)


def eigenvalues(x: Tensor) -> Tensor:
    return torch.linalg.eigvals(x)  # here


@needs_torch_mlir
@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_operator_without_a_lowering(dialect: str) -> None:
    with pytest.raises(LoweringError) as raised:
        passes.to_mlir(lambda x: eigenvalues(x + 1), torch.ones(3, 3), dialect=dialect)
    error = raised.value
    assert error.operator == "aten.linalg_eig" and error.site.source.endswith("# here") and error.site.file == __file__
    assert f"{__file__}:{error.site.line}" in str(error) and "Remedy: " in str(error)
    python, *command = error.reproduce.split()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert python == "python" and done.returncode == 1
    assert "failed to legalize" in done.stderr and "aten.linalg_eig" in done.stderr and Path(__file__).name in done.stderr


@needs_torch_mlir
def test_an_operator_that_nobody_decomposed() -> None:
    def step(x: Tensor) -> Tensor:
        return double(x + 1)  # here

    x = torch.ones(2)
    with pytest.raises(LoweringError) as raised:
        passes.to_mlir(step, x)
    assert raised.value.operator == "mlir_tests.double.default" and raised.value.site.source.endswith("# here")
    assert "register_decompositions({torch.ops.mlir_tests.double.default:" in str(raised.value)
    table = {torch.ops.mlir_tests.double.default: lambda x: x * 2}
    assert torch.equal(passes.run_mlir(step, x, decompositions=table), step(x))


@needs_torch_mlir
def test_a_branch_on_data() -> None:
    def step(x: Tensor) -> Tensor:
        if x.sum() > 0:  # here
            return x
        return x + 1

    with pytest.raises(LoweringError, match=r"torch\.where") as raised:
        passes.to_mlir(step, torch.ones(2))
    assert raised.value.site.source.endswith("# here") and "torch.export.export" in raised.value.reproduce


@needs_torch_mlir
def test_an_error_of_the_model_itself() -> None:
    def step(x: Tensor) -> Tensor:
        return x @ x  # here

    with pytest.raises(LoweringError, match="see that the call runs eagerly") as raised:
        passes.to_mlir(step, torch.ones(2, 3))
    assert raised.value.site.source.endswith("# here") and raised.value.operator.startswith("aten.")


@needs_torch_mlir
def test_what_cannot_be_traced_or_compiled() -> None:
    with pytest.raises(OptionError, match=r"nn\.Module"):
        passes.to_mlir(3, torch.ones(2))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="dialect='linalg'"):
        passes.compile_mlir(passes.to_mlir(torch.neg, torch.ones(2), dialect="torch"))


@pytest.mark.parametrize("table", [{torch.ops.aten.mm: torch.mm}, {torch.ops.aten.mm.default: "mm"}])
def test_tables_of_decompositions_are_checked(table: dict) -> None:
    with pytest.raises(OptionError, match="must be"):
        passes.register_decompositions(table)


def test_a_file_that_reproduces_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.mlir").write_text("module {}\n")
    assert reproduce.main([str(tmp_path / "empty.mlir")]) == 2
    assert reproduce.main([str(tmp_path / "absent.mlir")]) == 2
    assert reproduce.main([]) == 2
    assert "// pipeline: " in capsys.readouterr().err


@needs_torch_mlir
def test_a_file_that_goes_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "fine.mlir").write_text("// pipeline: builtin.module(canonicalize)\nmodule {}\n")
    assert reproduce.main([str(tmp_path / "fine.mlir")]) == 0
    assert "module" in capsys.readouterr().out
