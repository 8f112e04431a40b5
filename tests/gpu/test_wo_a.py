"""Every wo_a path on real hardware: right, recordable, and poisoned buffers to prove that every element is written."""

from __future__ import annotations

import pytest
import torch

from graphs.errors import WeightError
from graphs.ops import GroupedProjection
from graphs.ops.wo_a import operators, reference, tiles, weights

if not torch.cuda.is_available():
    pytest.skip("no CUDA or HIP device on this machine", allow_module_level=True)

DEVICE = torch.device("cuda", torch.cuda.current_device())
PATHS = ("einsum", "bmm", "gloop", "fused")
TOLERANCE = {"einsum": 0.003, "fused": 0.003, "bmm": 0.03, "gloop": 0.03}
N, K = 256, 1024


def projection(path: str, g: int, n: int = N, k: int = K) -> tuple[GroupedProjection, torch.Tensor]:
    """A module and the float64 weight its stored tensors stand for."""
    generator = torch.Generator(DEVICE).manual_seed(g)
    data = reference.round_fp8(torch.randn(g, n, k, device=DEVICE, generator=generator) * 60)
    scale = torch.exp2(torch.randint(-12, -6, (g, n // 128, k // 128), device=DEVICE, generator=generator).float())
    loaded = weights.load(data, scale)
    prepared = weights.prepare(loaded, path, weights.fp8_dtype(DEVICE))
    exact = prepared.data.double()
    if prepared.scale is not None:
        exact = exact * (prepared.scale if path == "bmm" else reference.expand_blocks(prepared.scale)).double()
    return GroupedProjection(loaded, path=path), exact


def tokens(m: int, g: int, layout: str, k: int = K, seed: int = 0) -> torch.Tensor:
    """``o [m, g, k]``: contiguous, stored group-major, or a slice of wider rows."""
    generator = torch.Generator(DEVICE).manual_seed(seed + m)
    if layout == "transposed":
        return torch.randn(g, m, k, device=DEVICE, generator=generator).bfloat16().transpose(0, 1)
    if layout == "sliced":
        return torch.randn(m, g, k + 64, device=DEVICE, generator=generator).bfloat16()[..., 64:]
    return torch.randn(m, g, k, device=DEVICE, generator=generator).bfloat16()


def poison(shape: tuple[int, ...]) -> None:
    """Leave NaN in the memory that the next result of this shape is likely to get."""
    torch.full(shape, float("nan"), dtype=torch.bfloat16, device=DEVICE)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("g", [1, 2, 16])
@pytest.mark.parametrize("m", [1, 3, 16, 64, 257])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_against_float64(path: str, g: int, m: int, layout: str) -> None:
    module, exact_weight = projection(path, g)
    o = tokens(m, g, layout)
    poison((m, g, N))
    y = module(o)
    assert y.shape == (m, g, N) and y.is_contiguous() and y.isfinite().all()
    assert reference.relative_error(y, reference.project_fp64(o, exact_weight)) <= TOLERANCE[path]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("m", [1, 4, 64, 4096])
def test_the_shape_of_the_model(path: str, m: int) -> None:
    module, exact_weight = projection(path, 2, 1024, 4096)
    o = tokens(m, 2, "contiguous", 4096)
    poison((m, 2, 1024))
    assert reference.relative_error(module(o), reference.project_fp64(o, exact_weight)) <= TOLERANCE[path]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("m", [1, 16, 257])
def test_the_same_input_gives_the_same_bits(path: str, m: int) -> None:
    module, _ = projection(path, 2)
    o = tokens(m, 2, "contiguous")
    first = module(o)
    assert all(torch.equal(module(o), first) for _ in range(10))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("m", [1, 16, 64])
def test_recorded_and_replayed_with_new_data(path: str, m: int) -> None:
    module, exact_weight = projection(path, 2)
    o = tokens(m, 2, "contiguous")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        module(o)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y = module(o)
    for seed in (1, 2, 3):
        o.copy_(tokens(m, 2, "contiguous", seed=seed))
        y.fill_(float("nan"))
        graph.replay()
        replayed = y.clone()
        assert torch.equal(replayed, module(o)), "the replay and an eager call agree bit for bit"
        assert reference.relative_error(replayed, reference.project_fp64(o, exact_weight)) <= TOLERANCE[path]


def test_kernels_of_all_paths_in_turn_wait_for_each_other() -> None:
    """A kernel that starts early may follow any other, and be followed by any other."""
    n = 1024
    order = ("fused", "gloop", "bmm", "einsum", "gloop", "fused", "einsum", "bmm", "fused", "fused")
    layers = [GroupedProjection(weights.load(*chain_weight(2, n, seed)), path=path) for seed, path in enumerate(order)]
    for m in (4, 64, 300):
        x = tokens(m, 2, "contiguous", n)
        expected = [x]
        for layer in layers:
            expected.append(layer(expected[-1]))
            torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results = [x]
            for layer in layers:
                results.append(layer(results[-1]))
        for _ in range(5):
            for y in results[1:]:
                y.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("path", ["bmm", "gloop", "fused"])
def test_many_recordings_do_not_share_scratch_memory(path: str) -> None:
    """Two graphs replayed at once on two streams: neither may write what the other reads."""
    runs = []
    for seed in (1, 2):
        module, _ = projection(path, 2)
        o = tokens(16, 2, "contiguous", seed=seed)
        expected = module(o).clone()
        torch.cuda.synchronize()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.graph(graph, stream=stream):
            ys = [module(o) for _ in range(20)]
        runs.append((graph, stream, ys, expected, module, o))  # a graph does not keep what it reads alive
    for _ in range(10):
        for graph, stream, *_ in runs:
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for _, _, ys, expected, _, _ in runs for y in ys)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_odd_values_stay_odd_and_stay_in_their_row(path: str, value: float) -> None:
    module, _ = projection(path, 2)
    o = tokens(5, 2, "contiguous")
    o[2, 1, 700] = value
    finite = module(o).isfinite()
    assert not finite[2, 1].any()
    finite[2, 1] = True
    assert finite.all()


@pytest.mark.parametrize("path", PATHS)
def test_zeros_and_extreme_magnitudes(path: str) -> None:
    module, exact_weight = projection(path, 2)
    assert module(torch.zeros(3, 2, K, dtype=torch.bfloat16, device=DEVICE)).abs().max() == 0
    for exponent in (-20, 60):
        o = tokens(3, 2, "contiguous") * 2.0**exponent
        assert reference.relative_error(module(o), reference.project_fp64(o, exact_weight)) <= TOLERANCE[path]


def test_operands_on_two_devices_are_named() -> None:
    module, _ = projection("gloop", 2)
    with pytest.raises(WeightError, match="o is on cpu, weight on cuda"):
        torch.ops.graphs.wo_a_gloop(torch.zeros(1, 2, K).bfloat16(), module.weight_blocks, module.scale_blocks)


@pytest.mark.parametrize("path", PATHS)
def test_compiles_into_one_graph(path: str) -> None:
    module, _ = projection(path, 2)
    o = tokens(4, 2, "contiguous")
    assert torch.equal(torch.compile(module, fullgraph=True)(o), module(o))


@pytest.mark.parametrize("m", [1, 8, 9, 16, 33, 64])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("columns", [16, 32, 64])
def test_the_kernel_that_splits_k_is_right_in_every_tile(m: int, layout: str, columns: int) -> None:
    """Dispatch may prefer another kernel here."""
    module, exact_weight = projection("fused", 3)
    o = tokens(m, 3, layout)
    rows = next(rows for rows in (8, 16, 32, 64) if m <= rows and (rows > 8 or not torch.version.hip))
    for overlap in (False, True) if torch.version.hip is None else (False,):
        y = torch.full((m, 3, N), float("nan"), dtype=torch.bfloat16, device=DEVICE)
        tile = tiles.Tile(rows, columns, 4, 2)
        operators.split_k().launch_split(o, module.weight_blocks, module.scale_blocks, y, tile, overlap=overlap)
        assert reference.relative_error(y, reference.project_fp64(o, exact_weight)) <= TOLERANCE["fused"]


ON_HOPPER = DEVICE.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(DEVICE) == (9, 0)
CLUSTERS = sorted({shape for *_, shape in tiles.WARPGROUP} | {tiles.Cluster(16, 64, 3, 3), tiles.Cluster(8, 128, 4, 3)})


@pytest.mark.skipif(not ON_HOPPER, reason="the warpgroup kernel is for compute capability 9.0")
@pytest.mark.parametrize("shape", CLUSTERS, ids=lambda shape: "-".join(map(str, shape)))
@pytest.mark.parametrize("m", [1, 8, 17, 64, 130])
@pytest.mark.parametrize("k", [2048, 4096, 2176])
def test_the_warpgroup_kernel_is_right_in_every_shape(shape: tiles.Cluster, m: int, k: int) -> None:
    """Parts of K that are no multiple of the cluster, tokens that are no multiple of a block's; dispatch may prefer another."""
    module, exact_weight = projection("fused", 3, N, k)
    special = operators.warpgroup()
    assert special is not None, "this triton has what the kernel is written with"
    for layout in ("contiguous", "transposed", "sliced"):
        o = tokens(m, 3, layout, k)
        assert special.suits(o)
        results = []
        for _ in range(3):
            results.append(torch.full((m, 3, N), float("nan"), dtype=torch.bfloat16, device=DEVICE))
            special.launch_warpgroup(o, module.weight_blocks, module.scale_blocks, results[-1], shape)
        assert reference.relative_error(results[0], reference.project_fp64(o, exact_weight)) <= TOLERANCE["fused"]
        assert all(torch.equal(y, results[0]) for y in results), "the order of the sums is fixed"


@pytest.mark.skipif(not ON_HOPPER, reason="the warpgroup kernel is for compute capability 9.0")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_warpgroup_kernel_keeps_odd_values_in_their_row(value: float) -> None:
    module, _ = projection("fused", 8, 1024)
    o = tokens(64, 8, "contiguous")
    o[33, 1, 700] = value
    finite = module(o).isfinite()
    assert not finite[33, 1].any()
    finite[33, 1] = True
    assert finite.all()


def test_rows_that_cannot_be_copied_in_16_bytes_go_to_another_kernel() -> None:
    module, exact_weight = projection("fused", 16)
    o = torch.randn(64, 16, K + 1, device=DEVICE).bfloat16()[..., 1:]
    special = operators.warpgroup()
    assert special is None or not special.suits(o)
    assert reference.relative_error(module(o), reference.project_fp64(o, exact_weight)) <= TOLERANCE["fused"]


@pytest.mark.parametrize("m", [1, 16, 64, 257])
def test_the_portable_kernel_is_right_here_too(m: int) -> None:
    """Special kernels hide it on some devices."""
    module, exact_weight = projection("fused", 2)
    o = tokens(m, 2, "transposed")
    y = torch.full((m, 2, N), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    arch = operators.arch_of(DEVICE.index, "fused", module.weight_blocks.dtype)
    operators.kernels().launch_fused(o, module.weight_blocks, module.scale_blocks, y, tiles.fused(m, 2, N, K, arch))
    assert reference.relative_error(y, reference.project_fp64(o, exact_weight)) <= TOLERANCE["fused"]


@pytest.mark.parametrize("activations", ["bf16", "fp8"])
@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("m", [1, 16, 64, 257])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_options_of_fused(activations: str, turn: bool, m: int, layout: str) -> None:
    module, exact_weight = projection("fused", 2)
    module.activations = activations
    o = tokens(m, 2, layout)
    angles = torch.rand(300, 32, device=DEVICE) * 6
    table = torch.cat((angles.cos(), angles.sin()), -1)
    positions = torch.randperm(300, device=DEVICE)[:m]
    poison((m, 2, N))
    y = module(o, positions, table) if turn else module(o)
    exact = reference.project_fp64(reference.inverse_rotary(o, positions, table) if turn else o, exact_weight)
    assert reference.relative_error(y, exact) <= TOLERANCE["bmm" if activations == "fp8" else "fused"]


@pytest.mark.parametrize(("path", "overlap"), [("fused", False), ("fused", True), ("bmm", False), ("gloop", False)])
@pytest.mark.parametrize("g", [1, 2, 5, 16])
@pytest.mark.parametrize("m", [1, 8, 16, 64, 300])
def test_a_chain_reads_what_the_kernel_in_front_wrote(path: str, overlap: bool, g: int, m: int) -> None:
    """Every projection's input is made by the projection before it: a launch that starts early must still wait for it."""
    n = 1024  # so that a result can be the next input
    layers = [GroupedProjection(weights.load(*chain_weight(g, n, seed)), path=path, overlap=overlap) for seed in range(8)]
    x = tokens(m, g, "contiguous", n)
    stream = torch.cuda.Stream()

    def run() -> list[torch.Tensor]:
        results = [x]
        for layer in layers:
            results.append(layer(results[-1]))
        return results

    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = run()
    for seed in range(1, 6):
        x.copy_(tokens(m, g, "contiguous", n, seed=seed))
        for y in results[1:]:
            y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        for before, after, layer in zip(results, results[1:], layers, strict=False):
            if path == "bmm":
                exact = layer.weight_single.double() * layer.scale_single.double()
            else:
                exact = layer.weight_blocks.double() * reference.expand_blocks(layer.scale_blocks).double()
            assert reference.relative_error(after, reference.project_fp64(before, exact)) <= TOLERANCE[path]


def chain_weight(g: int, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A square weight that keeps the size of its input."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return reference.quantise_blocks(torch.randn(g, n, n, device=DEVICE, generator=generator) / n**0.5)


def test_a_loaded_weight_is_used_by_the_very_next_call() -> None:
    other = GroupedProjection(weights.load(*chain_weight(2, K, 3)), path="fused")
    state = other.state_dict()
    o = tokens(4, 2, "contiguous")
    target = GroupedProjection(weights.load(*chain_weight(2, K, 4)), path="fused")
    for _ in range(20):
        target.load_state_dict(state)
        assert torch.equal(target(o), other(o))
        target.load_state_dict({name: torch.zeros_like(value) for name, value in state.items()})
        assert not target(o).any()
