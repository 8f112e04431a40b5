"""The grouped linear of transformers' DeepSeek-V4, routed, on a device: outputs, launches and bytes of each path."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

import graphs
from graphs.observation.launches import count_launches
from graphs.ops import path_bytes
from graphs.ops.wo_a import reference

G, N, K = 2, 1024, 4096
TOLERANCE = {"einsum": 0.003, "bmm": 0.05, "gloop": 0.05, "fused": 0.05}  # a bfloat16 weight is quantised, einsum's is not
LAUNCHES = {"einsum": 1, "bmm": 1, "gloop": 1 + G, "fused": 1}

modeling = pytest.importorskip(
    "transformers.models.deepseek_v4.modeling_deepseek_v4", reason="transformers with DeepSeek-V4 is not installed"
)


@pytest.mark.parametrize("path", TOLERANCE)
def test_outputs_launches_and_bytes(path: str, device: torch.device) -> None:
    torch.manual_seed(0)
    module = modeling.DeepseekV4GroupedLinear(K, G * N, G).to(device, torch.bfloat16)
    exact = module.weight.detach().view(G, N, K).double()
    inputs = [torch.randn(1, m, G, K, device=device).bfloat16() for m in (4, 1, 64)]
    warm = graphs.route(copy.deepcopy(module), (inputs[0],), path=path).model
    for o in inputs:  # libraries take their workspaces at first, for each shape
        warm(o)
        torch.einsum("bsgk,gnk->bsgn", o.double(), exact)
    del warm
    gc.collect()
    allocated = torch.cuda.memory_allocated(device)
    routed = graphs.route(module, (inputs[0],), path=path)
    (change,) = routed.modules
    assert change.bytes_after == path_bytes(G, N, K)[path]
    step = routed.model
    del module
    with torch.no_grad():
        for o in inputs:
            wanted = torch.einsum("bsgk,gnk->bsgn", o.double(), exact)
            assert reference.relative_error(step(o), wanted) < TOLERANCE[path]
        assert count_launches(lambda: step(inputs[0]), device) == LAUNCHES[path]
        del wanted
        gc.collect()  # an exception that was handled may hold the frame that held the weight
        freed = allocated - torch.cuda.memory_allocated(device)
        assert freed >= 2 * G * N * K - path_bytes(G, N, K)[path] - (1 << 20)
        captured = graphs.capture(step, strict=True)
        expected = step(inputs[0])
        assert all(torch.equal(captured(inputs[0]), expected) for _ in range(3))


@pytest.mark.parametrize("path", TOLERANCE)
def test_compiled_by_inductor(path: str, device: torch.device) -> None:
    torch.manual_seed(0)
    module = modeling.DeepseekV4GroupedLinear(K, G * N, G).to(device, torch.bfloat16)
    o = torch.randn(1, 4, G, K, device=device).bfloat16()
    step = graphs.route(module, (o,), path=path).model
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(step, fullgraph=True)(o), step(o))
