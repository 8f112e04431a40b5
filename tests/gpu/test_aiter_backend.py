"""The aiter back end on real hardware: both operators right, recordable, and one node for the compiler."""

from __future__ import annotations

import pytest
import torch

from graphs.ops import GroupedProjection
from graphs.ops.wo_a import aiter_backend, reference, weights

if not torch.cuda.is_available():
    pytest.skip("no CUDA or HIP device on this machine", allow_module_level=True)
if aiter_backend.available():
    pytest.skip(f"{aiter_backend.available()}", allow_module_level=True)

DEVICE = torch.device("cuda", torch.cuda.current_device())
OPERATORS = {"bmm": aiter_backend.bmm, "gloop": aiter_backend.gloop}
N, K = 256, 1024
TOLERANCE = 0.03  # FP8 activations cost 0.026


def prepared(path: str, g: int, n: int = N, k: int = K) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight ``[g, n, k]``, scale, and the float64 weight they stand for."""
    generator = torch.Generator(DEVICE).manual_seed(g)
    data = reference.round_fp8(torch.randn(g, n, k, device=DEVICE, generator=generator) * 60)
    scale = torch.exp2(torch.randint(-12, -6, (g, n // 128, k // 128), device=DEVICE, generator=generator).float())
    weight = weights.prepare(weights.load(data, scale), path, weights.fp8_dtype(DEVICE))
    assert weight.scale is not None
    factors = weight.scale if path == "bmm" else reference.expand_blocks(weight.scale)
    return weight.data, weight.scale, weight.data.double() * factors.double()


def activations(m: int, g: int, layout: str = "contiguous", k: int = K, seed: int = 0) -> torch.Tensor:
    """``o [m, g, k]``: contiguous, stored group-major, a slice of wider rows, or one row broadcast over the tokens."""
    generator = torch.Generator(DEVICE).manual_seed(seed + m)
    if layout == "transposed":
        return torch.randn(g, m, k, device=DEVICE, generator=generator).bfloat16().transpose(0, 1)
    if layout == "sliced":
        return torch.randn(m, g, k + 64, device=DEVICE, generator=generator).bfloat16()[..., 64:]
    if layout == "broadcast":
        return torch.randn(1, g, k, device=DEVICE, generator=generator).bfloat16().expand(m, g, k)
    return torch.randn(m, g, k, device=DEVICE, generator=generator).bfloat16()


def poison(shape: tuple[int, ...]) -> None:
    """Leave NaN in the memory that the next result of this shape is likely to get."""
    torch.full(shape, float("nan"), dtype=torch.bfloat16, device=DEVICE)


@pytest.mark.parametrize("path", OPERATORS)
@pytest.mark.parametrize("g", [1, 2, 16])
@pytest.mark.parametrize("m", [1, 3, 16, 64, 257])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "broadcast"])
def test_against_float64(path: str, g: int, m: int, layout: str) -> None:
    weight, scale, exact = prepared(path, g)
    o = activations(m, g, layout)
    poison((m, g, N))
    y = OPERATORS[path](o, weight, scale)
    assert y.shape == (m, g, N) and y.is_contiguous() and y.dtype == torch.bfloat16
    assert reference.relative_error(y, reference.project_fp64(o, exact)) <= TOLERANCE


@pytest.mark.parametrize("path", OPERATORS)
def test_a_projection_with_this_back_end_calls_the_operator(path: str) -> None:
    generator = torch.Generator(DEVICE).manual_seed(7)
    data, scale = reference.quantise_blocks(torch.randn(2, N, K, device=DEVICE, generator=generator))
    module = GroupedProjection(data, scale, path=path, backend="aiter")
    o = activations(5, 2)
    expected = OPERATORS[path](o, *module.buffers())
    assert torch.equal(module(o), expected)
    assert torch.equal(torch.compile(module, fullgraph=True)(o), expected)


@pytest.mark.parametrize("path", OPERATORS)
@pytest.mark.parametrize("m", [1, 4, 64, 256, 4096])
def test_the_shape_of_the_model(path: str, m: int) -> None:
    weight, scale, exact = prepared(path, 2, 1024, 4096)
    o = activations(m, 2, k=4096)
    poison((m, 2, 1024))
    assert reference.relative_error(OPERATORS[path](o, weight, scale), reference.project_fp64(o, exact)) <= TOLERANCE


@pytest.mark.parametrize("path", OPERATORS)
@pytest.mark.skipif(torch.version.hip is not None, reason="on ROCm the package's tuned options are replaced as a whole")
def test_a_configuration_of_the_callers(path: str) -> None:
    weight, scale, exact = prepared(path, 2)
    o = activations(33, 2)
    config = {"BLOCK_SIZE_M": 32, "BLOCK_SIZE_N": 128, "num_warps": 8, "waves_per_eu": 2, "matrix_instr_nonkdim": 16, "kpack": 2}
    if path == "gloop":
        config["NUM_KSPLIT"] = 4
    y = OPERATORS[path](o, weight, scale, config=config)
    assert reference.relative_error(y, reference.project_fp64(o, exact)) <= TOLERANCE


@pytest.mark.parametrize("path", OPERATORS)
@pytest.mark.parametrize("m", [1, 16, 64])
def test_recorded_and_replayed_with_new_data(path: str, m: int) -> None:
    weight, scale, exact = prepared(path, 2)
    o = activations(m, 2)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        OPERATORS[path](o, weight, scale)  # compiles
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y = OPERATORS[path](o, weight, scale)
    for seed in (1, 2, 3):
        o.copy_(activations(m, 2, seed=seed))
        y.fill_(float("nan"))
        graph.replay()
        replayed = y.clone()
        assert torch.equal(replayed, OPERATORS[path](o, weight, scale)), "the replay and an eager call agree bit for bit"
        assert reference.relative_error(replayed, reference.project_fp64(o, exact)) <= TOLERANCE


@pytest.mark.parametrize("path", OPERATORS)
def test_one_operator_for_the_compiler(path: str) -> None:
    weight, scale, _ = prepared(path, 2)
    o = activations(4, 2)
    compiled = torch.compile(OPERATORS[path], fullgraph=True)
    assert torch.equal(compiled(o, weight, scale), OPERATORS[path](o, weight, scale))
