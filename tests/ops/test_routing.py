"""The routing table of ``wo_a``: operators, tensors, and what is prepared again."""

from __future__ import annotations

import gc

import pytest
import torch

import passes
from graphs.errors import ConfigError, WeightError
from graphs.ops import path_bytes
from graphs.ops.wo_a import reference
from graphs.ops.wo_a.routes import wo_a_routes

G, N, K = 2, 128, 256
OPERATORS = {path: getattr(torch.ops.graphs, f"wo_a_{path}").default for path in ("einsum", "bmm", "gloop", "fused")}


def weight(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(G, N, K, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("path", OPERATORS)
def test_the_target_computes_what_the_path_promises(path: str) -> None:
    target = wo_a_routes(path)(weight(), "w", None)
    assert target is not None and target.operator is OPERATORS[path]
    assert sum(tensor.nbytes for tensor in target.tensors) == path_bytes(G, N, K)[path]
    o = torch.randn(3, G, K).bfloat16()
    error = reference.relative_error(target.operator(o, *target.tensors, *target.constants), reference.project_fp64(o, weight()))
    assert error < (0.003 if path == "einsum" else 0.05)


def test_auto_quantises_nothing() -> None:
    target = wo_a_routes("auto")(weight(), "w", 4)
    assert target is not None and target.operator is OPERATORS["einsum"] and target.tensors[0].dtype == torch.bfloat16


def test_the_weight_is_not_copied_where_the_path_wants_it_as_it_is() -> None:
    original = weight()
    target = wo_a_routes("einsum")(original, "w", None)
    assert target is not None and target.tensors[0].data_ptr() == original.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_take_einsum_only(dtype: torch.dtype) -> None:
    for path in ("einsum", "auto"):
        target = wo_a_routes(path)(weight(dtype), "w", None)
        assert target is not None and target.operator is OPERATORS["einsum"] and target.tensors[0].dtype == dtype
    with pytest.raises(WeightError, match=r"layer\.w is .*model\.bfloat16\(\)"):
        wo_a_routes("fused")(weight(dtype), "layer.w", None)


def test_one_memory_is_prepared_once_while_it_is_held_and_unchanged() -> None:
    table, original = wo_a_routes("gloop"), weight()
    first = table(original, "a", None)
    again = table(original.view(-1).view(G, N, K), "b", None)
    assert first is not None and again is not None and all(a is b for a, b in zip(first.tensors, again.tensors, strict=True))
    original.mul_(2)
    changed = table(original, "a", None)
    assert changed is not None and changed.tensors[0] is not first.tensors[0]
    kept = [id(tensor) for tensor in changed.tensors]
    del changed
    gc.collect()
    assert len(kept) == 2 and table(original, "a", None) is not None


def test_only_the_weights_that_are_named() -> None:
    table = wo_a_routes("einsum", only=("*.o_a_proj.weight", "wo_a"))
    assert table(weight(), "layers.3.o_a_proj.weight", None) is not None and table(weight(), "wo_a", None) is not None
    assert table(weight(), "layers.3.experts.weight", None) is None


def test_a_wrong_path_names_the_legal_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="'einsum', 'bmm', 'gloop', 'fused', 'auto'"):
        wo_a_routes("cutlass")
    monkeypatch.setenv("GRAPHS_WO_A", "bmm")
    assert wo_a_routes().path == "bmm"


def test_it_is_a_table_of_the_pass() -> None:
    table: passes.Routes = wo_a_routes("einsum")
    assert table(weight(), "w", None) is not None
