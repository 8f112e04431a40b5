"""Grouped products: traced in every dtype, and rewritten where a GPU's kernel would have the host read the offsets."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

import passes
from passes.host_values.rules import grouped_products
from passes.tracing.fake_kernels import StepFakes
from tests.passes.steps import printed, rewritten

ROWS, GROUPS, K, N = 6, 4, 8, 16


def step(x: Tensor, w: Tensor, offs: Tensor, t: Tensor) -> Tensor:
    return torch._grouped_mm(x, w, offs) * t.item()


def inputs(groups: int = GROUPS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ends = torch.randint(0, ROWS + 1, (groups - 1,)).sort().values
    offs = torch.cat([ends, torch.tensor([ROWS])]).int()
    return torch.randn(ROWS, K, dtype=dtype), torch.randn(groups, K, N, dtype=dtype), offs, torch.tensor(3)


@pytest.fixture
def host_reads_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU in float32."""
    for module in (grouped_products, sys.modules["passes.remove_host_values"]):  # the package gives the name to the function
        monkeypatch.setattr(module, "needs_offsets", lambda node: True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu_the_operator_stays_in_any_dtype(dtype: torch.dtype) -> None:
    graph = rewritten(step, *inputs(dtype=dtype))
    assert "_grouped_mm" in printed(graph.module)
    arguments = inputs(dtype=dtype)
    assert torch.equal(graph(*arguments)[0][0], step(*arguments))


@pytest.mark.usefixtures("host_reads_offsets")
@pytest.mark.parametrize("groups", [4, 3 * ROWS])
def test_rows_meet_the_matrix_of_their_group_whatever_the_offsets(groups: int) -> None:
    graph = rewritten(step, *inputs(groups))
    text = printed(graph.module)
    assert "_grouped_mm" not in text and ("index_select" in text) == (groups > GROUPS)
    for seed in range(12):
        torch.manual_seed(seed)
        arguments = inputs(groups)
        torch.testing.assert_close(graph(*arguments)[0][0], step(*arguments))


@pytest.mark.usefixtures("host_reads_offsets")
def test_groups_of_columns_are_refused_by_name() -> None:
    def columns(x: Tensor, w: Tensor, offs: Tensor, t: Tensor) -> Tensor:
        return torch._grouped_mm(w, x, offs) * t.item()

    w = torch.randn(GROUPS, 4, K)
    x, _, offs, t = torch.randn(K, 8), None, torch.tensor([2, 4, 4, 8], dtype=torch.int32), torch.tensor(2)
    with pytest.raises(passes.Unremovable, match="groups of columns"):
        rewritten(columns, x, w, offs, t)


@pytest.mark.parametrize("width", [8, 10])
def test_the_fake_result_is_laid_out_as_the_real_one(width: int) -> None:
    offs = torch.tensor([2, 2, 5, 6], dtype=torch.int32)
    forms = [
        (torch.randn(ROWS, K), torch.randn(GROUPS, width, K).mT, offs),
        (torch.randn(GROUPS, 4, K), torch.randn(GROUPS, width, K).mT, None),
        (torch.randn(GROUPS, 4, K), torch.randn(8, K).t(), torch.tensor([2, 2, 5, 8], dtype=torch.int32)),
        (torch.randn(8, 4).t(), torch.randn(8, 8), torch.tensor([2, 2, 5, 8], dtype=torch.int32)),
    ]
    for a, b, offsets in forms:
        real = torch._grouped_mm(a, b, offsets)
        mode = StepFakes(allow_non_fake_inputs=True)
        with mode:
            fake = torch.ops.aten._grouped_mm.default(a, b, offsets)
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
